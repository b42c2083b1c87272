"""Successive halving: many chains begun, the worse part given up at every event, few finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffsteer.trial import Arena, Asking, Search, Trial
from diffsteer.types import setting


@dataclass(frozen=True)
class SuccessiveHalving(Search):
    """Successive halving of chains (Jamieson & Talwalkar, 2016, arXiv 1502.07943, a step of the chain being the resource).

    All noises are carried to the first event, scored by their clean estimates, and one in `rate` goes on to the next; the
    survivors are finished and scored as samples. No state is copied: with eta = 0 every survivor is the plain chain of its own
    noise. With `rate` 1 it is random search.

    A heuristic. Cost: ``sum_i n_i (e_(i+1) - e_i)`` evaluations with ``n_(i+1) = ceil(n_i / rate)``; with a budget it begins
    anew until that is spent.

    Args:
        candidates: n_0.
        rate: one in so many goes on, at least 1.
        events: shares of the chain, rising, in (0, 1).
        eta: amount of noise in the transition.
    """

    candidates: int = setting(16, low=1)
    rate: float = setting(2.0, low=1)
    events: Sequence[float] = (0.3, 0.5)
    eta: float = setting(0.0, low=0, high=1)

    name: ClassVar[str] = "successive_halving"
    cuts: ClassVar[bool] = True
    source: ClassVar[str] = "Jamieson & Talwalkar, 2016, arXiv 1502.07943"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(candidates=(1, None), rate=(1, None), eta=(0, 1))
        self.check_shares("events")

    @property
    def of_noise(self) -> bool:
        """Without noise on the way."""
        return self.eta == 0

    def search(self, arena: Arena) -> Asking:
        stops: list[int | None] = [*arena.events(self.events), None]
        for _ in arena.rounds(1):
            number = self.candidates
            while number > 1 and not arena.pays(*self._plan(arena.steps, number)):  # what is left pays for fewer to the end
                number -= 1
            trials = [Trial(z, 0, stops[0], True, eta=self.eta) for z in arena.begin(number)]
            for stop in stops[1:]:
                told = yield trials
                alive = arena.order(told)[: max(1, -int(-len(told) // self.rate))]
                trials = [outcome.onward(stop, eta=self.eta) for outcome in alive]
            yield trials

    def _plan(self, steps: int, alive: int) -> list[tuple[Trial, int]]:
        """The rounds of a pass: one of its trials each, and how many."""
        at = [0, *sorted({min(steps - 1, max(1, round(s * steps))) for s in self.events} - {0, steps}), steps]
        plan = []
        for begun, stop in zip(at, at[1:], strict=False):
            plan.append((Trial(torch.empty(0), begun, stop, fresh=begun == 0), alive))
            alive = max(1, -int(-alive // self.rate))
        return plan

    def evaluations(self, steps: int) -> int:
        return sum(((t.stop or 0) - t.start) * number for t, number in self._plan(steps, self.candidates))
