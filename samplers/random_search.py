"""Random search: N independent noises, the best chosen; by default on drafts, of which the best few are made again in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.trial import Arena, Asking, Search
from diffsteer.types import setting


@dataclass(frozen=True)
class RandomSearch(Search):
    """Independent noises, best of N at its fairest: drafted cheaply, the best few rendered in full and ranked anew.

    With noise on the way (eta > 0) no draft could be made again from its first noise, and there are none: it is `BestOfN` with
    a budget. A heuristic: the chosen sample has no stated law. With one candidate and no drafts it is the plain chain.

    Cost: N chains of drafts, and the finalists in full.

    Args:
        candidates: N; with a budget, as many at a time, as often as it pays for.
        eta: amount of noise in the transition.
    """

    candidates: int = setting(16, low=1)
    eta: float = setting(0.0, low=0, high=1)

    name: ClassVar[str] = "random_search"
    source: ClassVar[str] = "Ma et al., 2025, arXiv 2501.09732, section 3; drafts: Flash-BoN, 2026, arXiv 2607.04461"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(candidates=(1, None), eta=(0, 1))

    @property
    def drafts(self) -> bool:  # type: ignore[override]
        """Where they can be made again."""
        return self.eta == 0

    @property
    def of_noise(self) -> bool:
        """Without noise on the way."""
        return self.eta == 0

    def search(self, arena: Arena) -> Asking:
        yield arena.fresh(arena.draw(self.candidates), eta=self.eta)
        if arena.purse.limited:
            while True:
                yield arena.fresh(arena.draw(self.candidates), eta=self.eta)

    def evaluations(self, steps: int) -> int:
        return self.candidates * steps
