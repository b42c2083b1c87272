"""Random search: N independent noises, the best chosen; by default on drafts, of which the best few are made again in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.trial import Arena, Asking, Search
from diffsteer.types import setting


@dataclass(frozen=True)
class RandomSearch(Search):
    """Independent noises, best of N at its fairest: drafted cheaply, the best few rendered in full and ranked anew.

    A heuristic: the chosen sample has no stated law. With one candidate and no drafts it is the plain deterministic chain.

    Cost: N chains of drafts, and the finalists in full.

    Args:
        candidates: N; with a budget, as many at a time, as often as it pays for.
    """

    candidates: int = setting(16, low=1)

    name: ClassVar[str] = "random_search"
    drafts: ClassVar[bool] = True
    source: ClassVar[str] = "Ma et al., 2025, arXiv 2501.09732, section 3; drafts: Flash-BoN, 2026, arXiv 2607.04461"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(candidates=(1, None))

    def search(self, arena: Arena) -> Asking:
        yield arena.fresh(arena.draw(self.candidates))
        if arena.purse.limited:
            while True:
                yield arena.fresh(arena.draw(self.candidates))

    def evaluations(self, steps: int) -> int:
        return self.candidates * steps
