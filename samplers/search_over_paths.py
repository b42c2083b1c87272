"""Search over paths: a few paths, again and again noised a little and denoised a little further, the best branches kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.trial import Arena, Asking, Search, Trial
from diffsteer.types import DiffsteerError, setting


@dataclass(frozen=True)
class SearchOverPaths(Search):
    """Local search on the way (Ma et al., 2025, arXiv 2501.09732, section 3.2, "Paths-N").

    N noises are carried to the share `first` of the chain. A round takes each state `back` steps back by fresh noise, M times,
    and carries every branch `ahead` steps on; the clean estimate there is scored and the best N branches go on. At the end the
    paths are finished and the best sample is chosen.

    A heuristic. Cost: ``N n_first + rounds N M ahead + N rest`` evaluations; with a budget it begins anew until that is spent.

    Args:
        paths: N. branches: M, of each path and round.
        first: share of the chain before the first round, in (0, 1).
        back, ahead: steps of the grid; `ahead` is more, or nothing would move on.
    """

    paths: int = setting(2, low=1)
    branches: int = setting(5, low=1)
    first: float = setting(0.2, low=0, high=1)
    back: int = setting(3, low=1)
    ahead: int = setting(5, low=2)

    name: ClassVar[str] = "search_over_paths"
    cuts: ClassVar[bool] = True
    source: ClassVar[str] = "Ma et al., 2025, arXiv 2501.09732, section 3.2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(paths=(1, None), branches=(1, None), first=(0, 1), back=(1, None), ahead=(2, None))
        if self.ahead <= self.back:
            raise DiffsteerError(f"{self.name}: ahead={self.ahead} is not more than back={self.back}: no path would get on")

    def _plan(self, steps: int) -> tuple[int, list[tuple[int, int]]]:
        """Where the first round begins, and from where to where the branches of each round run."""
        at = max(1, min(round(self.first * steps), steps - 1))
        begun, rounds = at, []
        while at < steps:
            start = max(0, at - self.back)
            stop = start + self.ahead
            if stop >= steps:
                break
            rounds.append((start, stop))
            at = stop
        return begun, rounds

    def search(self, arena: Arena) -> Asking:
        begun, rounds = self._plan(arena.steps)
        for _ in arena.rounds(1):
            paths = yield [Trial(z, 0, begun, fresh=True) for z in arena.begin(self.paths)]
            for start, stop in rounds:
                trials = []
                for path in paths:
                    for z in arena.draw(self.branches):
                        x = arena.noised(path.x, path.stop, start, z)
                        trials.append(Trial(x, start, stop, **path.line))
                told = yield trials
                paths = arena.order(told)[: self.paths]
            if begun < arena.steps:
                yield [path.onward(None) for path in paths]

    def evaluations(self, steps: int) -> int:
        begun, rounds = self._plan(steps)
        at = rounds[-1][1] if rounds else begun
        between = sum(self.paths * self.branches * (stop - start) for start, stop in rounds)
        return self.paths * begun + between + self.paths * (steps - at)
