"""Gradient guidance: one step whose parameters make it DPS, LGD-MC, FreeDoM, Universal Guidance, MPGD or TFG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors

from diffsteer.algebra import SMALLEST_SIGNAL, Level
from diffsteer.particles import reindex
from diffsteer.types import DiffsteerError, check_numbers, setting
from diffsteer.warn import warn


class Scale(NamedTuple):
    """What normalisers may look at: the level, rms of the noise estimate (N,), rewards (N,), the most a reward can be, and rms
    of what classifier-free guidance changed in the noise estimate, (N,), where that is asked for."""

    at: Level
    noise: Tensor
    rewards: Tensor
    ceiling: float
    pulls: Tensor | None = None


def _residual(g: Tensor, rms: Tensor, scale: Scale) -> Tensor:
    """The gradient of the square root of the loss, the loss being what is missing to the best reward: DPS's norm."""
    loss = (scale.ceiling if math.isfinite(scale.ceiling) else 0.0) - scale.rewards
    if bool((loss < 0).any()):
        raise DiffsteerError(
            "guidance: normaliser=residual wants minus a squared distance, or a reward with an upper bound; this reward is "
            f"{float(scale.rewards.max()):g}: choose another normaliser"
        )
    return g / (2 * loss.clamp(min=1e-12).sqrt()[:, None])


def _cfg(g: Tensor, rms: Tensor, scale: Scale) -> Tensor:
    """Of the size of what classifier-free guidance does: FreeDoM's and MPGD's rule for Stable Diffusion, sample by sample."""
    assert scale.pulls is not None
    return g * (scale.pulls.to(g) / rms)[:, None]


# From gradients (N, n) and their rms (N,) to updates of the clean estimate with strength 1; all sample by sample.
NORMALISERS: dict[str, Callable[[Tensor, Tensor, Scale], Tensor]] = {
    "none": lambda g, rms, scale: g,
    "unit": lambda g, rms, scale: g / (rms * g.shape[1] ** 0.5)[:, None],
    "residual": _residual,
    "cfg": _cfg,
    "step": lambda g, rms, scale: g * (scale.noise * (scale.at.sigma / scale.at.alpha.clamp(min=0.02)).to(g) / rms)[:, None],
    "uncertainty": lambda g, rms, scale: g * (uncertainty(scale.at).to(g) / rms)[:, None],
    "clip": lambda g, rms, scale: g / rms.clamp(min=1)[:, None],
    "adam": lambda g, rms, scale: g,  # by its moments, see `Moments`
}
BETAS = {"beta1": 0.9, "beta2": 0.999}  # of "adam"
# Shares of a strength along the grid, from (alpha / alpha')^2 of a step.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda kept: 1.0,
    "increase": lambda kept: kept,
    "decrease": lambda kept: 1 - kept,
}


def uncertainty(at: Level) -> Tensor:
    """``sigma / sqrt(alpha^2 + sigma^2)``: what a clean estimate may be wrong by, for data of unit variance."""
    return at.sigma / (at.alpha**2 + at.sigma**2).sqrt()


