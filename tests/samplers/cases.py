"""One row a method: the tests of this folder run over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.types import Sampler

EARLY = (0.2, 0.4, 0.6, 0.8)  # more events than the default has, so that there is more to get wrong
FIXED: dict[str, Any] = {"scale": 1.0, "target_ess": None, "events": EARLY}

# name -> (a sampler with K particles, does it select on the way?)
CASES: dict[str, tuple[Callable[[int], Sampler], bool]] = {
    "fk": (lambda k: FeynmanKac(k), True),
    "fk fixed lambda": (lambda k: FeynmanKac(k, **FIXED), True),
    "best_of_n": (lambda k: BestOfN(k), False),
}
