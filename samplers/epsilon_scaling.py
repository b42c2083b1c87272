"""Epsilon scaling: Ning et al. (2023), arXiv 2308.15321."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.samplers.best_of_n import BestOfN
from diffsteer.timing import ORDERS, Timing
from diffsteer.types import DiffsteerError, setting


@dataclass(frozen=True)
class EpsilonScaling(BestOfN):
    """The predicted noise is divided by a constant: states that drifted make networks predict too much of it.

    A heuristic against exposure bias, and the simplest one. With ``scale=1`` the plain chain, bit for bit at order 1.

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

    particles: int = setting(1, low=1)
    eta: float = setting(0.0, low=0, high=1)
    scale: float = setting(1.005, low=0)
    order: int = setting(1, low=min(ORDERS), high=max(ORDERS))

    name: ClassVar[str] = "epsilon_scaling"
    source: ClassVar[str] = "Ning et al., 2023, arXiv 2308.15321"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.timing  # noqa: B018  # its values are checked where it is made
        except DiffsteerError as error:
            raise DiffsteerError(f"{self.name}: {error}") from error
        if self.order > 1 and self.eta > 0:
            raise DiffsteerError(f"{self.name}: order={self.order} is a solver without noise: set eta=0")

    @property
    def timing(self) -> Timing:
        """No shift."""
        return Timing(window=0.0, epsilon_scale=self.scale, order=self.order)
