"""One row a method: the tests of this folder run over them."""

from __future__ import annotations

from diffsteer.samplers import BestOfN, FeynmanKac

FIXED = {"scale": 1.0, "target_ess": None}

# name -> (a sampler with K particles, does it select on the way?)
CASES = {
    "fk": (lambda k: FeynmanKac(k), True),
    "fk fixed lambda": (lambda k: FeynmanKac(k, **FIXED), True),
    "best_of_n": (lambda k: BestOfN(k), False),
}
