"""Feynman-Kac steering: particles that are weighted by a reward on the way and resampled.

Singhal et al. (2025), arXiv 2501.06848; the particle filter is that of Chopin & Papaspiliopoulos (2020), chapter 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffsteer.events import check_events, event_steps
from diffsteer.particles import (
    PER_ROW,
    decisive_exponent,
    effective_sample_size,
    largest_exponent,
    normalize,
    reindex,
    warn_blind,
)
from diffsteer.resampling import SCHEMES
from diffsteer.rng import generator
from diffsteer.types import DiffsteerError, Info, Problem, Step, check_numbers, setting

# A potential is the running statistic s_n of the rewards r_1 .. r_n of a path; its log G_n = lambda s_n. `difference` has none:
# its log G_n = lambda_n r_n - lambda_{n-1} r_{n-1} telescopes, which alone allows a lambda that changes on the way.
POTENTIALS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "difference": None,
    "max": torch.maximum,
    "sum": lambda s, r: s + r,
    "immediate": lambda s, r: r,
}
FIRST_STATISTIC = {"max": -math.inf}
TEMPERED = ("difference",)
TRIGGERS = ("ess", "always")


@dataclass(frozen=True)
class State:
    """log_weights, statistic and log_potential (so far accumulated log G) are (P, K); log_z and exponent (P,)."""

    problem: Problem
    log_weights: Tensor = field(metadata=PER_ROW)
    statistic: Tensor = field(metadata=PER_ROW)
    log_potential: Tensor = field(metadata=PER_ROW)
    log_z: Tensor
    exponent: Tensor


@dataclass(frozen=True)
class FeynmanKac:
    """Particles under the potentials G_1 .. G_M, whose product is exp(lambda r(x_0)) whatever the potential.

    The weighted particles target ``p(x_0) exp(lambda r(x_0)) / Z``, p being the law of the steered chain (with
    classifier-free guidance that of the guided chain); `log_z` estimates log Z, exp(log_z) without bias for a fixed lambda.
    Exact as K grows; with `target_ess` lambda is chosen from the particles, which adds an O(1/K) bias. With one particle or
    ``scale=0`` the chain is the same without selection, bit for bit.

    Cost: K times the plain chain, and K decodes and reward calls at every event and at the end.

    Args:
        particles: K, a prompt.
        potential: difference | max (the paper's choice for images) | sum | immediate.
        scale: lambda, on the scale of the reward; with `target_ess` the most that lambda may become.
        target_ess: tempering. lambda grows as far as the ESS stays at `target_ess` K; for `difference` only. None: fixed.
        resampling: systematic | ssp | stratified | residual | killing | multinomial.
        trigger: "ess" resamples groups whose ESS is below `threshold` K, "always" at every event.
        threshold: in (0, 1]; above `target_ess`, since tempering stops at that.
        events: when to score: fractions of the run in (0, 1), "all" steps, or every n-th step. The end always counts. The
            default is late, when a clean estimate tells something; earlier ones, (0.2, 0.4, 0.6, 0.8) say, pay where the model
            on its own hardly ever draws what the reward asks for, and cost accuracy where it often does.
        eta: amount of noise in the transition, in (0, 1]. Without noise, copies would never part.

    Raises:
        DiffsteerError: a value out of its range; the message says which are valid.
    """

    particles: int = setting(4, low=1)
    potential: str = setting("difference", choices=tuple(POTENTIALS))
    scale: float | None = setting(None, low=0)
    target_ess: float | None = setting(0.5, low=0, high=1)
    resampling: str = setting("systematic", choices=tuple(SCHEMES))
    trigger: str = setting("ess", choices=TRIGGERS)
    threshold: float = setting(0.7, low=0, high=1)
    events: Any = (0.6, 0.8)
    eta: float = setting(1.0, low=0, high=1)

    name: ClassVar[str] = "fk"
    exact: ClassVar[bool] = True
    needs_grad: ClassVar[bool] = False
    needs_reward: ClassVar[bool] = True
    source: ClassVar[str] = "Singhal et al., 2025, arXiv 2501.06848"

    def __post_init__(self) -> None:
        shares = {"scale": self.scale, "target_ess": self.target_ess, "threshold": self.threshold, "eta": self.eta}
        check_numbers("fk: ", {"particles": self.particles}, shares)
        for what, value, valid in (
            ("potential", self.potential, POTENTIALS),
            ("resampling", self.resampling, SCHEMES),
            ("trigger", self.trigger, TRIGGERS),
        ):
            if value not in valid:
                raise DiffsteerError(f"fk: {what}={value!r} is unknown; valid: {', '.join(valid)}")
        if self.particles < 1:
            raise DiffsteerError(f"fk: particles={self.particles}; at least 1 is needed")
        if not 0 < self.eta <= 1:
            raise DiffsteerError(f"fk: eta={self.eta:g}; copies of a particle part only by noise: set eta in (0, 1]")
        if self.target_ess is None and self.scale is None:
            raise DiffsteerError("fk: set scale (a fixed lambda) or target_ess (tempering, in (0, 1)), or both")
        if self.scale is not None and not (self.scale >= 0 and math.isfinite(self.scale)):
            raise DiffsteerError(f"fk: scale={self.scale}; it must be finite and at least 0")
        if not 0 < self.threshold <= 1:
            raise DiffsteerError(f"fk: threshold={self.threshold:g} is a share of the particles, in (0, 1]")
        if self.target_ess is not None:
            if self.potential not in TEMPERED:
                raise DiffsteerError(f"fk: potential={self.potential} needs a fixed lambda: set scale and target_ess=null")
            if not 0 < self.target_ess < 1:
                raise DiffsteerError(f"fk: target_ess={self.target_ess:g} is a share of the particles, in (0, 1)")
            if self.trigger == "ess" and self.threshold <= self.target_ess:
                raise DiffsteerError(
                    f"fk: threshold={self.threshold:g} must exceed target_ess={self.target_ess:g}, or nothing is resampled"
                )
        check_events(self.events, "fk")

    def schedule(self, steps: int) -> tuple[int, ...]:
        """After how many transitions rewards are wanted."""
        return event_steps(self.events, steps)

    def init(self, problem: Problem) -> State:
        """Uniform weights, no reward seen."""
        uniform = torch.full((problem.groups, self.particles), -math.log(self.particles), dtype=torch.float64)
        return State(
            problem=problem,
            log_weights=uniform,
            statistic=torch.full_like(uniform, FIRST_STATISTIC.get(self.potential, 0.0)),
            log_potential=torch.zeros_like(uniform),
            log_z=torch.zeros(problem.groups, dtype=torch.float64),
            exponent=torch.full((problem.groups,), 0.0 if self.target_ess else self.scale or 0.0, dtype=torch.float64),
        )

    def apply(self, state: State, step: Step) -> tuple[State, Info]:
        """Weigh by the potential, then resample the groups that need it; never at the end, nor once no noise is to come."""
        lost = step.rewards.isnan() | (step.rewards == -math.inf) | (state.log_weights == -math.inf)
        r = step.rewards.masked_fill(lost, 0.0)
        if step.log_ratio is not None:  # guidance moved the transitions
            state = replace(state, log_weights=state.log_weights + step.log_ratio)
        exponent = self._exponent(state, r, lost)
        update = POTENTIALS[self.potential]
        statistic = r if update is None else update(state.statistic, r)
        if update is None or step.final:  # the product of all potentials becomes exp(lambda r)
            potential = exponent[:, None] * r
        else:
            potential = state.log_potential + exponent[:, None] * statistic
        increment = (potential - state.log_potential).masked_fill(lost, -math.inf)
        log_weights, total = normalize(state.log_weights + increment)

        blind = lost.all(1)  # nothing to tell the particles of a group apart: the event is passed over
        if bool(blind.any()):
            warn_blind(self.name, state.problem, step.done, blind, "its potentials go uniform")
            log_weights = torch.where(blind[:, None], state.log_weights, log_weights)
            total = total.masked_fill(blind, 0.0)
            statistic = torch.where(blind[:, None], state.statistic, statistic)
            potential = torch.where(blind[:, None], state.log_potential, potential)
            exponent = torch.where(blind, state.exponent, exponent)

        ess = effective_sample_size(log_weights)
        ancestors, resampled = self._resample(state.problem, step, log_weights, ess)
        info = Info(step.done, step.rewards, log_weights, ess, ancestors, resampled, exponent)
        next_state = State(
            problem=state.problem,
            log_weights=log_weights,
            statistic=statistic,
            log_potential=potential,
            log_z=state.log_z + total,
            exponent=exponent,
        )
        if bool(resampled.any()):
            next_state = reindex(next_state, ancestors)
            uniform = torch.full_like(log_weights, -math.log(self.particles))
            next_state = replace(next_state, log_weights=torch.where(resampled[:, None], uniform, next_state.log_weights))
        return next_state, info

    def _exponent(self, state: State, r: Tensor, lost: Tensor) -> Tensor:
        if self.target_ess is None or self.scale == 0:
            return state.exponent

        def log_weights_at(exponent: Tensor) -> Tensor:
            moved = state.log_weights + exponent[:, None] * r - state.log_potential
            return moved.masked_fill(lost & ~lost.all(1, keepdim=True), -math.inf)

        if self.scale is None:
            high = state.exponent + decisive_exponent(r, ~lost)
        else:
            high = torch.full_like(state.exponent, self.scale)
        return largest_exponent(log_weights_at, state.exponent, high, self.target_ess * self.particles)

    def _resample(self, problem: Problem, step: Step, log_weights: Tensor, ess: Tensor) -> tuple[Tensor, Tensor]:
        ancestors = torch.arange(self.particles).repeat(problem.groups, 1)
        wanted = torch.ones_like(ess, dtype=torch.bool) if self.trigger == "always" else ess < self.threshold * self.particles
        if step.final or step.done > problem.last_noise:
            wanted = torch.zeros_like(wanted)
        for p in wanted.nonzero()[:, 0].tolist():
            draws = generator(problem.seed, problem.ids[p], step.done, "resample")
            ancestors[p] = SCHEMES[self.resampling](log_weights[p], draws)
        return ancestors, wanted
