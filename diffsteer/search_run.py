"""A search over a pipeline: its sessions, its drafts, and what comes out of it; and what it will cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffsteer.algebra import Level
from diffsteer.budget import Budget, Stopwatch
from diffsteer.draft import DEFAULT, Draft
from diffsteer.found import Found, Progress
from diffsteer.ground import Costs, DryGround, FunctionGround
from diffsteer.holdout import Selected, nothing, selected
from diffsteer.judging import Duel, RankEnsemble, positions
from diffsteer.ledger import Ledger
from diffsteer.reward import Reward, as_reward, check_gradient, prepare
from diffsteer.run import OUTPUTS, SteeredOutput, told_aside
from diffsteer.searching import explore, pays
from diffsteer.selection import Scorer, check_inputs
from diffsteer.session import Session
from diffsteer.session_ground import SessionGround
from diffsteer.trial import Search
from diffsteer.types import Context, DiffsteerError, Trace
from diffsteer.warn import Notice, warn


def maximise(
    function: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    search: Search,
    budget: Budget | None = None,
    *,
    seed: int = 0,
    watch: Callable[[Progress], None] | None = None,
) -> Found:
    """Search the noise of a bare function, without a model: every call is one evaluation and one reward.

    Args:
        function: (N, *shape) -> (N,), of standard normal noise; differentiable for searches that follow gradients.

    Raises:
        DiffsteerError: a search that wants a chain of several steps.
    """
    found = explore(search, FunctionGround(function, shape, seed), budget, watch=watch)
    _warn(search, found)
    return found[0]


def _warn(search: Search, found: Sequence[Found]) -> None:
    """Say that a result's noise is off the prior."""
    off = [f.diagnoses[0] for f in found if f.diagnoses and f.diagnoses[0].off]
    if off:
        warn(
            f"{search.name}: the noise that was found is not what the model was trained on ({off[0]}, in standard deviations "
            "of white noise): its samples may be worse than their rewards say"
        )


def check_search(search: Search, reward: Reward | None, guide: Any, draft: Any = None) -> Reward:
    """Refuse what a search cannot do.

    Args:
        draft: its drafts, whose reward it is that the search follows, if they have one.

    Raises:
        DiffsteerError: no reward; one without a gradient, or without numbers, where the search wants them; guidance beside it.
    """
    if reward is None:
        raise DiffsteerError(f"the sampler {search.name} selects by a reward: give reward=")
    if guide is not None:
        raise DiffsteerError(f"{search.name} goes with no gradient guidance: leave guide out, or search with reno or dno")
    followed = as_reward(draft.reward, reward.input) if isinstance(draft, Draft) and draft.reward is not None else reward
    if (search.numbers or search.needs_grad) and isinstance(followed, RankEnsemble | Duel):
        raise DiffsteerError(f"{search.name} wants a reward that is a number by itself, and {followed.name} only ranks")
    if search.needs_grad:
        check_gradient(followed)
    return reward


def run_search(
    make: Callable[..., Session],
    search: Search,
    reward: Reward,
    budget: Budget | None,
    draft: Draft | None,
    asked: Sequence[str],
    output: str = "best",
    choice: Reward | None = None,
    to_images: Callable[[Tensor], list[Any] | None] | None = None,
    watch: Callable[[Progress], None] | None = None,
    holdouts: Mapping[str, Reward] | None = None,
) -> SteeredOutput:
    """Search for every prompt.

    Args:
        make: from options (`ledger`, and for drafts `steps`, `decoder`, `model`, `call`) to a session over the prompts.
        choice: another reward, which chooses among what is kept. holdouts: rewards that look on: at what is kept.

    Raises:
        DiffsteerError: what `explore` refuses, and drafts whose noise is of another shape.
    """
    if output not in OUTPUTS or output == "draw":
        raise DiffsteerError(f"output={output!r}: a search has no weights to draw from; valid: best, all")
    started = time.perf_counter()
    session = make()
    ledger = session.ledger
    cheap = reward if draft is None or draft.reward is None else as_reward(draft.reward, reward.input)
    aside = dict(holdouts or {})
    for r in {id(r): r for r in (reward, cheap, choice, *aside.values()) if r is not None}.values():
        check_inputs(session.decoder is not None, r, makes=session.makes, searching=r is reward or r is cheap)
        prepare(r, asked, Context(0, session.steps, session.embedded))
    full = SessionGround(session, reward, asked)
    ground, render = full, None
    if draft is not None:
        drafting = session
        if draft.shorter or draft.decoder is not None:
            steps = draft.length(None if draft.model is not None else session.steps)
            drafting = make(ledger=ledger, steps=steps, decoder=draft.decoder, model=draft.model, call=draft.call)
        if drafting.shape != session.shape:
            raise DiffsteerError(
                f"draft: its model starts from noise of shape {drafting.shape}, not {session.shape}: they are not aligned"
            )
        ground, render = SessionGround(drafting, cheap, asked, draft.decoder is not None), full
        if draft is DEFAULT and budget is not None and not pays(budget, ground, render):
            ground, render, draft = full, None, None
    clock = Stopwatch(None if budget is None else budget.seconds)
    clock.began = started
    found = explore(
        search,
        ground,
        budget,
        render=render,
        finalists=draft.finalists if draft else 1,
        remake=draft is None or draft.shorter,
        watch=watch,
        stopwatch=clock,
    )
    _warn(search, found)
    return _output(session, found, ledger, asked, output, choice, to_images, started, aside)


