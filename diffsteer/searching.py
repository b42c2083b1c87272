"""The driver of searches: prompts in step with each other, each within its own budget, anytime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffsteer.budget import Budget, Cost, Purse, Stopwatch
from diffsteer.finals import Finals, price_of_final, reserve, whole_chain
from diffsteer.found import Found, Progress
from diffsteer.ground import Ask, Ground
from diffsteer.playing import Run, carried, found_of
from diffsteer.trial import Outcome, Search
from diffsteer.types import DiffsteerError
from diffsteer.warn import warn


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
    _check(search, budget, ground, render)
    purses = [Purse(budget, clock) for _ in ground.ids]
    if render is not None:
        for purse in purses:
            finalists = reserve(purse, price_of_final(render, remake), finalists, render.compared)
    runs = [Run(p, search, ground, purse, finalists) for p, purse in enumerate(purses)]
    drafts = Finals(render, remake, finalists, clock) if render is not None else None
    stops = 0  # how often Ctrl-C came
    try:
        while asks := _granted(_first(runs, clock)) or _granted(runs):
            _carry(runs, asks, ground, clock)
            if drafts is not None:
                drafts.early(runs)
            else:
                _stop_solved(runs, ground.solved)
            if watch is not None:
                best = tuple(r.finished[0].reward if r.finished else float("nan") for r in runs)
                watch(Progress(best, sum(p.share() for p in purses) / len(purses), ground.ledger.evaluations))
    except KeyboardInterrupt:
        stops = 1
        _interrupt(runs)
        _notice(search, runs, ground)
    while stops < 2:
        try:
            _finish(runs, ground, clock)
            if drafts is not None:
                drafts.complete(runs)
            break
        except KeyboardInterrupt:
            stops += 1
            if stops == 1:
                _notice(search, runs, ground)
    for run in runs:
        if not run.finished or (stops > 1 and drafts is not None and not run.finals):
            if run.stopped == "interrupted":
                raise KeyboardInterrupt("a callback interrupted the pipeline" if ground.over else "")
            raise DiffsteerError(f"{search.name}: the budget does not pay for one sample: {_price_of_one(ground, render)}")
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


def _carry(runs: Sequence[Run], asks: Sequence[Ask], ground: Ground, clock: Stopwatch) -> None:
    began = clock.now()
    done, whole = carried(ground, asks, [runs[prompt].purse for prompt, _, _ in asks])
    clock.note(sum(ground.price(trial).work for _, _, trial in asks), clock.now() - began)
    by_prompt: dict[int, list[Outcome]] = {}
    for i, outcome in sorted(done.items()):
        by_prompt.setdefault(asks[i][0], []).append(outcome)
    for prompt, mine in by_prompt.items():
        runs[prompt].told(mine, clock.elapsed, whole)
    if not whole or any(run.judge.interrupted for run in runs):
        raise KeyboardInterrupt


def _finish(runs: Sequence[Run], ground: Ground, clock: Stopwatch) -> None:
    """Bring to its end what is under way."""
    late = {run.prompt: run.late() for run in runs}
    try:
        if any(late.values()):
            _carry(runs, [ask for asks in late.values() for ask in asks], ground, clock)
    except KeyboardInterrupt:
        for prompt, asks in late.items():
            if asks:
                runs[prompt].stop("interrupted")
        raise


def _interrupt(runs: Sequence[Run], all_of_them: bool = False) -> None:
    for run in runs:
        if all_of_them or run.trials is not None or not run.finished or run.judge.interrupted:
            run.stop("interrupted")


def _notice(search: Search, runs: Sequence[Run], ground: Ground) -> None:
    """Say what Ctrl-C does, since whoever called goes on."""
    if ground.over:
        return
    empty = sum(run.empty for run in runs)
    plain = f"{empty} of {len(runs)} prompts, which have nothing yet, get a plain chain, " if empty else ""
    warn(
        f"{search.name} was stopped after {ground.ledger.evaluations} evaluations: {plain}the best so far is brought to its "
        "end and returned; another Ctrl-C before that ends at once, without it"
    )


def _stop_solved(runs: Sequence[Run], solved: float) -> None:
    for run in runs:
        if run.finished and run.finished[0].reward >= solved and run.stopped != "solved":
            run.stop("solved")


def _check(search: Search, budget: Budget, ground: Ground, render: Ground | None) -> None:
    one = ground.price(whole_chain(ground)).plus(render.price(whole_chain(render)) if render is not None else Cost())
    limits = budget.limits()
    if budget and budget.seconds is None and not any(getattr(one, name) for name in limits):
        raise DiffsteerError(
            f"budget: {next(iter(limits))} ends nothing here, where a sample costs none: give evals or seconds"
        )
    if any(limit < getattr(one, name) for name, limit in limits.items()):
        raise DiffsteerError(f"{search.name}: the budget does not pay for one sample: {_price_of_one(ground, render)}")


def _price_of_one(ground: Ground, render: Ground | None) -> str:
    cost = ground.price(whole_chain(ground))
    if render is not None:
        cost = cost.plus(render.price(whole_chain(render)))
    return f"that takes evals={cost.evals}, decodes={cost.decodes}, reward_calls={cost.reward_calls}"
