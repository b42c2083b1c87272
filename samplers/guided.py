"""What all gradient guidance methods share: independent chains, each moved along the gradient of the reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.guidance import Guidance
from diffsteer.samplers.best_of_n import BestOfN
from diffsteer.types import DiffsteerError, setting


@dataclass(frozen=True)
class Guided(BestOfN):
    """Chains under a `Guidance`, which subclasses make of their own parameters; with several the best is chosen at the end."""

    particles: int = setting(1, low=1)

    name: ClassVar[str] = "guided"
    needs_grad: ClassVar[bool] = True
    needs_reward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.guidance  # noqa: B018  # its values are checked where it is made
        except DiffsteerError as error:
            raise DiffsteerError(f"{self.name}: {error}") from error

    @property
    def guidance(self) -> Guidance:
        """The one step that all methods are cases of."""
        raise NotImplementedError
