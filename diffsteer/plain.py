"""The user's own pipeline as it is: only counted, and scored at the end."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffsteer.callable import CallableModel
from diffsteer.holdout import HeldOut, nothing
from diffsteer.ledger import Ledger
from diffsteer.reward import prepare
from diffsteer.run import SteeredOutput
from diffsteer.selection import Scorer, check_inputs
from diffsteer.types import Context, Trace, UnsupportedError

if TYPE_CHECKING:
    from diffsteer.pipeline import SteeredPipeline


def begin_plain(
    steered: SteeredPipeline,
    prompts: list[Any],
    asked: list[str],
    generator: torch.Generator | Sequence[torch.Generator],
    negative_prompt: Any,
    latents: Tensor | None,
    call: dict[str, Any],
) -> Callable[[], SteeredOutput]:
    """The user's own pipeline, scheduler and generator; only counted. What is returned decodes and scores what came of it."""
    if isinstance(steered.pipe, CallableModel):
        raise UnsupportedError("a CallableModel has no sampler of its own; BestOfN(particles=1, eta=0) is the plain ODE")
    from diffsteer.hooks import Watch, watching
    from diffsteer.pipes import as_images, asked_of, check_call, check_pipeline, decoder_of, denoisers_of, is_guided
    from diffsteer.scheduler import install
    from diffsteer.segments import Record
    from diffsteer.shapes.models import is_embedded, recommended

    family = check_pipeline(steered.pipe)
    check_call(steered.pipe, call)
    ledger, started = Ledger().open(), time.perf_counter()
    embedded = is_embedded(steered.pipe)
    aside = steered.holdouts
    check_inputs(steered.decoder != "none", steered.reward, steered.choice, *aside.values(), makes=family.makes)
    for reward in (steered.reward, steered.choice, *aside.values()):
        if reward is not None:
            prepare(reward, asked, Context(embedded=embedded))
    shadow = copy.copy(steered.pipe)
    call = recommended(steered.pipe) | call
    asking = asked_of(steered.pipe, prompts)
    if negative_prompt is not None:
        asking["negative_prompt"] = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
    if latents is not None:
        asking["latents"] = latents
    record = Record(family.doubled and is_guided(steered.pipe, call | {"negative_prompt": negative_prompt}))
    shadow.scheduler = install(steered.pipe.scheduler, record)
    with watching(Watch(ledger), *denoisers_of(steered.pipe)):
        own = shadow(**asking, generator=generator, **call, **({"output_type": "latent"} if family.returns_states else {}))
    x = own[0] if family.returns_states else record.x
    decode = decoder_of(steered.pipe, **call) if steered.decoder != "none" else None
    scorer = Scorer(steered.reward, decode, asked, ledger, embedded, aside=aside)
    ledger.add("total", time.perf_counter() - started)
    images = partial(as_images, steered.pipe) if steered.decoder != "none" else None

    def finish() -> SteeredOutput:
        with torch.no_grad():
            return _finished(prompts, scorer, x, record.steps, images)

    return finish


def _finished(
    prompts: list[Any], scorer: Scorer, x: Tensor, steps: int, images: Callable[[Tensor], list[Any] | None] | None
) -> SteeredOutput:
    started, ledger = time.perf_counter(), scorer.ledger
    samples = scorer.decode(x)
    rewards = scorer.score(samples, steps, steps)
    ledger.add("total", time.perf_counter() - started)
    ledger.close()
    flat = torch.zeros(len(prompts), 1, dtype=torch.float64)
    return SteeredOutput(
        prompts=prompts,
        samples=samples[:, None],
        latents=x[:, None],
        rewards=rewards,
        log_weights=flat,
        log_z=flat[:, 0],
        chosen=flat[:, 0].long(),
        images=None if images is None else images(samples),
        trace=Trace(),
        ledger=ledger,
        held_out={name: HeldOut(scores, nothing(len(prompts))) for name, scores in scorer.aside_scores.items()},
    )
