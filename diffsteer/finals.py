"""Drafts made in full: how many the budget keeps room for, which, and when."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffsteer.budget import Cost, Purse, Stopwatch
from diffsteer.found import Found, gap_of
from diffsteer.ground import Ground
from diffsteer.playing import Run, carried, found_of
from diffsteer.trial import Outcome, Trial


def whole_chain(ground: Ground) -> Trial:
    return Trial(torch.empty(ground.shape), fresh=True)


def price_of_final(render: Ground, remake: bool) -> Cost:
    """What one final costs."""
    return render.price(whole_chain(render) if remake else Trial(torch.empty(0), render.steps))


def reserve(purse: Purse, each: Cost, finalists: int, compared: bool = False) -> int:
    """Keep back what the finals cost, for as many as at most half of the budget pays for, one at least; `compared`: in duels,
    where everybody meets everybody, in both orders."""

    def all_of(number: int) -> Cost:
        return Cost().plus(each, number).plus(Cost(reward_calls=compared * number * (number - 1)))

    limits = purse.budget.limits()
    while finalists > 1 and any(2 * getattr(all_of(finalists), name) > limit for name, limit in limits.items()):
        finalists -= 1
    purse.reserve = all_of(finalists)
    return finalists


class Finals:
    """What becomes of drafts."""

    def __init__(self, render: Ground, remake: bool, finalists: int, clock: Stopwatch) -> None:
        self.render, self.remake, self.finalists, self.clock = render, remake, finalists, clock
        self.price = price_of_final(render, remake)

    def make(self, chosen: Sequence[tuple[Run, Outcome]]) -> None:
        """Finals of drafts, paid from what was kept back."""
        asks, pending = [], self.clock.pending
        for run, draft in chosen:
            run.purse.reserve = Cost(*(max(0, a - b) for a, b in zip(run.purse.reserve, self.price, strict=True)))
            again = Trial(draft.x, self.render.steps, injected=draft.trial.injected, **draft.line)
            if self.remake:
                assert draft.root is not None
                again = Trial(draft.root, fresh=True, root=draft.root)
            asks.append(run.ask(again, self.render))
        done, whole = carried(self.render, asks, [run.purse for run, _ in chosen])
        self.clock.pending = pending
        for i, final in sorted(done.items()):
            run, final.drafted = chosen[i]
            run.finals.append(final)
        if not whole:
            raise KeyboardInterrupt

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

    def complete(self, runs: Sequence[Run]) -> None:
        """Make the best drafts of each prompt in full; after Ctrl-C one of each that has none.

        Raises:
            KeyboardInterrupt: not all of them were made.
        """
        asked = [(run, draft) for run in runs for draft in self.chosen(run)]
        try:
            self.make(asked)
        except KeyboardInterrupt:
            for run, draft in asked:
                if all(final.drafted is not draft for final in run.finals):
                    run.stopped = "interrupted"
            raise

    def told(self, run: Run) -> Found:
        """What was made in full of one prompt's drafts, ranked anew."""
        if not run.finals:
            return found_of(run)
        if run.gap is None:
            drafts = [f.drafted for f in run.finals if f.drafted is not None]
            before, run.judge = run.judge, self.render.judge(run.prompt, run.purse)
            run.pool(run.finals)
            if run.judge.interrupted:
                run.stopped = "interrupted"
            run.gap = gap_of(drafts, run.finals, before, run.judge, together=run.ground.alike(self.render))
            run.scored += len(run.finals)
            run.history.append((run.purse.spent.evals, self.clock.elapsed, run.finished[0].reward))
        return found_of(run)

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
            limits = run.purse.budget.limits()
            if (chosen or made) and any(getattr(spent, name) > limit for name, limit in limits.items()):
                break
            chosen.append(draft)
        return chosen
