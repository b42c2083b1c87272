"""A user's callback keeps its rights: it sees true steps, may change or stop a run, and what it changes lasts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffsteer import SteeredPipeline, UnsupportedError
from diffsteer.samplers import BestOfN, FeynmanKac

PROMPTS = ["a red circle", "two stars"]
STEPS = 6


def brightness(x: Tensor, prompts: object) -> Tensor:
    return 100 * x.mean((1, 2, 3))


def test_callbacks_see_true_steps_and_may_change_or_stop(toy_pipeline: Any) -> None:
    seen: list[int] = []

    def watch(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(i)
        return {"latents": kwargs["latents"] * 0 + 1} if i == STEPS - 1 else {}

    pipe = SteeredPipeline(toy_pipeline, FeynmanKac(2, events=2), brightness)
    out = pipe(PROMPTS, num_inference_steps=STEPS, seed=0, callback_on_step_end=watch)
    assert seen == list(range(STEPS)) and torch.equal(out.latents, torch.ones_like(out.latents))

    def stop(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i >= 2
        return {}

    out = pipe(PROMPTS, num_inference_steps=STEPS, seed=0, callback_on_step_end=stop)
    assert out.ledger.evaluations == 2 * 2 * 2 * 3


def test_an_interrupt_stops_every_block_at_the_same_step(toy_pipeline: Any) -> None:
    def stop(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i >= 2
        return {}

    call: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 0, "callback_on_step_end": stop}
    whole = SteeredPipeline(toy_pipeline, BestOfN(2), brightness)(PROMPTS, **call)
    parts = SteeredPipeline(toy_pipeline, BestOfN(2), brightness, chunk=3)(PROMPTS, **call)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=1e-3, atol=1e-3)


def without_guidance_after(step: int) -> Any:
    """The "dynamic guidance" of diffusers' guide: from a step on, the unconditional half is left away."""

    def change(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == step:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"]}

    return {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


@pytest.mark.parametrize("events", [(), (0.5,), "all"])
def test_what_a_callback_changes_lasts(toy_pipeline: Any, events: Any) -> None:
    call = {"num_inference_steps": STEPS, "seed": 0, **without_guidance_after(1)}
    out = SteeredPipeline(toy_pipeline, FeynmanKac(2, scale=0.0, events=events), brightness)(PROMPTS, **call)
    assert out.ledger.evaluations == 2 * 2 * (2 + 2 + (STEPS - 2))
    assert [e.done for e in out.trace.events] == sorted({*FeynmanKac(2, events=events).schedule(STEPS)})
    chain = SteeredPipeline(toy_pipeline, BestOfN(2), brightness)(PROMPTS, **call)
    assert torch.equal(out.latents, chain.latents)


def test_a_callback_does_not_change_what_is_selected(toy_pipeline: Any) -> None:
    pipe = SteeredPipeline(toy_pipeline, FeynmanKac(4, events=2), brightness)
    out = pipe(PROMPTS, num_inference_steps=9, seed=3)
    watched = pipe(PROMPTS, num_inference_steps=9, seed=3, callback_on_step_end=lambda pipe, i, t, tensors: {})
    assert bool(torch.stack([i.resampled for i in out.trace.events]).any())
    assert torch.equal(out.latents, watched.latents) and torch.equal(out.log_weights, watched.log_weights)
    assert out.ledger.counts == watched.ledger.counts


def test_in_blocks_such_a_change_is_refused(toy_pipeline: Any) -> None:
    pipe = SteeredPipeline(toy_pipeline, FeynmanKac(2, events=2), brightness, chunk=3)
    with pytest.raises(UnsupportedError, match="changes prompt_embeds.*leave chunk"):
        pipe(PROMPTS, num_inference_steps=STEPS, seed=0, **without_guidance_after(1))
    seen: list[int] = []

    def watch(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(i)
        return {"latents": tensors["latents"] * 2}

    pipe(PROMPTS, num_inference_steps=STEPS, seed=0, callback_on_step_end=watch)
    assert seen == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]


def test_a_callback_that_stops_a_run_in_one_call(toy_pipeline: Any) -> None:
    def stop(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i >= 2
        return {}

    out = SteeredPipeline(toy_pipeline, FeynmanKac(2, events=2), brightness)(
        PROMPTS, num_inference_steps=STEPS, seed=0, callback_on_step_end=stop
    )
    assert [e.done for e in out.trace.events] == [2, 4, 6] and out.ledger.forwards == 3
