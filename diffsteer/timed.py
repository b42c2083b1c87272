"""A session's walk with levels of its rows' own: the state is asked how noisy it is before it is denoised."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffsteer.algebra import NO_SIGNAL, Level, transition
from diffsteer.selection import Selection
from diffsteer.session import Session
from diffsteer.timing import Shift, Shifted, Timing, match, sample_variance
from diffsteer.types import UnsupportedError
from diffsteer.warn import warn

# Adams-Bashforth weights of the noises, the newest first (Liu et al., 2022, arXiv 2202.09778, eq. 12 and appendix).
_MULTISTEP = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
_EDGE = 0.5  # share of rows at the window's edge above which the rule says nothing of its own


class TimedWalk:
    """Carries all rows from noise to clean, each with the level that its variance says.

    Attributes:
        shifts: a `Shift` for every step that was looked at, in order.

    Raises:
        UnsupportedError: a model whose rows cannot be at levels of their own.
    """

    def __init__(self, session: Session, timing: Timing) -> None:
        clock = session.clock
        if clock is None or session.native or session.no_reentry:
            raise UnsupportedError(
                "time-shift sets noise levels row by row, which takes a scheduler with alphas_cumprod and no sigmas "
                "(DDIMScheduler, DDPMScheduler) or a CallableModel, a pipeline that can be cut, and transition=own"
            )
        if timing.window > 0 and math.prod(session.shape) < 2:
            raise UnsupportedError(
                "time-shift reads a level from the variance of a sample's elements; this model's has one element"
            )
        self.session, self.timing, self.clock = session, timing, clock
        self.shifts: list[Shift] = []
        self.noises: list[Tensor] = []  # predicted, the newest first
        self.dtype = torch.float32  # of the states

    def __call__(self, select: Selection) -> Tensor:
        """The final states, (P * K, ...)."""
        session, at = self.session, 0
        with torch.no_grad():
            variance, spread = self._data_variance()  # of rows in the order of their slots, whoever lives there
            x, times = session.noise(), self._nominal(0)
            self.dtype = x.dtype
            for event in select.events:
                x0 = x
                for k in range(at, event):
                    x, x0 = self._step(x, k, times)
                    if k + 1 < session.steps:
                        times = self._times(x, k + 1, variance, spread)
                at = event
                x = select(event, x, x0)
                ancestors = select.ancestors
                session.follow(ancestors, event)
                moved = (torch.arange(len(ancestors))[:, None] * ancestors.shape[1] + ancestors).flatten()
                times, self.noises = times[moved], [n[moved.to(n.device)] for n in self.noises]
        self._warn()
        return x

    def _nominal(self, k: int) -> Tensor:
        return self.clock.times[k].double().repeat(self.session.rows)

    def _looks(self, k: int) -> bool:
        """Are the rows asked for their levels before step k?"""
        return k > 0 and self.timing.window > 0 and float(self.clock.times[k]) > self.timing.cutoff * self.clock.unit

    def _times(self, x: Tensor, k: int, variance: Tensor, spread: float) -> Tensor:
        """What the rows' times are before step k."""
        if not self._looks(k):
            return self._nominal(k)
        found = match(x, float(self.clock.times[k]), self.timing, self.clock, variance, spread, k)
        self.shifts.append(found)
        return found.times

    def _step(self, x: Tensor, k: int, times: Tensor) -> tuple[Tensor, Tensor]:
        session, timing = self.session, self.timing
        to, nominal = session.levels[k + 1], self._nominal(k)
        usual = not self._looks(k)  # whatever was found: one row must not know what another was found to be
        if usual and timing.order == 1 and timing.epsilon_scale == 1:
            return session.segment(x, k, k + 1)
        at = (
            Level(session.levels[k].alpha.expand(len(x)), session.levels[k].sigma.expand(len(x)))
            if usual
            else self.clock.level(times)
        )
        asked = times if timing.side == "conditioning" else nominal
        noise, x0 = self._noise(x, k, asked, at)
        precise = x.to(x0.dtype)  # of half precision states, single
        if float(at.alpha.min()) < NO_SIGNAL:  # no clean estimate follows from the noise: the network's own stays
            eps = noise
        else:
            warm = len(self.noises) < timing.order - 1 and k + 1 < session.steps
            self.noises = [noise, *self.noises][: timing.order]
            eps = self._combined(precise, k, times, noise, at) if warm else self._multistep()
            alpha, sigma = at.like(precise)
            x0 = (precise - sigma * eps) / alpha
        z = session.step_noise(range(len(x)), k).to(x0)
        return transition(x0, eps, at, to, session.eta, z, session.noise_kind).to(x.dtype), x0

    def _noise(self, x: Tensor, k: int, asked: Tensor, at: Level) -> tuple[Tensor, Tensor]:
        """The predicted noise of states (N, ...) at levels of their own, scaled, and the clean estimates before that."""
        self.session.shifted = Shifted(asked, at)
        try:
            x0 = self.session.segment(x.to(self.dtype), k, k + 1).x0
        finally:
            self.session.shifted = None
        x = x.to(x0.dtype)
        alpha, sigma = at.like(x)
        return (x - alpha * x0) / sigma / self.timing.epsilon_scale, x0

    def _multistep(self) -> Tensor:
        weights = _MULTISTEP[len(self.noises)]
        return torch.stack([w * n for w, n in zip(weights, self.noises, strict=True)]).sum(0)

    def _combined(self, x: Tensor, k: int, times: Tensor, noise: Tensor, at: Level) -> Tensor:
        """Of the first steps: the mean of the noises of Heun's step (order 2) or of Runge and Kutta's (order 4)."""

        def moved(eps: Tensor, to: Level) -> Tensor:
            (a, s), (b, r) = at.like(x), to.like(x)
            return b * (x - s * eps) / a + r * eps

        following = self._nominal(k + 1)
        end = self.clock.level(following)
        if self.timing.order == 2:
            return (noise + self._noise(moved(noise, end), k, following, end)[0]) / 2
        half = (times + following) / 2
        middle = self.clock.level(half)
        second, _ = self._noise(moved(noise, middle), k, half, middle)
        third, _ = self._noise(moved(second, middle), k, half, middle)
        fourth, _ = self._noise(moved(third, end), k, following, end)
        return (noise + 2 * second + 2 * third + fourth) / 6

    def _data_variance(self) -> tuple[Tensor, float]:
        """The variance of clean samples, (rows,), and its spread; measured, if that is asked for, on a plain run of as many
        rows. Each prompt has its own, so that other prompts change nothing."""
        timing, session = self.timing, self.session
        if not timing.calibrates:
            return torch.full((session.rows,), timing.data_variance or 0.0, dtype=torch.float64), 0.0
        session.visit, session.purpose = 1, "calibrate"  # other noise than that of the run to come
        try:
            clean = session.segment(session.noise(), 0, session.steps).x
        finally:
            session.visit, session.purpose = 0, "start"
        variances = sample_variance(clean).cpu().view(-1, session.particles)
        spread = float(variances.std(1).mean()) if session.particles > 1 else 0.0
        return variances.mean(1).repeat_interleave(session.particles), spread

    def _warn(self) -> None:
        looked = [s for s in self.shifts if len(s.times)]
        if not looked:
            return
        edge = sum(float(s.edge.double().mean()) for s in looked) / len(looked)
        flat = sum(float(s.flat.double().mean()) for s in looked) / len(looked)
        if edge > _EDGE:
            warn(
                f"time-shift: {edge:.0%} of the rows stood at the edge of the window, and the shift is a constant: either the "
                f"reference ({self.timing.reference}) does not fit this model, or its states are off by more than the window"
            )
        elif flat > _EDGE:
            warn(
                f"time-shift: for {flat:.0%} of what was looked at an honest sample's variance varies by more than the "
                f"reference does over the window (window={self.timing.window:g}): what is matched there is noise"
            )
