"""What methods share that take rows at levels of their own: independent chains under a `Timing`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.samplers.best_of_n import BestOfN
from diffsteer.timing import ORDERS, Timing
from diffsteer.types import DiffsteerError, setting


@dataclass(frozen=True)
class Timed(BestOfN):
    """Chains under a `Timing`, which subclasses make of their own parameters; with several the best is chosen at the end."""

    particles: int = setting(1, low=1)
    eta: float = setting(0.0, low=0, high=1)
    order: int = setting(1, low=min(ORDERS), high=max(ORDERS))

    name: ClassVar[str] = "timed"

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
        """How levels are read."""
        return Timing(window=0.0, order=self.order)
