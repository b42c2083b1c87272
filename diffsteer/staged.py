"""Searches one after another under one budget, and any sampler as a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffsteer.algebra import noise_std
from diffsteer.judging import ByDuel
from diffsteer.trial import Arena, Asking, Outcome, Search, Trial
from diffsteer.types import DiffsteerError, Problem, Sampler, Step

HANDED = 64  # of the best samples so far, to the next stage


def as_search(stage: Any) -> Search:
    """A stage as a search.

    Raises:
        DiffsteerError: no sampler; one that moves levels or steers by gradients on the way, which takes walks of its own.
    """
    if isinstance(stage, Search):
        if hasattr(stage, "stages"):
            raise DiffsteerError("stages cannot be nested: put theirs into one list")
        return stage
    if isinstance(stage, type) or not isinstance(stage, Sampler):
        raise DiffsteerError(f"a stage is a sampler, such as ZeroOrder() or FeynmanKac(4), not {stage!r}")
    for fact, what in (("guidance", "guides by gradients"), ("timing", "moves levels")):
        if getattr(stage, fact, None) is not None:
            raise DiffsteerError(f"{stage.name} {what} on the way and cannot be a stage; give it alone, or reno or dno here")
    return ParticleSearch(stage)


class ParticleSearch(Search):
    """A sampler of particles as a search: its events are scored trials, its final particles samples among others."""

    cuts = True
    numbers = True

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        object.__setattr__(self, "sampler", sampler)
        object.__setattr__(self, "name", sampler.name)

    def search(self, arena: Arena) -> Asking:
        for turn in arena.rounds(1):
            yield from self._walk(arena, turn)

    def _walk(self, arena: Arena, turn: int) -> Asking:
        sampler: Sampler = self.sampler  # type: ignore[attr-defined]
        count, events = sampler.particles, sampler.schedule(arena.steps)
        state = sampler.init(Problem(1, arena.steps, _last_noise(arena, sampler.eta), arena.seed + turn, (arena.id,)))
        noises = arena.begin(count) if turn == 0 else arena.draw(count)
        rows = [Trial(z, 0, events[0], True, eta=sampler.eta) for z in noises]
        for k, event in enumerate(events):
            told: list[Outcome] = yield rows
            if len(told) < count:  # the budget ends here: what there is goes on, unweighted
                if event < arena.steps:
                    yield [arena.best(told).onward(None, eta=sampler.eta)]
                return
            rewards = torch.tensor([[o.reward for o in told]], dtype=torch.float64)
            if event == arena.steps:
                return
            state, info = sampler.apply(state, Step(event, False, rewards))
            parents = [told[i] for i in info.ancestors[0].tolist()]
            rows = [p.onward(events[k + 1], eta=sampler.eta) for p in parents]

    def evaluations(self, steps: int) -> int:
        return int(self.sampler.particles * steps)  # type: ignore[attr-defined]


def _last_noise(arena: Arena, eta: float) -> int:
    pairs = zip(arena.levels[:-1], arena.levels[1:], strict=True)
    noisy = [k for k, (a, b) in enumerate(pairs) if float(noise_std(a, b, eta, arena.noise_kind)) > 0]
    return max(noisy, default=-1)


def staged(parts: Sequence[Search], shares: Sequence[float], arena: Arena) -> Asking:
    """Run searches one after another, each until its share of the budget, and what was left before it, is spent."""
    best: list[Outcome] = list(arena.starts)
    reached = 0.0
    for k, (part, share) in enumerate(zip(parts, shares, strict=True), start=1):
        reached += share
        arena.purse.until = reached if k < len(parts) else 1.0
        arena.starts = best
        stage = _ended(part.search(arena), arena)
        try:
            trials = next(stage)
            while True:
                told = yield trials
                done = [o for o in told if o.final and o.trial.scored and o.root is not None]
                if done:  # duels look at samples again
                    done = done if isinstance(arena.judge, ByDuel) else [o.light(known=True) for o in done]
                    best = arena.order([*best, *done])[:HANDED]
                trials = stage.send(told)
        except StopIteration:
            continue


def _ended(asking: Asking, arena: Arena) -> Asking:
    """A search until it is granted nothing more; the best of its states on their way then comes to its end, for which what it
    takes was kept."""
    waiting: list[Outcome] = []
    try:
        trials = next(asking)
        while told := (yield trials):
            waiting = [o for o in told if not o.final]
            trials = asking.send(told)
    except StopIteration:
        return
    asking.close()
    if waiting:
        known = [o for o in waiting if o.trial.scored]
        best = arena.best(known) if known else waiting[0]
        yield [best.onward(None, eta=best.trial.eta)]
