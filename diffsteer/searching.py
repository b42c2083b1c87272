"""The driver of searches: prompts in step with each other, each within its own budget, anytime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from diffsteer.budget import Budget, Cost, Purse, Stopwatch
from diffsteer.diversity import best_diverse, diversity, features_of
from diffsteer.found import Found, Gap, Progress
from diffsteer.ground import Ask, Ground
from diffsteer.judging import ByDuel
from diffsteer.trial import SLOTS, Arena, Asking, Outcome, Search, Trial
from diffsteer.types import DiffsteerError

POOL, POOL_OF_DUELS = 16, 6  # finished samples that are kept whole while searching, at least


class _Run:
    """One prompt's search."""

    def __init__(
        self, prompt: int, search: Search, ground: Ground, purse: Purse, starts: Sequence[Outcome], finalists: int
    ) -> None:
        first = purse.slots
        self.prompt, self.search, self.ground, self.purse = prompt, search, ground, purse
        self.judge = ground.judge(prompt)
        self.arena = Arena(
            ground.steps,
            ground.levels,
            ground.shape,
            ground.seed,
            ground.ids[prompt],
            purse,
            self.judge,
            ground.price,
            starts,
            ground.eta,
            ground.noise_kind,
            drawn=first,
        )
        self.slots = first
        self.whole = max(POOL, 2 * search.keep, 2 * finalists)
        self.asking: Asking = search.search(self.arena)
        self.trials: list[Trial] | None = None
        self.finished: list[Outcome] = []
        self.farthest: list[Outcome] = []  # of the last round on the way, while nothing is finished
        self.scored, self.stopped = 0, "done"
        self.history: list[tuple[int, float, float]] = []
        self._advance(None)

    def _advance(self, outcomes: list[Outcome] | None) -> None:
        try:
            self.trials = next(self.asking) if outcomes is None else self.asking.send(outcomes)
        except StopIteration:
            self.trials = None

    def stop(self, why: str) -> None:
        self.asking.close()
        self.trials, self.stopped = None, why

    def granted(self) -> list[Ask]:
        """As many of the trials asked for as can be paid: one unfinished trial must leave enough to finish it."""
        asks: list[Ask] = []
        if self.trials is None:
            return asks
        clock = self.purse.watch
        if clock.limit is not None and not clock.evals and clock.pending:
            return asks  # another prompt's first trial is being measured
        most = None
        if clock.limit is not None and self.trials:  # the time is everybody's
            most = max(1, self.purse.affords(self.ground.price(self.trials[0])) // clock.prompts)
        for trial in self.trials[:most]:
            end = Cost()
            if not self.finished and (trial.stop is not None and trial.stop < self.ground.steps):
                end = self.ground.price(Trial(trial.x, trial.stop))
            if self.purse.affords(self.ground.price(trial), end) < 1:
                break
            self.purse.pay(self.ground.price(trial))
            asks.append((self.prompt, self._slot(), trial))
        if not asks and self.trials and self.purse.until < 1:
            self._advance([])  # the share of a stage is spent
            return self.granted()
        if not asks and self.trials:
            plain = self._plain(self.trials[0])
            self.stop("budget")
            if not self.finished and self.purse.affords(self.ground.price(plain), late=True):
                self.purse.pay(self.ground.price(plain))
                asks.append((self.prompt, self._slot(), plain))
        return asks

    def _plain(self, trial: Trial) -> Trial:
        """One sample, at least, in the place of what costs too much: without gradient and look-ahead, to the end at once."""
        return replace(trial, stop=None, gradient=False, look=0, scored=True)

    def _slot(self) -> int:
        self.slots += 1
        if self.slots >= SLOTS:
            raise DiffsteerError(f"a search of one prompt has at most {SLOTS} trials")
        return self.slots - 1

    def told(self, outcomes: list[Outcome], elapsed: float) -> None:
        """Hand on what became of the trials."""
        done = [o for o in outcomes if o.final and o.trial.scored]
        self.scored += len(done)
        if done:
            self.finished = self.pool([*self.finished, *done])
            best = self.finished[0].reward
            if not self.history or best > self.history[-1][2]:
                self.history.append((self.purse.spent.evals, elapsed, best))
        elif not self.finished:
            self.farthest = self.judge_order([o for o in outcomes if o.trial.scored]) or self.farthest or outcomes
        if self.trials is None:  # closed
            return
        if self.finished and self.finished[0].reward >= self.ground.solved:
            self.stop("solved")
        else:
            self._advance(outcomes)

    def judge_order(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        return [outcomes[i] for i in self.judge.order(outcomes)] if outcomes else []

    def pool(self, outcomes: list[Outcome]) -> list[Outcome]:
        """The best first, the rest without their tensors or, where all have to meet each other, gone."""
        ordered = self.judge_order(outcomes)
        if isinstance(self.judge, ByDuel):
            return ordered[: max(POOL_OF_DUELS, self.search.keep)]
        return [*ordered[: self.whole], *(o if o.sample is None else _light(o) for o in ordered[self.whole :])]

    def unfinished(self) -> list[Ask]:
        """Where the budget ended on the way: the best so far is brought to the end."""
        if self.finished or not self.farthest:
            return []
        trial = self.farthest[0].onward(None)
        self.purse.pay(self.ground.price(trial))
        return [(self.prompt, self._slot(), trial)]


def explore(
    search: Search,
    ground: Ground,
    budget: Budget | None = None,
    *,
    render: Ground | None = None,
    finalists: int = 4,
    remake: bool = True,
    starts: Sequence[Sequence[Outcome]] | None = None,
    purses: Sequence[Purse] | None = None,
    watch: Callable[[Progress], None] | None = None,
    stopwatch: Stopwatch | None = None,
) -> list[Found]:
    """Search, for every prompt of a ground.

    Args:
        render: where the best of what was found is made again and ranked anew, if the search itself ran on drafts.
        finalists: how many of them. remake: from their noise; else their last states are scored anew.
        starts: noises to begin with, a list a prompt, the best first.
        purses: budgets that are already partly spent, one a prompt.
        watch: called once a round.

    Raises:
        DiffsteerError: a budget that does not pay for a single sample.
    """
    budget = budget or Budget()
    clock = stopwatch or Stopwatch(budget.seconds, ground.ledger)
    count = clock.prompts = len(ground.ids)
    purses = list(purses) if purses is not None else [Purse(budget, clock) for _ in range(count)]
    if render is not None:
        for purse in purses:
            finalists = _reserve(purse, remake, render, finalists)
    runs = [_Run(p, search, ground, purses[p], [] if starts is None else starts[p], finalists) for p in range(count)]
    interrupted = False
    try:
        while True:
            asks = [ask for run in runs for ask in run.granted()]
            if not asks:
                break
            _tell(runs, asks, ground, clock)
            if watch is not None:
                best = tuple(r.finished[0].reward if r.finished else float("nan") for r in runs)
                watch(Progress(best, sum(p.share() for p in purses) / count, ground.ledger.evaluations))
    except KeyboardInterrupt:
        interrupted = True
        for run in runs:
            run.stop("interrupted")
    late = [ask for run in runs for ask in run.unfinished()]
    if late:
        _tell(runs, late, ground, clock)
    for run in runs:
        if not run.finished:
            if interrupted:
                raise KeyboardInterrupt
            raise DiffsteerError(f"{search.name}: the budget does not pay for one sample: {_price_of_one(ground, render)}")
    if render is None:
        found = [_found(run) for run in runs]
    else:
        found = _rendered(runs, render, 1 if interrupted else finalists, remake, clock)
    for run in runs:
        run.purse.slots = run.slots
    return found


def _light(outcome: Outcome) -> Outcome:
    """Without what is large: who still searches with it has its own."""
    none = torch.empty(0)
    return replace(outcome, trial=replace(outcome.trial, x=none), begun=none, x=none, x0=none, sample=None, gradient=None)


def _tell(runs: Sequence[_Run], asks: Sequence[Ask], ground: Ground, clock: Stopwatch) -> None:
    outcomes = ground.carry(asks)
    clock.pending = 0
    clock.evals += sum(ground.price(trial).evals for _, _, trial in asks)
    by_prompt: dict[int, list[Outcome]] = {}
    for (prompt, _, _), outcome in zip(asks, outcomes, strict=True):
        by_prompt.setdefault(prompt, []).append(outcome)
    for prompt, mine in by_prompt.items():
        runs[prompt].told(mine, clock.elapsed)


def _whole(ground: Ground) -> Trial:
    return Trial(torch.empty(ground.shape), fresh=True)


def _price_of_one(ground: Ground, render: Ground | None) -> str:
    cost = ground.price(_whole(ground))
    if render is not None:
        cost = cost.plus(render.price(_whole(render)))
    return f"that takes evals={cost.evals}, decodes={cost.decodes}, reward_calls={cost.reward_calls}"


def _reserve(purse: Purse, remake: bool, render: Ground, finalists: int) -> int:
    """Keep back what the finals cost, for as many as at most half of the budget pays for, one at least."""
    each = render.price(_whole(render) if remake else Trial(torch.empty(0), render.steps))
    half = [
        getattr(purse.budget, name) // 2 // cost
        for name, cost in each._asdict().items()
        if cost and getattr(purse.budget, name) is not None
    ]
    finalists = max(1, min([finalists, *half]))
    purse.reserve = Cost().plus(each, finalists)
    return finalists


def _found(run: _Run, gap: Gap | None = None) -> Found:
    """The best and the different ones of what is finished."""
    pool = [o for o in run.finished if o.sample is not None][: run.whole]
    features = features_of(torch.stack([o.sample for o in pool if o.sample is not None]))
    chosen = best_diverse(run.judge.values(pool), features, run.search.keep, run.search.diversity)
    kept = tuple(pool[i] for i in chosen)
    return Found(
        outcomes=kept,
        history=tuple(run.history),
        scored=run.scored,
        spent=run.purse.spent,
        diagnoses=tuple(d for d in (o.diagnosis() for o in kept) if d is not None),
        diversity=diversity(features[chosen]),
        pool_diversity=diversity(features),
        gap=gap,
        stopped=run.stopped,
    )


def _again(draft: Outcome, render: Ground, remake: bool) -> Trial:
    """A draft in full: from its noise, or its last state scored anew."""
    if remake:
        assert draft.root is not None
        return Trial(draft.root, fresh=True, root=draft.root)
    return Trial(draft.x, render.steps, root=draft.root, path=draft.path)


def _rendered(runs: Sequence[_Run], render: Ground, finalists: int, remake: bool, clock: Stopwatch) -> list[Found]:
    """The best drafts of each prompt at full quality, ranked anew."""
    asks: list[Ask] = []
    drafts: dict[tuple[int, int], Outcome] = {}
    for run in runs:
        run.purse.reserve = Cost()
        for draft in [o for o in run.finished if o.sample is not None][:finalists]:
            trial = _again(draft, render, remake)
            if asks and run.purse.affords(render.price(trial)) < 1 and any(p == run.prompt for p, _, _ in asks):
                break
            run.purse.pay(render.price(trial))
            slot = run._slot()
            asks.append((run.prompt, slot, trial))
            drafts[run.prompt, slot] = draft
    outcomes = render.carry(asks)
    found = []
    for run in runs:
        mine = [o for (p, _, _), o in zip(asks, outcomes, strict=True) if p == run.prompt]
        for outcome in mine:
            outcome.drafted = drafts[run.prompt, outcome.slot]
        gap = Gap(tuple(drafts[run.prompt, o.slot].reward for o in mine), tuple(o.reward for o in mine))
        run.judge = render.judge(run.prompt)
        run.finished = run.judge_order(mine)
        best = run.finished[0].reward
        run.history = [*run.history, (run.purse.spent.evals, clock.elapsed, best)]
        found.append(_found(run, gap))
    return [replace(f, scored=f.scored + len(f.outcomes)) for f in found]