@dataclass(frozen=True)
class Guidance:
    """The clean estimate is moved by ``clean * N(g0) + network * N(gx) / alpha``; the next state follows.

    g0 is the gradient of the (smoothed) reward at the clean estimate, taken `iterations` times; gx is that with respect to the
    state, through the network and classifier-free guidance (N is the normaliser, without the division for "uncertainty"). A
    heuristic; together with particles that carry weights it leaves their target unchanged, since the weights know what was
    moved. With both strengths 0 nothing is changed, and no gradient taken. The parametrisation is that of TFG (Ye et al., 2024,
    arXiv 2409.15761), which the other methods are cases of.

    Cost: at a guided step ``draws * iterations`` decodes and rewards forwards and backwards a row; through the network `draws`,
    and the network backwards; a recurrence takes the step again.

    Args:
        clean: strength at x0, without a pass back through the network.
        network: strength through the network.
        normaliser: none | unit | residual (DPS) | cfg (of the size of what classifier-free guidance changed in the noise
            estimate; for pipelines that are under it) | step (of the size of the noise) | uncertainty (a share of what the
            estimate may be wrong by) | clip (rms at most 1) | adam (moments over the steps; Belardi et al., 2026, arXiv
            2603.16797).
        schedule: constant | increase | decrease along the run, the mean being the strength.
        iterations: steps at x0.
        recurrence: times that a step is taken, noise being added again in between.
        smoothing: standard deviation of the noise that x0 is smoothed by, in shares of its uncertainty.
        draws: of that noise.
        highest, lowest: the noise levels ``t = sigma / (alpha + sigma)`` that are guided. Below 0.25, CLIP's gradient at x0
            pleased CLIP and spoilt pictures of the embedded model.
        every: only each so many steps.
        beta1, beta2: what of the moments of "adam" stays at each step; its authors tune them, down to 0.03 and 0.

    Raises:
        DiffsteerError: a value out of its range; moments that no normaliser reads.
    """

    clean: float = setting(0.3, low=0)
    network: float = setting(0.0, low=0)
    normaliser: str = setting("uncertainty", choices=tuple(NORMALISERS))
    schedule: str = setting("constant", choices=tuple(SCHEDULES))
    iterations: int = setting(1, low=1)
    recurrence: int = setting(1, low=1)
    smoothing: float = setting(0.0, low=0)
    draws: int = setting(1, low=1)
    highest: float = setting(1.0, low=0, high=1)
    lowest: float = setting(0.25, low=0, high=1)
    every: int = setting(1, low=1)
    beta1: float = setting(BETAS["beta1"], low=0, high=1)
    beta2: float = setting(BETAS["beta2"], low=0, high=1)

    def __post_init__(self) -> None:
        whole = {name: getattr(self, name) for name in ("iterations", "recurrence", "draws", "every")}
        real = {name: getattr(self, name) for name in ("clean", "network", "smoothing", "highest", "lowest", *BETAS)}
        check_numbers("guidance: ", whole, real)
        for name, value in whole.items():
            if value < 1:
                raise DiffsteerError(f"guidance: {name}={value}; at least 1 is needed")
        for name, value in real.items():
            if not (value >= 0 and math.isfinite(value)):
                raise DiffsteerError(f"guidance: {name}={value}; it must be finite and at least 0")
        for name, value, valid in (("normaliser", self.normaliser, NORMALISERS), ("schedule", self.schedule, SCHEDULES)):
            if value not in valid:
                raise DiffsteerError(f"guidance: {name}={value!r} is unknown; valid: {', '.join(valid)}")
        betas = {name: getattr(self, name) for name in BETAS}
        if max(betas.values()) >= 1:
            raise DiffsteerError(f"guidance: beta1={self.beta1:g}, beta2={self.beta2:g}; both lie in [0, 1)")
        if self.normaliser != "adam" and betas != BETAS:
            raise DiffsteerError(f"guidance: beta1 and beta2 have no effect with normaliser={self.normaliser}: they are adam's")
        if not self.lowest <= self.highest <= 1:
            raise DiffsteerError(
                f"guidance: lowest={self.lowest:g}, highest={self.highest:g}; wanted 0 <= lowest <= highest <= 1"
            )

    def guides(self, step: int, at: Level) -> bool:
        """Is the step with this number (from 0), from this level, guided?"""
        time = float(at.sigma / (at.alpha + at.sigma))
        return max(self.clean, self.network) > 0 and self.lowest <= time <= self.highest and step % self.every == 0

    def moments(self) -> dict[str, Moments]:
        """New ones, for each path, where the normaliser has any."""
        return {path: Moments(self.beta1, self.beta2) for path in ("clean", "network") if self.normaliser == "adam"}

    @property
    def measures_pulls(self) -> bool:
        """Does it want to know what classifier-free guidance does?"""
        return self.normaliser == "cfg" and max(self.clean, self.network) > 0

    def shares(self, levels: Sequence[Level]) -> list[float]:
        """What of a strength each step of a grid has; their mean is 1."""
        kept = [float((a.alpha / b.alpha) ** 2) for a, b in zip(levels[:-1], levels[1:], strict=True)]
        if all(k == 1.0 for k in kept):  # EDM: nothing shrinks, so by what the sample would be on the circle
            circle = [1 / (1 + float(at.sigma) ** 2) for at in levels]
            kept = [a / b for a, b in zip(circle[:-1], circle[1:], strict=True)]
        shares = [SCHEDULES[self.schedule](k) for k in kept]
        mean = sum(shares) / len(shares)
        return [s / mean if mean > 0 else 0.0 for s in shares]


