"""One row a method: the tests of this folder run over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.types import Sampler

FIXED: dict[str, Any] = {"scale": 1.0, "target_ess": None}

# name -> (a sampler with K particles, does it select on the way?)
CASES: dict[str, tuple[Callable[[int], Sampler], bool]] = {
    "fk": (lambda k: FeynmanKac(k), True),
    "fk fixed lambda": (lambda k: FeynmanKac(k, **FIXED), True),
    "best_of_n": (lambda k: BestOfN(k), False),
}
