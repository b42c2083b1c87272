"""What all gradient guidance methods share: independent chains, each moved along the gradient of the reward."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from diffsteer.guidance import BETAS, NORMALISERS, Guidance
from diffsteer.samplers.best_of_n import BestOfN
from diffsteer.types import DiffsteerError, setting


@dataclass(frozen=True)
class Guided(BestOfN):
    """Chains under a `Guidance`, which subclasses make of their own parameters; with several the best is chosen at the end.

    Args:
        particles: chains a prompt.
        eta: amount of noise in the transition.
        normaliser: see `Guidance`.
        highest, lowest: the noise levels ``t = sigma / (alpha + sigma)`` that are guided.
        every: only each so many steps.
        beta1, beta2: of ``normaliser="adam"``.
    """

    particles: int = setting(1, low=1)
    normaliser: str = setting("uncertainty", choices=tuple(NORMALISERS))
    highest: float = setting(1.0, low=0, high=1)
    lowest: float = setting(0.0, low=0, high=1)
    every: int = setting(1, low=1)
    beta1: float = setting(BETAS["beta1"], low=0, high=1)
    beta2: float = setting(BETAS["beta2"], low=0, high=1)

    name: ClassVar[str] = "guided"
    needs_grad: ClassVar[bool] = True
    needs_reward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for f in fields(self):  # by the method's own names
            low, high, value = f.metadata.get("low"), f.metadata.get("high"), getattr(self, f.name)
            if low is None or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not (low <= value <= (math.inf if high is None else high)) or math.isinf(value):
                valid = f"at least {low:g} and finite" if high is None else f"between {low:g} and {high:g}"
                raise DiffsteerError(f"{self.name}: {f.name}={value:g}; it must be {valid}")
        try:
            self.guidance  # noqa: B018  # its values are checked where it is made
        except DiffsteerError as error:
            raise DiffsteerError(f"{self.name}: {error}") from error

    @property
    def guidance(self) -> Guidance:
        """The one step that all methods are cases of."""
        shared = {name: getattr(self, name) for name in ("normaliser", "highest", "lowest", "every", *BETAS)}
        return Guidance(**{"clean": 0.0, **shared, **self.own()})

    def own(self) -> dict[str, Any]:
        """What the method makes of its own parameters, as those of a `Guidance`."""
        return {}