@dataclass
class Moments:
    """Of gradients over the steps of a run, row by row, for ``normaliser="adam"``."""

    beta1: float = BETAS["beta1"]
    beta2: float = BETAS["beta2"]
    first: Tensor = field(default_factory=lambda: torch.empty(0))
    second: Tensor = field(default_factory=lambda: torch.empty(0))
    count: int = 0

    def __call__(self, g: Tensor) -> Tensor:
        """Gradients (N, n) -> their bias-corrected mean by the root of their mean square."""
        if not self.count:
            self.first, self.second = torch.zeros_like(g), torch.zeros_like(g)
        self.count += 1
        self.first = self.beta1 * self.first + (1 - self.beta1) * g
        self.second = self.beta2 * self.second + (1 - self.beta2) * g.square()
        mean = self.first / (1 - self.beta1**self.count)
        return mean / ((self.second / (1 - self.beta2**self.count)).sqrt() + 1e-8)

    def follow(self, ancestors: Tensor) -> None:
        """Rows have become copies of others, (P, K)."""
        if self.count:
            grouped = (t.view(*ancestors.shape, -1) for t in (self.first, self.second))
            self.first, self.second = (t.flatten(0, 1) for t in reindex(tuple(grouped), ancestors))


def guidance_of(guide: Any, sampler: Any) -> Guidance | None:
    """What guides beside a sampler.

    Raises:
        DiffsteerError: a sampler that guides by itself, none, or what is no guidance.
    """
    if guide is None:
        return None
    if sampler is None or hasattr(sampler, "guidance"):
        raise DiffsteerError("guide= goes beside a sampler that selects, such as FeynmanKac(4); methods that guide stand alone")
    if getattr(guide, "particles", 1) != 1:
        raise DiffsteerError(f"guide= has particles={guide.particles}: they are the sampler's to say")
    found = getattr(guide, "guidance", guide)
    if not isinstance(found, Guidance):
        raise DiffsteerError(f"guide is a Guidance, or a method that has one, not {guide!r}")
    if found.recurrence > 1 and sampler.exact:
        raise DiffsteerError("guidance: recurrence goes with no weighted particles: the law of its states is not known")
    return found


def update(
    guidance: Guidance, gradient: Tensor, scale: Scale, strength: float, through: bool = False, moments: Moments | None = None
) -> tuple[Tensor, int]:
    """By what the clean estimates (N, ...) are to be moved, and how many are left where they are, since their gradient is no
    number.

    Args:
        strength: its share of the step included. through: the gradient went through the network.
    """
    g = gradient.float().flatten(1)
    finite = g.isfinite().all(1)
    g = g.masked_fill(~finite[:, None], 0.0)
    if moments is not None:
        g = moments(g)
    top = g.abs().amax(1).clamp(min=1e-30)  # squares of large numbers, and of small ones, are none in single precision
    rms = top * (g / top[:, None]).square().mean(1).sqrt()
    moved = strength * NORMALISERS[guidance.normaliser](g, rms.clamp(min=1e-30), scale)
    if through and guidance.normaliser != "uncertainty":
        moved = moved / scale.at.alpha.clamp(min=SMALLEST_SIGNAL).to(moved)
    finite &= moved.isfinite().all(1) | (rms == 0)
    moved = moved.masked_fill((~finite | (rms == 0))[:, None], 0.0)
    return moved.view_as(gradient), int((~finite).sum())


def gradient_of(objective: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``objective(x).sum()`` at x (N, ...), and the values (N,), detached. Works inside `torch.inference_mode`,
    provided that the weights on the way are ordinary tensors.

    Raises:
        DiffsteerError: the objective has no gradient.
    """
    # networks that are meant for inference may change in place what a gradient needs: that is then kept
    with torch.inference_mode(False), torch.enable_grad(), allow_mutation_on_saved_tensors():
        leaf = x.clone().detach().requires_grad_(True)
        values = objective(leaf)
        refuse_flat(values)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return gradient, values.detach()


def refuse_flat(values: Tensor) -> None:
    """Refuse rewards that no gradient comes from."""
    if not values.requires_grad:
        raise DiffsteerError("guidance wants a reward with a gradient, and this one has none")


def warn_idle(guidance: Guidance, steps: int) -> None:
    """Say that no step was guided."""
    warn(
        f"guidance: nothing was guided: none of the {steps} steps that could be begins at a noise level between "
        f"{guidance.lowest:g} and {guidance.highest:g}"
    )


def warn_skipped(count: int) -> None:
    """Say that some updates were skipped."""
    if count:
        warn(f"guidance: {count} updates were skipped, since their gradients were no numbers")
