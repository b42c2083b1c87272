"""The driver of searches: prompts in step with each other, each within its own budget, anytime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from diffsteer.budget import Budget, Cost, Purse, Stopwatch
from diffsteer.diversity import best_diverse, diversity, features_of
from diffsteer.found import Found, Gap, Progress, gap_of
from diffsteer.ground import Ask, Ground
from diffsteer.judging import ByDuel, positions
from diffsteer.trial import SLOTS, Arena, Asking, Outcome, Search, Trial
from diffsteer.types import DiffsteerError

POOL, POOL_OF_DUELS = 12, 6  # finished samples that are kept whole while searching, at least


class Run:
    """One prompt's search.

    Attributes:
        finished: finished samples, the best first. values: by the judge, one each.
        waiting: states of the last round that are not finished.
        finals: of drafts, what was made in full already, and from which draft.
    """

    def __init__(
        self, prompt: int, search: Search, ground: Ground, purse: Purse, starts: Sequence[Outcome], finalists: int
    ) -> None:
        self.prompt, self.search, self.ground, self.purse = prompt, search, ground, purse
        self.judge = ground.judge(prompt, purse)
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
            drawn=purse.slots,
        )
        self.whole = max(POOL, 2 * search.keep, 2 * finalists)
        self.asking: Asking = search.search(self.arena)
        self.trials: list[Trial] | None = None
        self.finished: list[Outcome] = []
        self.values: list[float] = []
        self.waiting: list[Outcome] = []
        self.finals: list[Outcome] = []
        self.scored, self.stopped = 0, "done"
        self.history: list[tuple[int, float, float]] = []
        self.advance(None)

    def advance(self, outcomes: list[Outcome] | None) -> None:
        """Hand on outcomes, and be asked for more."""
        try:
            self.trials = next(self.asking) if outcomes is None else self.asking.send(outcomes)
        except StopIteration:
            self.trials = None

    def stop(self, why: str) -> None:
        self.asking.close()
        self.trials, self.stopped = None, why

    def ask(self, trial: Trial, ground: Ground | None = None) -> Ask:
        """Pay for a trial, and give it a number."""
        self.purse.pay((ground or self.ground).price(trial))
        self.purse.slots += 1
        if self.purse.slots >= SLOTS:
            raise DiffsteerError(f"a search of one prompt has at most {SLOTS} trials")
        return self.prompt, self.purse.slots - 1, trial

    def granted(self) -> list[Ask]:
        """As many of the trials asked for as can be paid, with one of what is not finished then still to be finished."""
        clock = self.purse.watch
        if self.trials is None or (clock.limit is not None and not clock.measured and clock.pending):
            return []  # another prompt's first trial is being measured
        most = None
        if clock.limit is not None and self.trials:  # the time is everybody's
            most = max(1, self.purse.affords(self.ground.price(self.trials[0])) // clock.prompts)
        asks: list[Ask] = []
        for trial in self.trials[:most]:
            if self.purse.affords(self.ground.price(trial), self.end_of(trial)) < 1:
                break
            asks.append(self.ask(trial))
        if not asks and self.trials and self.purse.until < 1:
            self.advance([])  # the share of a stage is spent
            return self.granted()
        if not asks and self.trials:
            # one sample, at least, in the place of what costs too much: without gradient and look-ahead, to the end at once
            plain = replace(self.trials[0], stop=None, gradient=False, look=0, scored=True)
            self.stop("budget")
            if not (self.finished or self.waiting) and self.purse.affords(self.ground.price(plain), late=True):
                asks.append(self.ask(plain))
        return asks

    def end_of(self, trial: Trial) -> Cost:
        """What finishing takes, after a trial."""
        stop = self.ground.steps if trial.stop is None else trial.stop
        return self.ground.price(Trial(trial.x, stop)) if stop < self.ground.steps else Cost()

    def told(self, outcomes: list[Outcome], elapsed: float) -> None:
        """What became of the trials: note it, and hand it on."""
        done = [o for o in outcomes if o.final and o.trial.scored]
        self.scored += len(done)
        on_the_way = [o for o in outcomes if not o.final]
        known = [o for o in on_the_way if o.trial.scored]
        self.waiting = [known[i] for i in self.judge.order(known)] if known else on_the_way
        if done:
            before = self.finished[0].slot if self.finished else None
            self.pool([*self.finished, *done])
            best = self.finished[0]
            if best.slot != before:
                self.history.append((self.purse.spent.evals, elapsed, best.reward))
        if self.trials is not None:  # not closed
            self.advance(outcomes)

    def pool(self, outcomes: list[Outcome]) -> None:
        """Keep finished samples, the best first; the rest of them without their tensors or, where all have to meet each other,
        not at all."""
        values = self.judge.values(outcomes)
        order = positions(values)
        if isinstance(self.judge, ByDuel):
            order = order[: max(POOL_OF_DUELS, self.search.keep)]
        self.finished = [outcomes[i] if n < self.whole else outcomes[i].light() for n, i in enumerate(order)]
        self.values = [float(values[i]) for i in order]

    def late(self, most: int | None) -> list[Ask]:
        """Where the budget ended on the way: as many of the best there as it still pays for are brought to the end."""
        asks: list[Ask] = []
        for outcome in self.waiting[:most] if self.stopped != "done" else []:
            trial = outcome.onward(None, eta=outcome.trial.eta)
            if (asks or self.finished) and not self.purse.affords(self.ground.price(trial)):
                break
            asks.append(self.ask(trial))
        return asks


def explore(
    search: Search,
    ground: Ground,
    budget: Budget | None = None,
    *,
    render: Ground | None = None,
    finalists: int = 4,
    remake: bool = True,
    watch: Callable[[Progress], None] | None = None,
    stopwatch: Stopwatch | None = None,
) -> list[Found]:
    """Search, for every prompt of a ground.

    Args:
        render: where the best of what was found is made again and ranked anew, if the search itself ran on drafts.
        finalists: how many of them. remake: from their noise; else their last states are scored anew.
        watch: called once a round.

    Raises:
        DiffsteerError: a budget that does not pay for a single sample, or that limits nothing that the search spends.
        KeyboardInterrupt: before there was any sample.
    """
    budget = budget or Budget()
    clock = stopwatch or Stopwatch(budget.seconds)
    clock.prompts = len(ground.ids)
    _check(search, budget, ground, render)
    purses = [Purse(budget, clock) for _ in ground.ids]
    if render is not None:
        for purse in purses:
            finalists = _reserve(purse, _final(render, remake), finalists)
    runs = [Run(p, search, ground, purse, [], finalists) for p, purse in enumerate(purses)]
    drafts = _Drafts(render, remake, finalists, clock) if render is not None else None
    try:
        while asks := [ask for run in runs for ask in run.granted()]:
            _carry(runs, asks, ground, clock)
            if drafts is not None:
                drafts.early(runs)
            else:
                _stop_solved(runs, ground.solved)
            if watch is not None:
                best = tuple(r.finished[0].reward if r.finished else float("nan") for r in runs)
                watch(Progress(best, sum(p.share() for p in purses) / len(purses), ground.ledger.evaluations))
    except KeyboardInterrupt:
        _interrupt(runs)
    try:
        late = [ask for run in runs for ask in run.late(1 if run.stopped == "interrupted" else None)]
        if late:
            _carry(runs, late, ground, clock)
    except KeyboardInterrupt:
        _interrupt(runs)
    for run in runs:
        if not run.finished:
            if run.stopped == "interrupted":
                raise KeyboardInterrupt
            raise DiffsteerError(f"{search.name}: the budget does not pay for one sample: {_price_of_one(ground, render)}")
    if drafts is not None:
        return drafts.rendered(runs)
    return [_found(run) for run in runs]


def _carry(runs: Sequence[Run], asks: Sequence[Ask], ground: Ground, clock: Stopwatch) -> None:
    began = clock.now()
    outcomes = ground.carry(asks)
    clock.note(sum(ground.price(trial).evals for _, _, trial in asks), clock.now() - began)
    by_prompt: dict[int, list[Outcome]] = {}
    for (prompt, _, _), outcome in zip(asks, outcomes, strict=True):
        by_prompt.setdefault(prompt, []).append(outcome)
    for prompt, mine in by_prompt.items():
        runs[prompt].told(mine, clock.elapsed)


def _interrupt(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.trials is not None or not run.finished:
            run.stop("interrupted")


def _stop_solved(runs: Sequence[Run], solved: float) -> None:
    for run in runs:
        if run.finished and run.finished[0].reward >= solved and run.stopped != "solved":
            run.stop("solved")


def _whole(ground: Ground) -> Trial:
    return Trial(torch.empty(ground.shape), fresh=True)


def _final(render: Ground, remake: bool) -> Cost:
    """What one final costs."""
    return render.price(_whole(render) if remake else Trial(torch.empty(0), render.steps))


def _check(search: Search, budget: Budget, ground: Ground, render: Ground | None) -> None:
    one = ground.price(_whole(ground)).plus(render.price(_whole(render)) if render is not None else Cost())
    if budget and budget.seconds is None and not any(getattr(budget, n) is not None and v for n, v in one._asdict().items()):
        limits = [n for n in one._fields if getattr(budget, n) is not None]
        raise DiffsteerError(f"budget: {limits[0]} limits nothing here, where a sample costs none: give evals or seconds")
    if any(getattr(budget, n) is not None and getattr(budget, n) < v for n, v in one._asdict().items()):
        raise DiffsteerError(f"{search.name}: the budget does not pay for one sample: {_price_of_one(ground, render)}")


def _price_of_one(ground: Ground, render: Ground | None) -> str:
    cost = ground.price(_whole(ground))
    if render is not None:
        cost = cost.plus(render.price(_whole(render)))
    return f"that takes evals={cost.evals}, decodes={cost.decodes}, reward_calls={cost.reward_calls}"


def _reserve(purse: Purse, each: Cost, finalists: int) -> int:
    """Keep back what the finals cost, for as many as at most half of the budget pays for, one at least."""
    half = [
        getattr(purse.budget, name) // 2 // cost
        for name, cost in each._asdict().items()
        if cost and getattr(purse.budget, name) is not None
    ]
    finalists = max(1, min([finalists, *half]))
    purse.reserve = Cost().plus(each, finalists)
    return finalists


class _Drafts:
    """What becomes of drafts."""

    def __init__(self, render: Ground, remake: bool, finalists: int, clock: Stopwatch) -> None:
        self.render, self.remake, self.finalists, self.clock = render, remake, finalists, clock
        self.price = _final(render, remake)

    def make(self, chosen: Sequence[tuple[Run, Outcome]]) -> list[Outcome]:
        """Finals of drafts, paid from what was kept back."""
        asks = []
        for run, draft in chosen:
            run.purse.reserve = Cost(*(max(0, a - b) for a, b in zip(run.purse.reserve, self.price, strict=True)))
            again = Trial(draft.x, self.render.steps, root=draft.root, path=draft.path)
            if self.remake:
                assert draft.root is not None
                again = Trial(draft.root, fresh=True, root=draft.root)
            asks.append(run.ask(again, self.render))
        pending = self.clock.pending
        outcomes = self.render.carry(asks)
        self.clock.pending = pending - sum(self.render.price(t).evals for _, _, t in asks)
        for (run, draft), final in zip(chosen, outcomes, strict=True):
            final.drafted = draft
            run.finals.append(final)
        return outcomes

    def early(self, runs: Sequence[Run]) -> None:
        """The first draft of all, where time is limited, since nobody knows yet what a final takes; and drafts that cannot be
        better, which end a search if their finals cannot, either."""
        if self.clock.limit is not None and self.clock.final is None:
            first = next((run for run in runs if run.finished), None)
            if first is not None:
                began = self.clock.now()
                self.make([(first, first.finished[0])])
                self.clock.final = self.clock.now() - began
                most = int(self.clock.limit / 2 / max(self.clock.final * len(runs), 1e-9))
                self.finalists = max(1, min(self.finalists, most))
                self.clock.reserved = self.clock.final * (self.finalists * len(runs) - 1)
        best = [r for r in runs if r.trials is not None and r.finished and r.finished[0].reward >= r.ground.solved]
        fresh = [
            r for r in best if all(f.drafted is not r.finished[0] for f in r.finals) and len(r.finals) + 1 < self.finalists
        ]
        if fresh:
            self.make([(run, run.finished[0]) for run in fresh])
        for run in best:
            if any(final.reward >= self.render.solved for final in run.finals):
                run.stop("solved")

    def rendered(self, runs: Sequence[Run]) -> list[Found]:
        """The best drafts of each prompt at full quality, ranked anew; on Ctrl-C what there is of them, or the drafts."""
        try:
            self.make([(run, draft) for run in runs for draft in self.chosen(run)])
        except KeyboardInterrupt:
            for run in runs:
                run.stopped = "interrupted"
        found = []
        for run in runs:
            if not run.finals:
                found.append(_found(run))
                continue
            drafts = [f.drafted for f in run.finals if f.drafted is not None]
            gap = gap_of(drafts, run.finals, run.judge)
            run.judge, made = self.render.judge(run.prompt, run.purse), run.scored
            run.pool(run.finals)
            run.scored = made + len(run.finals)
            run.history.append((run.purse.spent.evals, self.clock.elapsed, run.finished[0].reward))
            found.append(_found(run, gap))
        return found

    def chosen(self, run: Run) -> list[Outcome]:
        """The drafts that are still to be made in full."""
        run.purse.reserve = Cost()
        if run.stopped == "solved":
            return []
        made = [final.drafted for final in run.finals]
        number = (1 if run.stopped == "interrupted" else self.finalists) - len(made)
        able = [o for o in run.finished if o.sample is not None or (self.remake and o.root is not None and o.root.numel())]
        wanted = [d for d in run.search.finalists(able, max(number + len(made), 1)) if all(d is not m for m in made)]
        chosen: list[Outcome] = []
        spent = run.purse.spent
        for draft in wanted[: max(number, 0 if made else 1)]:
            spent = spent.plus(self.price)
            limits = [(getattr(run.purse.budget, n), getattr(spent, n)) for n in Cost._fields]
            if (chosen or made) and any(limit is not None and cost > limit for limit, cost in limits):
                break
            chosen.append(draft)
        return chosen


def _found(run: Run, gap: Gap | None = None) -> Found:
    """The best and the different ones of what is finished."""
    pool = [(o, v) for o, v in zip(run.finished, run.values, strict=True) if o.sample is not None][: run.whole]
    samples = [o.sample for o, _ in pool if o.sample is not None]
    features, values = features_of(torch.stack(samples)), torch.tensor([v for _, v in pool], dtype=torch.float64)
    chosen = best_diverse(values, features, run.search.keep, run.search.diversity)
    kept = tuple(pool[i][0] for i in chosen)
    return Found(
        outcomes=kept,
        values=tuple(pool[i][1] for i in chosen),
        history=tuple(run.history),
        scored=run.scored,
        spent=run.purse.spent,
        diagnoses=tuple(d for d in (o.diagnosis() for o in kept) if d is not None),
        diversity=diversity(features[chosen]),
        pool_diversity=diversity(features),
        gap=gap,
        stopped=run.stopped,
    )
