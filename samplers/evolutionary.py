"""Evolutionary search along the chain: generations at rising steps, whose members are judged by where their chains end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.proposals import cross, mix, rotation
from diffsteer.trial import Arena, Asking, Outcome, Search, Trial
from diffsteer.types import DiffsteerError, setting


@dataclass(frozen=True)
class Gene:
    """A state at a generation's level, and the end of the chain that went through it."""

    state: Outcome | None  # None: the unit noise itself
    noise: Tensor
    end: Outcome


@dataclass(frozen=True)
class Evolutionary(Search):
    """Evolution of noises and of states on the way (after EvoSearch, He et al., 2025, arXiv 2505.17618).

    Every member of a generation is denoised to its end and judged there, on the sample itself; its states at the later
    generations' steps go into their gene pools. The next generation has the elites of the pool as they are, and children: the
    winner of a tournament, crossed with another winner now and then, and mutated. Where the paper's code adds noise that makes
    states too wide, mutation here keeps the law: unit noises rotate, and of a state on the way the noise in it is mixed with
    fresh noise while its clean estimate stays.

    A heuristic. Cost: ``sum_g p_g (s_g - s_(g-1)) + sum_g p_g (T - s_g) + p_G (T - s_(G-1))`` evaluations, with the published
    schedules 5000, 1465 and 1000 (SD 2.1, FLUX, Wan); with a budget it begins anew until that is spent.

    Args:
        generations: the shares of the chain s_0 ... s_(G-1), rising, where generations are bred; 0 is the noise itself.
        populations: p_0 ... p_G, one more.
        elites: of each gene pool, go on unchanged.
        tournament: members that a parent is the best of.
        step: of mutations, s in (0, 1].
        crossover: how often a child has two parents, in [0, 1].
        eta: amount of noise in the transition; with 0 an elite's second chain is its first one again.
    """

    generations: Sequence[float] = (0.0, 0.4, 0.7)
    populations: Sequence[int] = (10, 5, 5, 5)
    elites: int = setting(1, low=0)
    tournament: int = setting(3, low=1)
    step: float = setting(0.5, low=0, high=1)
    crossover: float = setting(0.0, low=0, high=1)
    eta: float = setting(1.0, low=0, high=1)

    name: ClassVar[str] = "evolutionary"
    cuts: ClassVar[bool] = True
    source: ClassVar[str] = "after He et al., 2025, arXiv 2505.17618 (EvoSearch)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(elites=(0, None), tournament=(1, None), step=(1e-6, 1), crossover=(0, 1), eta=(0, 1))
        for name in ("generations", "populations"):
            if not isinstance(getattr(self, name), Sequence) or isinstance(getattr(self, name), str):
                raise DiffsteerError(f"{self.name}: {name}={getattr(self, name)!r}; wanted a list")
        shares, sizes = list(self.generations), list(self.populations)
        if not shares or not all(type(s) in (int, float) and 0 <= s < 1 for s in shares) or sorted(set(shares)) != shares:
            raise DiffsteerError(f"{self.name}: generations={shares}; wanted shares of the chain in [0, 1) that rise")
        if len(sizes) != len(shares) + 1 or not all(type(p) is int and p >= 1 for p in sizes):
            raise DiffsteerError(f"{self.name}: populations={sizes}; wanted {len(shares) + 1} numbers of at least 1")
        if self.elites >= min(sizes[1:]):
            raise DiffsteerError(f"{self.name}: elites={self.elites} leave no place for children in {min(sizes[1:])}")

    def schedule(self, steps: int) -> list[int]:
        """The generations' grid indices."""
        return [round(s * steps) for s in self.generations]

    def search(self, arena: Arena) -> Asking:
        for _ in arena.rounds(1):
            yield from self._generations(arena)

    def _generations(self, arena: Arena) -> Asking:
        at = self.schedule(arena.steps)
        if len(set(at)) < len(at):
            raise DiffsteerError(f"{self.name}: {arena.steps} steps have no room for generations={list(self.generations)}")
        pools: dict[int, list[Gene]] = {s: [] for s in at}
        noises = arena.begin(self.populations[0])
        first = [Trial(z, 0, at[0], fresh=True, scored=False, eta=self.eta) for z in noises]
        members: list[Outcome | Tensor] = list(noises) if at[0] == 0 else list((yield first))
        for g, s in enumerate(at):
            yield from self._finished(arena, members, s, pools)
            last = g == len(at) - 1
            bred = self._bred(arena, pools[s], self.populations[g + 1])
            if last:
                yield [self._trial(x, root, s, None, True) for x, root in bred]
            else:
                members = list((yield [self._trial(x, root, s, at[g + 1], False) for x, root in bred]))

    def _finished(self, arena: Arena, members: list[Outcome | Tensor], s: int, pools: dict[int, list[Gene]]) -> Asking:
        """Carry members at index s to the end, past the later generations' steps, and fill the gene pools."""
        passed: dict[int, list[Outcome]] = {}
        now: list[Outcome | Tensor] = members
        stops = [k for k in pools if k > s] + [arena.steps]
        for stop in stops:
            trials = []
            for m in now:
                to, final = (None if stop == arena.steps else stop), stop == arena.steps
                if isinstance(m, Tensor):
                    trials.append(Trial(m, 0, to, fresh=True, scored=final, eta=self.eta))
                else:
                    trials.append(m.onward(to, scored=final, eta=self.eta))
            told = yield trials
            if stop < arena.steps:
                passed[stop] = list(told)
            now = list(told)
        ends = [m for m in now if isinstance(m, Outcome)]
        for member, end in zip(members, ends, strict=False):
            mine = isinstance(member, Tensor)
            root = member if isinstance(member, Tensor) else member.root
            assert root is not None
            pools[s].append(Gene(None if mine else member, root, end))  # type: ignore[arg-type]
        for stop, states in passed.items():
            pools[stop] += [Gene(state, _root(state), end) for state, end in zip(states, ends, strict=False)]

    def _bred(self, arena: Arena, pool: list[Gene], size: int) -> list[tuple[Gene | Tensor, Tensor]]:
        """The next generation: what to start from, and the unit noise it descends from."""
        ends = arena.order([g.end for g in pool])
        ranked = sorted(pool, key=lambda g: ends.index(g.end))
        children: list[tuple[Gene | Tensor, Tensor]] = [(g, g.noise) for g in ranked[: self.elites]]
        for z in arena.draw(max(0, size - len(children))):
            parent = self._winner(arena, ranked)
            other = self._winner(arena, ranked) if float(torch.rand((), generator=arena.chance)) < self.crossover else None
            children.append((self._mutated(arena, parent, other, z), parent.noise))
        return children

    def _winner(self, arena: Arena, ranked: list[Gene]) -> Gene:
        """The best of some drawn at random."""
        drawn = torch.randint(len(ranked), (self.tournament,), generator=arena.chance)
        return ranked[int(drawn.min())]

    def _mutated(self, arena: Arena, parent: Gene, other: Gene | None, z: Tensor) -> Tensor:
        if parent.state is None:
            noise = parent.noise if other is None else cross(parent.noise, other.noise, 0.5)
            return rotation(noise, z, self.step)
        here = arena.levels[parent.state.stop]
        x, x0 = parent.state.x, parent.state.x0
        eps = (x - here.alpha.to(x) * x0) / here.sigma.to(x)
        if other is not None and other.state is not None:
            theirs = (other.state.x - here.alpha.to(x) * other.state.x0) / here.sigma.to(x)
            eps = cross(eps, theirs, 0.5)
        return here.alpha.to(x) * x0 + here.sigma.to(x) * mix(eps, z.to(eps), self.step)

    def _trial(self, child: Gene | Tensor, root: Tensor, s: int, stop: int | None, scored: bool) -> Trial:
        if isinstance(child, Gene):
            if child.state is None:
                return Trial(child.noise, 0, stop, fresh=True, scored=scored, eta=self.eta)
            return child.state.onward(stop, scored=scored, eta=self.eta)
        if s == 0:
            return Trial(child, 0, stop, fresh=True, scored=scored, eta=self.eta)
        return Trial(child, s, stop, scored=scored, root=root, eta=self.eta)

    def evaluations(self, steps: int) -> int:
        at, sizes = self.schedule(steps), list(self.populations)
        on_the_way = sum(p * (s - before) for p, s, before in zip(sizes, at, [0, *at], strict=False))
        to_the_end = sum(p * (steps - s) for p, s in zip(sizes, at, strict=False))
        return on_the_way + to_the_end + sizes[-1] * (steps - at[-1])


def _root(state: Outcome) -> Tensor:
    assert state.root is not None
    return state.root
