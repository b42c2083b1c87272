"""Gradient guidance: the clean estimate is moved along the gradient of a reward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors

from diffsteer.algebra import Level
from diffsteer.types import DiffsteerError, check_numbers, setting

PATHS = ("x0", "network")


@dataclass(frozen=True)
class Guidance:
    """``x0' = x0 + strength * s * g / rms(g)``, g being the gradient of the reward of the clean estimate, sample by sample.

    ``s = sigma / sqrt(alpha^2 + sigma^2)`` is what the clean estimate may be wrong by, for data of unit variance: the strength
    is a share of it, whatever the reward's scale, and the guidance fades as the sample becomes clear. A heuristic, like
    MPGD (He et al., 2023, arXiv 2311.16424: the gradient at x0, no pass back through the network) or, ``through="network"``, of
    DPS (Chung et al., 2022, arXiv 2209.14687). With ``strength=0`` nothing is changed, and no gradient taken.

    Cost: at each guided step the decoder and the reward forwards and backwards; through the network that too.

    Args:
        strength: of the update, in shares of the uncertainty; 0.1 to 1 are usual.
        through: x0 | network, where the gradient is taken.
        start, stop: the part of the run that is guided, in [0, 1].
        every: only each so many steps.

    Raises:
        DiffsteerError: a value out of its range.
    """

    strength: float = setting(0.3, low=0)
    through: str = setting("x0", choices=PATHS)
    start: float = setting(0.1, low=0, high=1)
    stop: float = setting(0.9, low=0, high=1)
    every: int = setting(1, low=1)

    def __post_init__(self) -> None:
        real = {"strength": self.strength, "start": self.start, "stop": self.stop}
        check_numbers("guidance: ", {"every": self.every}, real)
        if not (self.strength >= 0 and math.isfinite(self.strength)):
            raise DiffsteerError(f"guidance: strength={self.strength}; it must be finite and at least 0")
        if self.through not in PATHS:
            raise DiffsteerError(f"guidance: through={self.through!r} is unknown; valid: {', '.join(PATHS)}")
        if not 0 <= self.start <= self.stop <= 1:
            raise DiffsteerError(f"guidance: start={self.start:g}, stop={self.stop:g}; wanted 0 <= start <= stop <= 1")
        if self.every < 1:
            raise DiffsteerError(f"guidance: every={self.every}; at least 1 is needed")

    def guides(self, step: int, steps: int) -> bool:
        """Is the step with this number (from 0) guided?"""
        first = math.ceil(self.start * steps)
        return self.strength > 0 and first <= step < self.stop * steps and (step - first) % self.every == 0

    def move(self, x0: Tensor, gradient: Tensor, at: Level) -> tuple[Tensor, int]:
        """The moved clean estimates (N, ...), and how many were left where they are, since their gradient is no number."""
        g = gradient.float().flatten(1)
        finite = g.isfinite().all(1) & x0.flatten(1).isfinite().all(1)
        rms = g.square().mean(1).sqrt()
        live = finite & (rms > 0)
        uncertainty = at.sigma / (at.alpha**2 + at.sigma**2).sqrt()
        size = torch.where(live, self.strength * uncertainty.to(rms) / rms.clamp(min=1e-30), torch.zeros_like(rms))
        step = size[:, None] * g.nan_to_num(0.0, 0.0, 0.0).masked_fill(~live[:, None], 0.0)
        return x0 + step.view_as(x0).to(x0), int((~finite).sum())


def gradient_of(objective: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``objective(x).sum()`` at x (N, ...), and the values (N,), detached. Works inside `torch.inference_mode`,
    provided that the weights on the way are ordinary tensors."""
    # networks that are meant for inference may change in place what a gradient needs: that is then kept
    with torch.inference_mode(False), torch.enable_grad(), allow_mutation_on_saved_tensors():
        leaf = x.clone().detach().requires_grad_(True)
        values = objective(leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return gradient, values.detach()


def warn_skipped(count: int) -> None:
    """Say that some updates were skipped."""
    if count:
        warnings.warn(f"guidance: {count} updates were skipped, since their gradients were no numbers", stacklevel=3)
