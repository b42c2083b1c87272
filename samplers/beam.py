"""Beam search: of B states and K continuations each the best B go on, scored some deterministic steps ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffsteer.trial import Arena, Asking, Search, Trial
from diffsteer.types import setting


@dataclass(frozen=True)
class Beam(Search):
    """Beams over a stochastic chain, with look-ahead (Oshima et al., 2025, arXiv 2501.19252, "DLBS").

    At every event each beam is continued by `branches` chains of other noise; the B best of all go on. What is scored is the
    clean estimate after `look` further deterministic steps. With one branch and one beam it is the plain stochastic chain.

    A heuristic. Cost: ``T B K + events B K look`` evaluations (B K chains in all between events; the first B K noises are
    independent); with a budget it begins anew until that is spent.

    Args:
        beams: B. branches: K.
        events: shares of the chain, rising, in (0, 1).
        look: T', deterministic steps ahead for the score; 0 scores the clean estimate as it is.
        eta: amount of noise in the transition, in (0, 1]: without noise branches never part.
    """

    beams: int = setting(2, low=1)
    branches: int = setting(4, low=1)
    events: Sequence[float] = (0.2, 0.4, 0.6)
    look: int = setting(0, low=0)
    eta: float = setting(1.0, low=0, high=1)

    name: ClassVar[str] = "beam"
    cuts: ClassVar[bool] = True
    source: ClassVar[str] = "Oshima et al., 2025, arXiv 2501.19252"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(beams=(1, None), branches=(1, None), look=(0, None), eta=(1e-6, 1))
        self.check_shares("events")

    def search(self, arena: Arena) -> Asking:
        events = arena.events(self.events)
        for _ in arena.rounds(1):
            first, look = (events[0], self.look) if events else (None, 0)
            beams, branches = self._wide(arena)
            trials = [Trial(z, 0, first, True, look, self.eta) for z in arena.begin(beams * branches)]
            for k in range(len(events)):
                told = yield trials
                best = arena.order(told)[:beams]
                stop = events[k + 1] if k + 1 < len(events) else None
                look = self.look if stop is not None else 0
                trials = [b.onward(stop, eta=self.eta, look=look) for b in best for _ in range(branches)]
            yield trials

    def _wide(self, arena: Arena) -> tuple[int, int]:
        """Beams and branches; fewer where the budget's rest pays for no more of them to the end."""
        beams, branches = self.beams, self.branches
        looks = [Trial(torch.empty(0), e - 1, e, look=self.look) for e in arena.events(self.events)]
        whole = Trial(torch.empty(0), fresh=True)
        while beams * branches > 1 and not arena.pays((whole, beams * branches), *((t, beams * branches) for t in looks)):
            beams, branches = (beams, branches - 1) if branches > 1 else (beams - 1, branches)
        return beams, branches

    def evaluations(self, steps: int) -> int:
        events = sorted({min(steps - 1, max(1, round(s * steps))) for s in self.events} - {0, steps})
        looked = sum(min(self.look, steps - e) for e in events)
        return self.beams * self.branches * (steps + looked)
