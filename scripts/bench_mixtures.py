"""Searches where the optimum is known: regret on products of two-humped mixtures at 16, 64 and 256 evaluations.

    python scripts/bench_mixtures.py        the table (a few minutes)

A flow of four steps over four independent mixtures; the reward is minus the squared distance to a point in one of their sixteen
modes, and regret is what the best sample lacks to its maximum, 0. Means over 200 seeds; best of N's regret on the same seeds is
subtracted pair by pair. Intervals are 95 %, by bootstrap. Passes back are not counted as evaluations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bench_quality import interval
from bench_search import signed

from diffsteer import SteeredPipeline
from diffsteer.algebra import level
from diffsteer.budget import Budget
from diffsteer.callable import CallableModel
from diffsteer.draft import Draft
from diffsteer.samplers import (
    DNO,
    Beam,
    DepthFirst,
    DFlow,
    Evolutionary,
    RandomSearch,
    ReNO,
    Rollover,
    SearchOverPaths,
    Stages,
    SuccessiveHalving,
    ZeroOrder,
)
from diffsteer.toy import GaussianMixture

STEPS, DIMENSIONS, TRIES = 4, 4, 200


def mixtures() -> None:
    hump = GaussianMixture([-1.5, 1.5], [0.4, 0.4])

    def fn(x: torch.Tensor, t: torch.Tensor, conditions: list[Any]) -> torch.Tensor:
        at = level(1 - t.double(), t.double())
        each = [hump.clean(x[:, d : d + 1], at) for d in range(DIMENSIONS)]
        x0 = torch.cat(each, 1)
        return ((x.double() - (1 - t.double())[:, None] * x0) / t.double()[:, None] - x0).to(x.dtype)

    target = torch.tensor([1.7, -1.2, 1.3, -1.9])
    reward = lambda x, prompts: -(x - target.to(x)).square().sum(1)  # noqa: E731  # its best value is 0
    model = CallableModel(fn, "velocity", "flow", (DIMENSIONS,))
    searches: dict[str, Any] = {
        "best of N": RandomSearch(16),
        "zero_order": ZeroOrder(),
        "search_over_paths": SearchOverPaths(2, 4, first=0.5, back=1, ahead=2),
        "evolutionary": Evolutionary((0.0, 0.5), (4, 4, 4)),
        "beam": Beam(2, 2, events=(0.5,)),
        "depth_first": DepthFirst((0.5,), back=1),
        "rollover": Rollover(4, 2),
        "successive_halving": SuccessiveHalving(4, events=(0.5,)),
        "drafts": RandomSearch(16),
        "reno": ReNO(checkpoint=False),
        "d_flow": DFlow(checkpoint=False),
        "dno": DNO(checkpoint=False),
        "stages": Stages([RandomSearch(4), ZeroOrder()]),
    }
    found: dict[tuple[str, int], np.ndarray] = {}
    for name, search in searches.items():
        draft = Draft(steps=2, finalists=2) if name == "drafts" else False
        for evals in (16, 64, 256):
            steered = SteeredPipeline(model, search, reward, budget=Budget(evals=evals), draft=draft)
            out = steered(["x"] * TRIES, num_inference_steps=STEPS, seed=0)
            if out.interrupted:
                raise KeyboardInterrupt
            found[name, evals] = -out.rewards.max(1).values.numpy()
    print("| search | " + " | ".join(f"regret at {e} (95 %), against best of N" for e in (16, 64, 256)) + " |")
    print("|" + "---|" * 4)
    for name in searches:
        cells = []
        for evals in (16, 64, 256):
            mine, base = found[name, evals], found["best of N", evals]
            who = [str(i) for i in range(TRIES)]
            m, low, high = interval(mine, who)
            against = "" if name == "best of N" else ", " + signed(interval(mine - base, who))
            cells.append(f"{m:.3f} ({low:.3f}, {high:.3f}){against}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    mixtures()
