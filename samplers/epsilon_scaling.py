"""Epsilon scaling: Ning et al. (2023), arXiv 2308.15321."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.samplers.timed import Timed
from diffsteer.timing import Timing
from diffsteer.types import setting


@dataclass(frozen=True)
class EpsilonScaling(Timed):
    """The predicted noise is divided by a constant: states that drifted make networks predict too much of it.

    A heuristic against exposure bias, and the simplest one. With ``scale=1`` the plain chain, bit for bit at order 1. With any
    other scale the noise follows from the estimate that a scheduler has clipped, where it clips (clip_sample).

    Cost: that of the plain chain, 1 evaluation more at order 2 and 9 more at order 4.

    Args:
        particles: chains a prompt; the best is chosen if there is a reward.
        eta: amount of noise in the transition: 0 is DDIM, 1 DDPM.
        scale: a little above 1; the paper has 1.0003 to 1.03, more for fewer steps.
        order: 1; 2 (S-PNDM) or 4 (F-PNDM), see `TimeShift`.

    Raises:
        DiffsteerError: a value out of its range.
        UnsupportedError: a model whose rows cannot be at levels of their own.
    """

    scale: float = setting(1.005, low=0)

    name: ClassVar[str] = "epsilon_scaling"
    source: ClassVar[str] = "Ning et al., 2023, arXiv 2308.15321"

    @property
    def timing(self) -> Timing:
        """No shift."""
        return Timing(window=0.0, epsilon_scale=self.scale, order=self.order)
