"""One row a search: the tests of `test_searches.py` run over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffsteer import SteeredPipeline
from diffsteer.budget import Budget
from diffsteer.samplers import (
    DNO,
    Beam,
    DepthFirst,
    DFlow,
    Evolutionary,
    FeynmanKac,
    RandomSearch,
    ReNO,
    Rollover,
    SearchOverPaths,
    Stages,
    SuccessiveHalving,
    ZeroOrder,
)
from diffsteer.toy import GaussianMixture
from diffsteer.trial import Search

# name -> (a small one of its kind, does its cost depend on rewards?)
SEARCHES: dict[str, tuple[Any, bool]] = {
    "random_search": (RandomSearch(6), False),
    "random_search with noise": (RandomSearch(6, eta=1.0), False),
    "zero_order": (ZeroOrder(3, 4), False),
    "zero_order partial": (ZeroOrder(3, 4, proposal="partial", patience=1), False),
    "search_over_paths": (SearchOverPaths(2, 2, back=2, ahead=4), False),
    "evolutionary": (Evolutionary((0.0, 0.4), (5, 3, 3), crossover=0.5), False),
    "evolutionary late": (Evolutionary((0.2, 0.5), (4, 3, 3), elites=0), False),
    "beam": (Beam(2, 2), False),
    "beam ahead": (Beam(2, 2, look=3), False),
    "depth_first": (DepthFirst(chains=2), True),
    "rollover": (Rollover(4, 2), True),
    "rollover in pairs": (Rollover(4, 3, batch=2), True),
    "successive_halving": (SuccessiveHalving(6), False),
    "reno": (ReNO(iterations=4, rate=0.3, patience=0), False),
    "reno cut": (ReNO(iterations=4, noises=2, through=3, patience=0, checkpoint=False), False),
    "dno": (DNO(iterations=3, patience=0), False),
    "dno without noise": (DNO(iterations=3, eta=0.0, patience=0), False),
    "dno black box": (DNO(iterations=3, black_box=True, perturbations=2, patience=0), False),
    "d_flow": (DFlow(iterations=5), True),
    "stages": (Stages([ZeroOrder(2, 2), FeynmanKac(3), DNO(iterations=2)]), False),
}
# Searches that come down to one plain chain.
PLAIN: dict[str, Any] = {
    "random_search": RandomSearch(1),
    "search_over_paths": SearchOverPaths(1, 1, first=0.999),
    "beam": Beam(1, 1),
    "depth_first": DepthFirst(chains=1, retries=0),
    "rollover": Rollover(1, 1),
    "successive_halving": SuccessiveHalving(1),
    "reno": ReNO(iterations=1),
    "dno": DNO(iterations=1),
    "d_flow": DFlow(iterations=1),
    "stages": Stages([RandomSearch(1)]),
}

MODEL = GaussianMixture([-1.0, 0.8], [0.35, 0.5]).model("vp")
STEPS = 12


def reward(x: Tensor, prompts: object) -> Tensor:
    return -(x[:, 0] - 1.6).square()


def peaks(z: Tensor) -> Tensor:
    return -(z - 0.7).square().flatten(1).mean(1)


def played(search: Search, prompts: Sequence[str], budget: Budget | None = None, model: Any = MODEL, **options: Any) -> Any:
    """A search of prompts on a toy, without drafts unless they are given."""
    call = {key: options.pop(key) for key in ("ids", "seed", "watch", "num_inference_steps") if key in options}
    steered = SteeredPipeline(model, search, options.pop("reward", reward), budget=budget, **{"draft": False, **options})
    return steered(list(prompts), **{"num_inference_steps": STEPS, "seed": 3, **call})
