"""Rollover Budget Forcing: at every step children are tried until one is better, and what is left of the quota rolls over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.trial import Arena, Asking, Outcome, Search, Trial
from diffsteer.types import setting


@dataclass(frozen=True)
class Rollover(Search):
    """Rollover Budget Forcing (Kim et al., 2025, arXiv 2503.19385): a quota of children a step.

    Of the first noises the best, by its clean estimate, is carried on. A child is one transition with noise of its own, which
    costs nothing, and the look at its clean estimate, one evaluation. As soon as a child beats the best reward so far it is
    taken, and what is left of the step's quota is added to the next one's; when the quota is used up the best child is taken.
    With a quota of 1 and one first noise it is the plain stochastic chain.

    A heuristic. Cost: at most ``first + quota (T - 1)`` evaluations; with a budget it begins anew until that is spent.
    ``noise=quadratic`` of the pipeline is the authors' amount for flows.

    Args:
        first: noises that the first step looks at. quota: children a step.
        batch: children that are looked at together: more is faster on an accelerator, and may look at some in vain.
        eta: amount of noise in the transition, in (0, 1].
    """

    first: int = setting(16, low=1)
    quota: int = setting(4, low=1)
    batch: int = setting(1, low=1)
    eta: float = setting(1.0, low=0, high=1)

    name: ClassVar[str] = "rollover"
    cuts: ClassVar[bool] = True
    source: ClassVar[str] = "Kim et al., 2025, arXiv 2503.19385"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(first=(1, None), quota=(1, None), batch=(1, None), eta=(1e-6, 1))

    def search(self, arena: Arena) -> Asking:
        for _ in arena.rounds(1):
            here = record = arena.best((yield [Trial(z, 0, 1, True, eta=self.eta) for z in arena.begin(self.first)]))
            quota = 0
            for k in range(arena.steps - 1):  # `here` began at index k, and its x0 is the clean estimate there
                quota += self.quota
                children: list[Outcome] = []
                while quota > 0 and record not in children:
                    number = min(self.batch, quota)
                    quota -= number
                    states = [arena.stepped(here.begun, here.x0, k, self.eta, z) for z in arena.draw(number)]
                    line = {**here.line, "path": ()}  # its noise had no number
                    children += yield [Trial(x, k + 1, k + 2, eta=self.eta, **line) for x in states]
                    record = arena.best([record, *children])
                here = record if record in children else arena.best(children)
            if not here.final:
                yield [here.onward(None, eta=self.eta)]

    def evaluations(self, steps: int) -> int:
        """The most: every quota used up."""
        return self.first + self.quota * (steps - 1)
