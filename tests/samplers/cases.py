"""One row a method: the tests of this folder run over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffsteer.samplers import (
    DPS,
    LGD,
    MPGD,
    TFG,
    BestOfN,
    EpsilonScaling,
    FeynmanKac,
    FreeDoM,
    TimeShift,
    UniversalGuidance,
)
from diffsteer.types import Sampler

EARLY = (0.2, 0.4, 0.6, 0.8)  # more events than the default has, so that there is more to get wrong
FIXED: dict[str, Any] = {"scale": 1.0, "target_ess": None, "events": EARLY}

# name -> (a sampler with K particles, does it select on the way?)
CASES: dict[str, tuple[Callable[[int], Sampler], bool]] = {
    "fk": (lambda k: FeynmanKac(k), True),
    "fk fixed lambda": (lambda k: FeynmanKac(k, **FIXED), True),
    "best_of_n": (lambda k: BestOfN(k), False),
    "dps": (lambda k: DPS(k, normaliser="unit"), False),
    "lgd": (lambda k: LGD(k, draws=3), False),
    "mpgd": (lambda k: MPGD(k), False),
    "tfg": (lambda k: TFG(k, network=0.1, clean=0.1, iterations=2), False),
    "universal": (lambda k: UniversalGuidance(k), False),
    "freedom": (lambda k: FreeDoM(k, normaliser="uncertainty"), False),
    # the toy's samples have one element and no variance: with a window it is tried in test_time_shift.py
    "time_shift": (lambda k: TimeShift(k, eta=1.0, window=0.0), False),
    "epsilon_scaling": (lambda k: EpsilonScaling(k, eta=1.0), False),
}
# Methods that change the chain itself, switched off.
OFF: dict[str, Sampler] = {
    "dps": DPS(strength=0.0),
    "lgd": LGD(strength=0.0),
    "mpgd": MPGD(strength=0.0),
    "tfg": TFG(network=0.0, clean=0.0),
    "universal": UniversalGuidance(forward=0.0, backward=0.0),
    "freedom": FreeDoM(strength=0.0, normaliser="uncertainty"),
    "time_shift": TimeShift(window=0.0, eta=1.0),
    "epsilon_scaling": EpsilonScaling(scale=1.0, eta=1.0),
}
