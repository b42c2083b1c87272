"""A plain function as the model: own networks, series, motion, and the closed forms of the tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffsteer.algebra import PREDICTIONS, Level, level, mixed, to_clean, transition
from diffsteer.grids import Range, flow_times, ratios_for, snapped, vp_range, vp_ratios
from diffsteer.schedules import Karras, Schedule
from diffsteer.session import Arrival, Session
from diffsteer.timing import Clock
from diffsteer.types import DiffsteerError

PATHS = ("vp", "edm", "flow")


class CallableModel:
    """A denoiser function with its path, in a pipeline's place.

    Args:
        fn: ``fn(x (N, *shape), t (N,), conditions: list of N prompts) -> (N, *shape)``.
        prediction: what fn predicts: "eps" | "v" | "x0" | "velocity".
        path: "vp": t indexes `alphas_cumprod`; "edm": t is sigma; "flow": t in [0, 1], 1 being noise.
        shape: of one sample.
        alphas_cumprod: (1000,) or so, decreasing; for "vp" only, where it is needed.
        sigmas: the largest and the smallest sigma of the "edm" grid (`diffsteer.schedules.Karras`).
        decode: latents (N, *shape) -> samples for the reward; without it the reward sees what the model denoises.
        device, dtype: of the states that fn is given.

    Raises:
        DiffsteerError: an unknown prediction or path, or `alphas_cumprod` missing.
    """

    def __init__(
        self,
        fn: Callable[[Tensor, Tensor, list[Any]], Tensor],
        prediction: str,
        path: str,
        shape: Sequence[int],
        alphas_cumprod: Tensor | Sequence[float] | None = None,
        sigmas: tuple[float, float] = (80.0, 0.002),
        decode: Callable[[Tensor], Tensor] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise DiffsteerError(f"prediction={prediction!r} is unknown; valid: {', '.join(PREDICTIONS)}")
        if path not in PATHS:
            raise DiffsteerError(f"path={path!r} is unknown; valid: {', '.join(PATHS)}")
        if (alphas_cumprod is None) == (path == "vp"):
            raise DiffsteerError('alphas_cumprod is needed for path="vp", and for no other')
        if prediction == "velocity" and path != "flow":
            raise DiffsteerError('prediction="velocity" goes with path="flow"')
        if path == "flow" and prediction == "eps":
            raise DiffsteerError(
                'prediction="eps" says nothing of x0 at t = 1 of a flow, where x is all noise; use "velocity" or "x0"'
            )
        bars = None if alphas_cumprod is None else torch.as_tensor(alphas_cumprod, dtype=torch.float64)
        if bars is not None and not 0 < float(bars.min()) <= float(bars.max()) <= 1:
            raise DiffsteerError("alphas_cumprod must lie in (0, 1]")
        self.fn, self.prediction, self.path, self.shape = fn, prediction, path, tuple(shape)
        self.alphas_cumprod, self.sigmas, self.decode, self.device, self.dtype = bars, sigmas, decode, device, dtype

    def grid(self, steps: int, schedule: Schedule | None = None) -> tuple[list[float], list[Level]]:
        """The times at which fn is called (T of them) and the levels (T + 1), the last one clean.

        Args:
            schedule: in the place of evenly spaced times ("vp", "flow") or `Karras` ("edm"); of "vp" the nearest distinct ones.

        Raises:
            DiffsteerError: fewer than one step, or more than `alphas_cumprod` has.
        """
        if schedule is not None and steps >= 1:
            return self._walk(steps, schedule)
        if self.path == "vp":
            bars = self.alphas_cumprod
            assert bars is not None
            if not 1 <= steps <= len(bars):
                raise DiffsteerError(f"num_inference_steps={steps}; this model has 1 to {len(bars)}")
            times = torch.linspace(len(bars) - 1, 0, steps + 1)[:-1].round().long().tolist()
            levels = [level(bars[t].sqrt(), (1 - bars[t]).sqrt()) for t in times] + [level(1.0, 0.0)]
            return [float(t) for t in times], levels
        if steps < 1:
            raise DiffsteerError(f"num_inference_steps={steps}; at least 1 is needed")
        if self.path == "flow":
            times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
            return times[:-1], [level(1 - t, t) for t in times]
        times = Karras().ratios(steps, *self.sigmas).tolist()
        return times, [level(1.0, s) for s in times] + [level(1.0, 0.0)]

    def _walk(self, steps: int, schedule: Schedule) -> tuple[list[float], list[Level]]:
        end = level(1.0, 0.0)
        if self.alphas_cumprod is not None:
            bars, table = self.alphas_cumprod, vp_ratios(self.alphas_cumprod)
            index = snapped(ratios_for(schedule, steps, vp_range(table)), table).tolist()
            return [float(t) for t in index], [*(level(bars[t].sqrt(), (1 - bars[t]).sqrt()) for t in index), end]
        if self.path == "flow":
            known = Range(math.inf, 1e-3, True, lambda t: t / (1 - t))
            times = flow_times(ratios_for(schedule, steps, known)).tolist()
            return times, [*(level(1 - t, t) for t in times), end]
        times = ratios_for(schedule, steps, Range(*self.sigmas, False, lambda t: t)).tolist()
        return times, [*(level(1.0, s) for s in times), end]

    def table(self) -> Tensor:
        """What fn can be asked for: (M, 3) of time, alpha and sigma, times rising."""
        if self.alphas_cumprod is not None:
            return vp_table(self.alphas_cumprod)
        if self.path == "flow":
            t = torch.linspace(0, 1, 1001, dtype=torch.float64)
            return torch.stack([t, 1 - t, t], 1)
        sigmas = Karras().ratios(1000, *self.sigmas).flip(0)
        return torch.stack([sigmas, torch.ones_like(sigmas), sigmas], 1)


class CallableSession(Session):
    """A session over a `CallableModel`; conditions are the prompts themselves, whatever they are."""

    def __init__(self, model: CallableModel, prompts: Sequence[Any], *, num_inference_steps: int = 50, **keys: Any) -> None:
        super().__init__(prompts, **keys)
        self.model, self.shape, self.decoder = model, model.shape, model.decode
        self.steps = num_inference_steps
        self.times, self.levels = model.grid(num_inference_steps, self.schedule)
        self.clock = Clock(torch.tensor(self.times, dtype=torch.float64), model.table())

    def _scale_noise(self, noise: Tensor) -> Tensor:
        return (noise * self.levels[0].sigma.to(noise.dtype)).to(self.model.device, self.model.dtype)

    def _segment(self, x: Tensor, start: int, stop: int, rows: Sequence[int]) -> Arrival:
        conditions, count = self.texts_of(rows), len(self.experts)
        x0 = x
        for k in range(start, stop):
            at, to = self.levels[k], self.levels[k + 1]
            shown = x if count == 1 else x.repeat_interleave(count, 0)
            t = torch.full((len(shown),), self.times[k], dtype=x.dtype, device=x.device)
            if self.shifted is not None:
                asked, at = self.shifted.of(list(rows))
                t = asked.to(x).repeat_interleave(count)
            with self.ledger.timed("denoiser"):
                output = mixed(self.model.fn(shown, t, conditions), self.experts)
            self.ledger.forwards += 1
            self.ledger.evaluations += len(shown)
            x0, eps = to_clean(self.model.prediction, x, output, at)
            x = transition(x0, eps, at, to, self.eta, self.step_noise(rows, k).to(x), self.noise_kind)
        return Arrival(x, x0)


def pixel_model(unet: Callable[[Tensor, Tensor], Any], alphas_cumprod: Tensor) -> CallableModel:
    """A network that predicts the noise of pictures in [-1, 1] as a model: its clean estimates are cut off at that range, as
    Ho et al. (2020), arXiv 2006.11239, do; a noise that is a little wrong, where there is nearly nothing else, would be a
    picture far out of it. Samples are in [0, 1]."""
    clock = Clock(torch.empty(0), vp_table(alphas_cumprod.double()))

    def clean(x: Tensor, t: Tensor, conditions: list[Any]) -> Tensor:
        alpha, sigma = clock.level(t).like(x)
        x0: Tensor = (x - sigma * unet(x, t).sample) / alpha
        return x0.clamp(-1, 1)

    return CallableModel(clean, "x0", "vp", (3, 32, 32), alphas_cumprod, decode=lambda x: (x / 2 + 0.5).clamp(0, 1))


def vp_table(bars: Tensor) -> Tensor:
    """(M, 3) of time, alpha and sigma for alphas_cumprod (M,)."""
    return torch.stack([torch.arange(len(bars), dtype=torch.float64), bars.sqrt(), (1 - bars).sqrt()], 1)
