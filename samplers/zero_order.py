"""Zero-order search: neighbours of the best noise so far, whose score is remembered; steps that adapt, restarts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.proposals import PROPOSALS, proposal_of
from diffsteer.trial import Arena, Asking, Search
from diffsteer.types import setting


@dataclass(frozen=True)
class ZeroOrder(Search):
    """Hill climbing in noise space (Ma et al., 2025, arXiv 2501.09732, section 3.2), with what that leaves open decided here.

    The incumbent keeps its score, so a round costs its neighbours alone, and the best so far never falls. After `patience`
    rounds without a gain the next round is one of fresh noises, of which the best becomes the incumbent. The step grows by 1.22
    where more than a fifth of the neighbours were better, and else shrinks by 0.82 (Rechenberg's rule).

    A heuristic. With ``step=1`` and without adaptation it is random search.

    Cost: ``1 + rounds * neighbours`` chains; with a budget, rounds until it is spent.

    Args:
        neighbours: N, a round. rounds: K.
        step: s in (0, 1], the cosine of neighbours being sqrt(1 - s^2): 0.31 is a cosine of 0.95.
        proposal: rotation | mix | redraw | partial, see `diffsteer.proposals`.
        patience: rounds without a gain before a restart; 0 never restarts.
        adapt: the step follows the share of better neighbours.
    """

    neighbours: int = setting(4, low=1)
    rounds: int = setting(8, low=1)
    step: float = setting(0.31, low=0, high=1)
    proposal: str = setting("rotation", choices=tuple(PROPOSALS))
    patience: int = setting(2, low=0)
    adapt: bool = True

    name: ClassVar[str] = "zero_order"
    source: ClassVar[str] = "Ma et al., 2025, arXiv 2501.09732, section 3.2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(neighbours=(1, None), rounds=(1, None), step=(1e-6, 1), patience=(0, None))
        proposal_of(self.proposal)

    def search(self, arena: Arena) -> Asking:
        propose, step, failed = proposal_of(self.proposal), self.step, 0
        first = yield arena.fresh(arena.begin(1))
        incumbent = first[0]
        for _ in arena.rounds(self.rounds):
            assert incumbent.root is not None
            drawn = arena.draw(self.neighbours)
            restart = bool(self.patience) and failed >= self.patience
            noises = drawn if restart else [propose(incumbent.root, z, step, arena.chance) for z in drawn]
            told = yield arena.fresh(noises)
            if restart:
                incumbent, failed, step = arena.best(told), 0, self.step
                continue
            order = arena.order([incumbent, *told])
            better = order.index(incumbent)
            failed = 0 if better else failed + 1
            incumbent = order[0]
            if self.adapt:
                step = min(1.0, step * (1.22 if better > len(told) / 5 else 0.82))

    def evaluations(self, steps: int) -> int:
        return (1 + self.rounds * self.neighbours) * steps
