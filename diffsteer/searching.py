"""The driver of searches: prompts in step with each other, each within its own budget, anytime."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from diffsteer.budget import Budget, Cost, Purse, Stopwatch
from diffsteer.finals import Finals, price_of_final, reserve, whole_chain
from diffsteer.found import Found, Progress
from diffsteer.ground import Ask, Ground
from diffsteer.judging import PAIR
from diffsteer.playing import Run, carried, found_of
from diffsteer.trial import Outcome, Search
from diffsteer.types import DiffsteerError
from diffsteer.warn import Notice, warn


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
        KeyboardInterrupt: a second Ctrl-C, before every prompt had a sample; the first one ends the search with what there is,
            and with a plain chain of a prompt that has nothing.
    """
    budget = budget or Budget()
    clock = stopwatch or Stopwatch(budget.seconds)
    clock.prompts = len(ground.ids)
    _check(search, budget, ground, render, remake)
    purses = [Purse(budget, clock) for _ in ground.ids]
    if render is not None:
        for purse in purses:
            finalists = reserve(purse, price_of_final(render, remake), finalists, render.compared)
    runs = [Run(p, search, ground, purse, finalists) for p, purse in enumerate(purses)]
    drafts = Finals(render, remake, finalists, clock) if render is not None else None
    stops = Stops(search, runs, [ground] if render is None else [ground, render])
    try:
        while asks := _granted(_first(runs, clock)) or _granted(runs):
            _carry(runs, asks, ground, clock, stops)
            if drafts is not None:
                drafts.early(runs)
            else:
                _stop_solved(runs, ground.solved)
            if watch is not None:
                best = tuple(r.finished[0].reward if r.finished else float("nan") for r in runs)
                watch(Progress(best, sum(p.share() for p in purses) / len(purses), ground.ledger.evaluations))
    except KeyboardInterrupt as stop:
        _interrupt(runs)
        stops.note(stop)
    while not stops.at_once:
        try:
            _finish(runs, ground, clock, stops)
            if drafts is not None:
                drafts.complete(runs)
            break
        except KeyboardInterrupt as stop:
            stops.note(stop)
    for run in runs:
        if not run.finished or (stops.at_once and drafts is not None and not run.finals):
            if stops.count:
                raise KeyboardInterrupt("a callback interrupted the pipeline" if stops.over else "")
            raise DiffsteerError(_not_paid(search, _price_of_one(ground, render, remake)))
    told = found_of if drafts is None else drafts.told
    try:
        return [told(run) for run in runs]
    except KeyboardInterrupt:
        _interrupt(runs, all_of_them=True)
        return [told(run) for run in runs]


def _granted(runs: Sequence[Run]) -> list[Ask]:
    return [ask for run in runs for ask in run.granted()]


def _first(runs: Sequence[Run], clock: Stopwatch) -> Sequence[Run]:
    """Where time is limited, prompts that have nothing yet come before those that have."""
    waiting = [run for run in runs if run.trials is not None and not (run.finished or run.waiting)]
    return waiting if clock.limit is not None and waiting else runs


class Noted(KeyboardInterrupt):
    """Ctrl-C that was noted already."""


class Stops:
    """How often Ctrl-C came: the first one ends a search with the best so far, another one at once; so does a user's callback
    that ended the pipeline."""

    def __init__(self, search: Search, runs: Sequence[Run], grounds: Sequence[Ground]) -> None:
        self.search, self.runs, self.grounds, self.count = search, runs, grounds, 0

    @property
    def over(self) -> bool:
        return any(ground.over for ground in self.grounds)

    @property
    def at_once(self) -> bool:
        return self.count > 1 or self.over

    def note(self, stop: KeyboardInterrupt | None = None, done: Collection[int] = ()) -> None:
        """One more; say what the first one does, since whoever called goes on.

        Args:
            done: prompts of which something is there though their runs do not know of it yet.
        """
        if isinstance(stop, Noted):
            return
        self.count += 1
        if self.count > 1 or self.over:
            return
        empty = sum(not (run.finished or run.waiting or run.prompt in done) for run in self.runs)
        plain = f"{empty} of {len(self.runs)} prompts, which have nothing yet, get a plain chain, " if empty else ""
        with suppress(Notice):  # where warnings are errors the result matters more
            warn(
                f"{self.search.name} was stopped after {self.grounds[0].ledger.evaluations} evaluations: {plain}"
                "the best so far is brought to its end and returned; another Ctrl-C before that ends at once"
            )


def _carry(runs: Sequence[Run], asks: Sequence[Ask], ground: Ground, clock: Stopwatch, stops: Stops) -> None:
    began = clock.now()
    done, whole = carried(ground, asks, [runs[prompt].purse for prompt, _, _ in asks])
    clock.note(sum(ground.price(trial).work for _, _, trial in asks), clock.now() - began)
    by_prompt: dict[int, list[Outcome]] = {}
    for i, outcome in sorted(done.items()):
        by_prompt.setdefault(asks[i][0], []).append(outcome)
    if not whole:
        stops.note(done=by_prompt)
    before = [run.judge.interrupted for run in runs]
    for prompt, mine in by_prompt.items():
        runs[prompt].told(mine, clock.elapsed, whole)
    judged = [run.judge.interrupted for run in runs] == before
    if not judged:
        stops.note()
    if not (whole and judged):
        raise Noted


def _finish(runs: Sequence[Run], ground: Ground, clock: Stopwatch, stops: Stops) -> None:
    """Bring to its end what is under way."""
    late = {run.prompt: run.late() for run in runs}
    try:
        if any(late.values()):
            _carry(runs, [ask for asks in late.values() for ask in asks], ground, clock, stops)
    except KeyboardInterrupt:
        for prompt, asks in late.items():
            if asks:
                runs[prompt].stop("interrupted")
        raise


def _interrupt(runs: Sequence[Run], all_of_them: bool = False) -> None:
    for run in runs:
        if all_of_them or run.trials is not None or not run.finished or run.judge.interrupted:
            run.stop("interrupted")


def _stop_solved(runs: Sequence[Run], solved: float) -> None:
    for run in runs:
        if run.finished and run.finished[0].reward >= solved and run.stopped != "solved":
            run.stop("solved")


def _check(search: Search, budget: Budget, ground: Ground, render: Ground | None, remake: bool) -> None:
    one = _price_of_one(ground, render, remake)
    compares = ground.compared or (render is not None and render.compared)
    ends = one._replace(reward_calls=max(one.reward_calls, compares * PAIR.reward_calls))
    if budget and budget.seconds is None and not any(getattr(ends, name) for name in budget.limits()):
        raise DiffsteerError(
            f"budget: {next(iter(budget.limits()))} ends nothing here, where a sample costs none: give evals or seconds"
        )
    if not pays(budget, ground, render, remake):
        raise DiffsteerError(_not_paid(search, one))


def pays(budget: Budget, ground: Ground, render: Ground | None = None, remake: bool = True) -> bool:
    """Do its counts pay for one sample, a draft of it included?"""
    one = _price_of_one(ground, render, remake)
    return all(getattr(one, name) <= limit for name, limit in budget.limits().items())


def _price_of_one(ground: Ground, render: Ground | None, remake: bool) -> Cost:
    cost = ground.price(whole_chain(ground))
    return cost if render is None else cost.plus(price_of_final(render, remake))


def _not_paid(search: Search, cost: Cost) -> str:
    return (
        f"{search.name}: the budget does not pay for one sample: that takes evals={cost.evals}, decodes={cost.decodes}, "
        f"reward_calls={cost.reward_calls}"
    )
