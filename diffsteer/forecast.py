"""What a call of a steered pipeline will count, before it runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffsteer.algebra import NO_SIGNAL, Level
from diffsteer.blocks import Blocks
from diffsteer.callable import CallableModel
from diffsteer.classifier_free import PULLS
from diffsteer.draft import on_grid
from diffsteer.grids import explicit
from diffsteer.ground import Costs
from diffsteer.guidance import Guidance
from diffsteer.guided import pieces
from diffsteer.judging import Duel
from diffsteer.ledger import Ledger
from diffsteer.run import timing_of
from diffsteer.schedules import Given
from diffsteer.search_run import forecast_search
from diffsteer.trial import Search, Single
from diffsteer.types import Sampler, UnsupportedError

if TYPE_CHECKING:
    from diffsteer.pipeline import SteeredPipeline


def forecast(
    steered: SteeredPipeline, prompts: int, num_inference_steps: int | None, rehearse: str | None, call: dict[str, Any]
) -> Ledger:
    """See `SteeredPipeline.estimate`."""
    facts: dict[str, Any] = {}
    schedule, call = explicit(steered.pipe, steered.schedule, call, steered.sampler is not None, steered.transition)
    if isinstance(schedule, Given) and num_inference_steps is None:
        num_inference_steps = len(schedule.values)
    guided, steps, size = False, num_inference_steps or 50, Blocks(steered.chunk).size
    levels: list[Level] = []
    if not isinstance(steered.pipe, CallableModel):
        from diffsteer.pipes import check_pipeline, is_guided, skipped_steps
        from diffsteer.segments import grid_of
        from diffsteer.shapes.models import recommended

        family = check_pipeline(steered.pipe)
        facts = {"apart": family.apart}
        known = recommended(steered.pipe) | {k: v for k, v in call.items() if v is not None}
        guided = is_guided(steered.pipe, known)
        moves = steered.guide or getattr(steered.sampler, "guidance", None)
        if moves is not None and moves.measures_pulls and not guided:
            raise UnsupportedError(PULLS)
        asked = num_inference_steps or known.get("num_inference_steps")
        eta = None if steered.sampler is None or steered.transition == "native" else steered.sampler.eta
        steps, levels = grid_of(steered.pipe, asked, known, eta, schedule, steered.own_transition())
        facts["further"] = skipped_steps(steered.pipe, steps, known)
        if family.entry == "step" and isinstance(steered.sampler, Sampler):
            cut = steered.deterministic or (size is not None and size < prompts * steered.sampler.particles)
            facts |= {"entered": len(steered.sampler.schedule(steps)) if cut else 0, "enters": True}
    if isinstance(steered.sampler, Search):
        return _of_search(steered, prompts, num_inference_steps, steps, levels, guided, facts, rehearse, call)
    decoded = steered.decoder != "none" if not isinstance(steered.pipe, CallableModel) else steered.pipe.decode is not None
    assert not isinstance(steered.sampler, Search)
    said = estimate(
        steered.sampler,
        prompts,
        steps,
        guided=guided,
        decoded=decoded,
        rewards=0 if steered.reward is None else 1 + (steered.choice is not None and steered.sampler is not None),
        chunk=None if steered.sampler is None else 8 if steered.deterministic and steered.chunk is None else size,
        experts=len(steered.experts),
        tiny=steered.decoder.startswith("tiny"),
        tapped=steered.reward is not None and bool(steered.reward.taps),
        holdouts=len(steered.holdouts),
        guide=steered.guide,
        levels=steered.pipe.grid(steps, schedule)[1] if isinstance(steered.pipe, CallableModel) else levels,
        **facts,
    )
    if rehearse is not None:
        particles = steered.sampler.particles if steered.sampler else 1
        together = prompts if size is None else min(prompts, math.ceil(size / particles))
        shorter = copy.copy(steered)
        shorter.schedule = None
        tried = shorter([rehearse] * together, num_inference_steps=2, seed=0, **call).ledger
        for stage, count in (("denoiser", "evaluations"), ("decode", "decodes"), ("reward", "reward_calls")):
            if tried.counts[count]:
                said.seconds[stage] = tried.seconds[stage] / tried.counts[count] * said.counts[count]
        said.seconds["total"] = sum(said.seconds.values())
        said.peak_memory = tried.peak_memory
    return said


def _of_search(
    steered: SteeredPipeline,
    prompts: int,
    asked: int | None,
    steps: int,
    levels: list[Level],
    guided: bool,
    facts: dict[str, Any],
    rehearse: str | None,
    call: dict[str, Any],
) -> Ledger:
    """Of a search: it is played on made-up rewards, and with `rehearse` one plain chain is run for the seconds."""
    assert isinstance(steered.sampler, Search)
    draft = on_grid(steered.draft, steered.schedule, call)
    toy = isinstance(steered.pipe, CallableModel)
    if isinstance(steered.pipe, CallableModel):
        levels = steered.pipe.grid(steps, steered.schedule)[1]
        decoded = steered.pipe.decode is not None
    else:
        decoded = steered.decoder != "none"
    experts, begun = len(steered.experts), getattr(steered.start, "evaluations", 0)
    further = 0 if toy else int(facts.get("further", 0)) * experts
    tiny = decoded and steered.decoder.startswith("tiny")
    costs = Costs((1 + guided) * experts, further, begun, decoded, isinstance(steered.reward, Duel), tiny)
    drafts = None
    if draft is not None and draft.reward is not None:
        drafts = (steps, replace(costs, compared=isinstance(draft.reward, Duel)))
    if draft is not None and draft.decoder is not None:
        drafts = (steps, replace(costs if drafts is None else drafts[1], tiny=True, tiny_finals=True))
    if draft is not None and draft.shorter:
        model, length = draft.model, draft.length(None if draft.model is not None else steps)
        each = costs if drafts is None else drafts[1]
        if model is not None and not isinstance(model, CallableModel):
            from diffsteer.pipes import is_guided
            from diffsteer.segments import grid_of
            from diffsteer.shapes.models import recommended

            known = recommended(model) | dict(draft.call)
            each = replace(each, per_step=(1 + is_guided(model, known)) * experts)
            length = grid_of(model, length or known.get("num_inference_steps"), known, 0.0, None, True)[0]
        drafts = (length or 50, each)
    chooses, held = steered.choice is not None, len(steered.holdouts)
    said = forecast_search(steered.sampler, steered.budget, draft, steps, levels, costs, drafts, chooses, held)
    total = Ledger()
    for name, number in said.counts.items():
        setattr(total, name, number * prompts)
    if rehearse is not None:
        alone = copy.copy(steered)
        alone.sampler, alone.draft, alone.budget = Single(), None, None
        tried = alone([rehearse], num_inference_steps=asked, seed=0, **call).ledger
        for stage, key in (("denoiser", "evaluations"), ("decode", "decodes"), ("reward", "reward_calls")):
            if tried.counts[key]:
                total.seconds[stage] = tried.seconds[stage] / tried.counts[key] * total.counts[key]
        total.seconds["total"], total.peak_memory = sum(total.seconds.values()), tried.peak_memory
    return total


def estimate(
    sampler: Sampler | None,
    prompts: int,
    steps: int,
    *,
    guided: bool = False,
    apart: bool = False,
    decoded: bool = True,
    rewards: int = 1,
    chunk: int | None = None,
    experts: int = 1,
    tiny: bool = False,
    entered: int = 0,
    further: int = 0,
    guide: Guidance | None = None,
    levels: Sequence[Level] | None = None,
    enters: bool = False,
    tapped: bool = False,
    holdouts: int = 0,
) -> Ledger:
    """The counts that a run will have, before it runs: equal to what it then counts, the padding of blocks aside.

    Args:
        steps: T, as the scheduler's grid has them.
        guided: classifier-free guidance doubles the evaluations; `apart`: in two forwards instead of one.
        decoded: samples are decoded before they are scored; `tiny`: by a tiny decoder, but for the last time.
        rewards: 0 without a reward, 1 with one, 2 with another for the final choice.
        chunk: rows in a block. experts: predictions that are mixed for each row.
        entered: how many segments a row enters by an evaluation of its own.
        further: steps at which every row is evaluated once more.
        guide: gradient guidance beside the sampler's own, if it has any. levels: of the grid; without them all are guided.
        enters: `entered` holds for guided segments, too.
        holdouts: rewards that look on.
        tapped: guidance through the network reads its features, and evaluates a row a prompt for the reference's.
    """
    rows, events = (prompts, 1) if sampler is None else (prompts * sampler.particles, len(sampler.schedule(steps)))
    guide = guide or getattr(sampler, "guidance", None)
    timing = timing_of(sampler, guide)
    if timing is not None:
        blind = sum(float(at.alpha) < NO_SIGNAL for at in levels or ())
        steps, entered = timing.evaluations(steps, blind) + steps * timing.calibrates, 0
    visits = looks = features = 0
    if guide is not None:
        moved = steps - 1 if sampler is not None and sampler.exact else steps  # without noise no weight could know
        on = max(guide.clean, guide.network) > 0
        guides = [on and (guide.guides(k, levels[k]) if levels else k % guide.every == 0) for k in range(moved)]
        visits = sum(guides) * guide.recurrence
        looks = rows * visits * guide.draws * ((guide.network > 0) + (guide.clean > 0) * guide.iterations)
        features = visits * rows * guide.draws if tapped and guide.network > 0 else 0  # rewards without a decode
        if enters and sampler is not None:
            entered = pieces(guides, guide.recurrence, sampler.schedule(steps))
        steps += visits - sum(guides)
    steps += entered
    read = visits if features else 0
    return Ledger(
        evaluations=(rows * (steps * (1 + guided) + further) + read * prompts * (1 + guided)) * experts,
        forwards=(steps * (1 + (guided and apart)) + further) * math.ceil(rows / (chunk or rows)) + read * prompts,
        backwards=rows * visits if guide is not None and guide.network > 0 else 0,
        decodes=rows * (1 if tiny else events) + looks - features if decoded else 0,
        tiny_decodes=rows * (events - 1) if decoded and tiny else 0,
        reward_calls=rows * (events * (rewards > 0) + (rewards > 1)) + looks,
        held_out_calls=rows * events * holdouts,
    )