def _output(
    session: Session,
    found: Sequence[Found],
    ledger: Ledger,
    asked: Sequence[str],
    output: str,
    choice: Reward | None,
    to_images: Callable[[Tensor], list[Any] | None] | None,
    started: float,
    aside: Mapping[str, Reward],
) -> SteeredOutput:
    kept, groups = max(len(f.outcomes) for f in found), len(found)
    full_rows = [[*f.outcomes, *[f.outcomes[-1]] * (kept - len(f.outcomes))] for f in found]  # the last again, without weight
    samples = torch.stack([o.sample for row in full_rows for o in row if o.sample is not None])
    latents = torch.stack([o.x for row in full_rows for o in row])
    rewards = torch.full((groups, kept), -math.inf, dtype=torch.float64)
    weights = torch.full((groups, kept), -math.inf, dtype=torch.float64)
    for p, f in enumerate(found):
        rewards[p, : len(f.values)] = torch.tensor(f.values, dtype=torch.float64)
        weights[p, : len(f.values)] = -math.log(len(f.values))
    grouped, deciding = samples.view(groups, kept, *samples.shape[1:]), rewards
    held: dict[str, Tensor] = {}
    try:
        if choice is not None:  # first: it stays though the others were stopped
            deciding, _ = _looked_at(session, grouped, found, asked, ledger, choice, {})
        if aside:
            _, held = _looked_at(session, grouped, found, asked, ledger, None, aside)
    except KeyboardInterrupt:
        found = [replace(f, stopped="interrupted") for f in found]
        told = f"was stopped after {ledger.evaluations} evaluations, while what it found was scored anew"
        with suppress(Notice):
            warn(f"the search {told}: what that would have said is left out")
    chosen = torch.tensor([positions(row[: len(f.values)])[0] for row, f in zip(deciding, found, strict=True)])
    shown = samples if output == "all" else grouped[torch.arange(groups), chosen]
    images = to_images(shown) if to_images is not None and session.decoder is not None else None
    ledger.seconds["total"] = ledger.seconds.get("total", 0.0) + time.perf_counter() - started
    ledger.close()
    return SteeredOutput(
        prompts=session.prompts,
        samples=grouped,
        latents=latents.view(groups, kept, *latents.shape[1:]),
        rewards=rewards,
        log_weights=weights,
        log_z=torch.zeros(groups, dtype=torch.float64),
        chosen=chosen,
        images=images,
        trace=Trace(searches=tuple(found)),
        ledger=ledger,
        **told_aside(kept_of(rewards, chosen), {name: kept_of(scores, chosen) for name, scores in held.items()}, held),
    )


def _looked_at(
    session: Session,
    grouped: Tensor,
    found: Sequence[Found],
    asked: Sequence[str],
    ledger: Ledger,
    choice: Reward | None,
    aside: Mapping[str, Reward],
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a choice says of what is kept, (P, K), and what rewards aside do, NaN where a prompt has less. Prompts that keep as
    much go together, so that nobody is ranked among copies."""
    numbers = [len(f.outcomes) for f in found]
    empty = torch.full(grouped.shape[:2], math.nan, dtype=torch.float64)
    deciding, held = empty.clone(), {name: empty.clone() for name in aside}
    for n in sorted(set(numbers)):
        mine = [p for p, number in enumerate(numbers) if number == n]
        texts = [asked[p] for p in mine]
        scorer = Scorer(choice, session.decoder, texts, ledger, session.embedded, session.cut, aside=aside)
        deciding[mine, :n] = scorer.score(grouped[mine, :n].flatten(0, 1), session.steps, session.steps)
        for name, said in scorer.aside_scores.items():
            held[name][mine, :n] = said
    return deciding, held


def kept_of(scores: Tensor, chosen: Tensor) -> Selected:
    """The choice among what is kept, as many for each prompt as there are."""
    each = []
    for row, k in zip(scores, chosen.tolist(), strict=True):
        there = row.isfinite()
        each.append(selected(row[there][None], there[:k].sum().view(1, 1)) if there[k] else nothing(1))
    return Selected(torch.cat([e.gains for e in each]), torch.cat([e.variances for e in each]))


def forecast_search(
    search: Search,
    budget: Budget | None,
    draft: Draft | None,
    steps: int,
    levels: Sequence[Level],
    costs: Costs,
    drafts: tuple[int, Costs] | None,
    choice: bool = False,
    holdouts: int = 0,
) -> Ledger:
    """What a search of one prompt will count: it is run without a model, on made-up rewards. Where a method's cost depends on
    rewards (depth-first, rollover, convergence) that is an example; a limit in seconds is left aside.

    Args:
        drafts: steps and costs of a draft. choice: another reward looks at what is kept; so do `holdouts`.
    """
    limits = replace(budget, seconds=None) if budget is not None else Budget()
    full = DryGround(steps, levels, costs)
    ground, render = full, None
    if draft is not None:
        ground = full if drafts is None else DryGround(drafts[0], levels if drafts[0] == steps else [], drafts[1])
        render = full
        if draft is DEFAULT and not pays(limits, ground, render):
            ground, render, draft = full, None, None
    if budget is not None and not limits:  # seconds alone: one pass
        limits = Budget()
    finalists, remake = (draft.finalists, draft.shorter) if draft else (1, True)
    found = explore(search, ground, limits, render=render, finalists=finalists, remake=remake)[0]
    spent, tiny = found.spent, ground.ledger.tiny_decodes
    return Ledger(
        evaluations=spent.evals,
        backwards=ground.ledger.backwards,
        decodes=spent.decodes - tiny,
        tiny_decodes=tiny,
        reward_calls=spent.reward_calls + choice * len(found.outcomes),
        held_out_calls=holdouts * len(found.outcomes),
    )
