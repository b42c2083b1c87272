"""One prompt's search while it is played: its purse, its pool of finished samples, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from diffsteer.budget import Cost, Purse
from diffsteer.diversity import best_diverse, diversity, features_of
from diffsteer.found import Found, Gap
from diffsteer.ground import Ask, Ground, Interrupted
from diffsteer.judging import PAIR, ByDuel, positions
from diffsteer.trial import SLOTS, Arena, Asking, Outcome, Search, Trial

POOL, POOL_OF_DUELS = 12, 6  # finished samples that are kept whole while searching, at least
LAST = 4096  # trials that are kept for the end of a search, of `SLOTS`


class Run:
    """One prompt's search.

    Attributes:
        first: the first trial that was asked for.
        finished: finished samples, the best first. values: by the judge, one each.
        waiting: states of the last round that are not finished.
        finals: of drafts, what was made in full already, and from which draft. gap: between the two, once all is made.
    """

    def __init__(self, prompt: int, search: Search, ground: Ground, purse: Purse, finalists: int) -> None:
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
            (),
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
        self.gap: Gap | None = None
        self.scored, self.stopped = 0, "done"
        self.history: list[tuple[int, float, float]] = []
        self.advance(None)
        self.first = self.trials[0] if self.trials else None

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
        return self.prompt, self.purse.slots - 1, trial

    def granted(self) -> list[Ask]:
        """As many of the trials asked for as can be paid, with one of what is not finished then still to be finished."""
        clock = self.purse.watch
        if self.trials is None or (clock.limit is not None and not clock.measured and clock.pending):
            return []  # another prompt's first trial is being measured
        most = SLOTS - LAST - self.purse.slots
        if most <= 0:
            self.stop("budget")
            return []
        if clock.limit is not None and self.trials:  # the time is everybody's
            most = min(most, max(1, self.purse.affords(self.ground.price(self.trials[0])) // clock.prompts))
        asks: list[Ask] = []
        if isinstance(self.judge, ByDuel) and self.finished and self.purse.affords(PAIR, late=True) < 1:
            most = 0  # nobody could tell how good another one is
        for trial in self.trials[:most]:
            if self.purse.affords(self.ground.price(trial), self.end_of(trial)) < 1:
                break
            asks.append(self.ask(trial))
        if not asks and self.trials and self.purse.until < 1:
            self.advance([])  # the share of a stage is spent
            return self.granted()
        if not asks and self.trials:
            # one sample, at least, in the place of what costs too much
            plain = _plain(self.trials[0])
            self.stop("budget")
            if not (self.finished or self.waiting) and self.purse.affords(self.ground.price(plain), late=True):
                asks.append(self.ask(plain))
        return asks

    def end_of(self, trial: Trial) -> Cost:
        """What finishing takes, after a trial."""
        stop = self.ground.steps if trial.stop is None else trial.stop
        return self.ground.price(Trial(trial.x, stop)) if stop < self.ground.steps else Cost()

    def told(self, outcomes: list[Outcome], elapsed: float, whole: bool = True) -> None:
        """What became of the trials: note it, and, where it is all of them, hand it on."""
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
        if whole and self.trials is not None:  # not closed
            self.advance(outcomes)

    def pool(self, outcomes: list[Outcome]) -> None:
        """Keep finished samples, the best first; the rest of them without their tensors or, where all have to meet each other,
        not at all."""
        values = self.judge.values(outcomes)
        order = positions(values)
        if isinstance(self.judge, ByDuel):
            order = order[: max(POOL_OF_DUELS, self.search.keep)]
        kept, rest = order[: self.whole], order[self.whole :]
        self.finished = [outcomes[i] for i in kept]
        self.finished += [outcomes[i] if outcomes[i].sample is None else outcomes[i].light() for i in rest]
        self.values = [float(values[i]) for i in order]

    @property
    def empty(self) -> bool:
        """Was it interrupted before anything was there?"""
        return self.stopped == "interrupted" and not (self.finished or self.waiting)

    def late(self) -> list[Ask]:
        """Where the budget ended on the way: as many of the best there as it still pays for are brought to the end; after
        Ctrl-C the best one, or, where there is nothing yet, a plain chain from the first noise."""
        if self.empty:
            return [self.ask(_plain(self.first))] if self.first is not None else []
        if self.stopped == "done":
            return []
        asks: list[Ask] = []
        for outcome in self.waiting[:1] if self.stopped == "interrupted" else self.waiting:
            trial = outcome.onward(None, eta=outcome.trial.eta)
            if (asks or self.finished) and not self.purse.affords(self.ground.price(trial)):
                break
            asks.append(self.ask(trial))
        return asks


def carried(ground: Ground, asks: Sequence[Ask], purses: Sequence[Purse]) -> tuple[dict[int, Outcome], bool]:
    """What became of trials, by place, and is that all of them? Ctrl-C ends a round on its way; what that saved goes back to
    the purses, one a trial."""
    try:
        return dict(enumerate(ground.carry(asks))), True
    except KeyboardInterrupt as stop:
        done, lost = (stop.done, stop.lost) if isinstance(stop, Interrupted) else ({}, {})
        for i, (_, _, trial) in enumerate(asks):
            if i not in done:
                purses[i].pay(ground.price(trial), -1)
                purses[i].pay(lost.get(i, Cost()))
        return done, False


def _plain(trial: Trial) -> Trial:
    """To the end at once, without gradient and look-ahead."""
    return replace(trial, stop=None, gradient=False, look=0, scored=True)


def _same(a: Outcome, b: Outcome, eta: float) -> bool:
    """Are they one sample? Of one noise and nothing else, too, where rounding told them apart."""
    if torch.equal(a.x, b.x):
        return True
    plain = all(
        o.trial.fresh and o.trial.injected is None and (eta if o.trial.eta is None else o.trial.eta) == 0 for o in (a, b)
    )
    return plain and torch.equal(a.trial.x, b.trial.x)


def found_of(run: Run) -> Found:
    """The best and the different ones of what is finished."""
    whole = [(o, v) for o, v in zip(run.finished, run.values, strict=True) if o.sample is not None][: run.whole]
    pool: list[tuple[Outcome, float]] = []
    for outcome, value in whole:  # a noise that was begun with twice makes one sample
        if not any(_same(o, outcome, run.ground.eta) for o, _ in pool):
            pool.append((outcome, value))
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
        gap=run.gap,
        stopped=run.stopped,
    )
