"""Depth-first search: one chain, which goes back a way and tries again where it looks worse than it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from diffsteer.trial import Arena, Asking, Outcome, Search, Trial
from diffsteer.types import setting


@dataclass(frozen=True)
class DepthFirst(Search):
    """Backtracking by thresholds (Zhang et al., 2025, arXiv 2505.23614, "DFS").

    At every check the clean estimate is scored. Below the check's threshold the chain is noised again up to `back` steps before
    the check and tries once more, `retries` times at most, after which the best try goes on. Hard prompts so get more
    evaluations by themselves.

    A heuristic. Cost: T evaluations a chain, and `back` more a retry; with a budget chains begin anew until it is spent.

    Args:
        checks: shares of the chain, rising, in (0, 1).
        threshold: a reward; None is the running quantile of what chains had at that check, its first visit included.
        quantile: of that, in (0, 1): 0.5 tries again wherever a chain is below its predecessors' median.
        back: steps. retries: a check.
        chains: without a budget.
        eta: amount of noise in the transition.
    """

    checks: Sequence[float] = (0.3, 0.6)
    threshold: float | None = None
    quantile: float = setting(0.6, low=0, high=1)
    back: int = setting(6, low=1)
    retries: int = setting(3, low=0)
    chains: int = setting(4, low=1)
    eta: float = setting(1.0, low=0, high=1)

    name: ClassVar[str] = "depth_first"
    cuts: ClassVar[bool] = True
    numbers: ClassVar[bool] = True
    source: ClassVar[str] = "Zhang et al., 2025, arXiv 2505.23614"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(quantile=(0, 1), back=(1, None), retries=(0, None), chains=(1, None), eta=(0, 1))
        self.check_shares("checks")

    def search(self, arena: Arena) -> Asking:
        checks = arena.events(self.checks)
        seen: dict[int, list[float]] = {c: [] for c in checks}
        for turn in arena.rounds(self.chains):
            z = arena.begin(1)[0] if turn == 0 else arena.draw(1)[0]
            trial = Trial(z, 0, checks[0] if checks else None, True, eta=self.eta)
            for k, check in enumerate(checks):
                best: Outcome | None = None
                for attempt in range(self.retries + 1):
                    told = (yield [trial])[0]
                    best = told if best is None else arena.best([best, told])
                    seen[check].append(told.reward)
                    if told.reward >= self._wanted(seen[check]) or attempt == self.retries:
                        break
                    start = max(0, check - self.back)
                    x = arena.noised(best.x, check, start, arena.draw(1)[0])
                    trial = Trial(x, start, check, eta=self.eta, **best.line)
                assert best is not None
                stop = checks[k + 1] if k + 1 < len(checks) else None
                trial = best.onward(stop, eta=self.eta)
            yield [trial]

    def _wanted(self, seen: list[float]) -> float:
        """The threshold, of rewards at the same check."""
        if self.threshold is not None:
            return self.threshold
        known = sorted(v for v in seen if v == v)
        return known[min(len(known) - 1, int(self.quantile * len(known)))] if known else float("-inf")

    def evaluations(self, steps: int) -> int:
        """The most: every retry taken."""
        checks = sorted({min(steps - 1, max(1, round(s * steps))) for s in self.checks} - {0, steps})
        return self.chains * (steps + self.retries * sum(min(self.back, c) for c in checks))
