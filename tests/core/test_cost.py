"""What a run costs: counted, and said before."""

from __future__ import annotations

from typing import Any

import pytest
from core.test_backend import PROMPTS, STEPS, brightness, with_scheduler

from diffsteer import SteeredPipeline
from diffsteer.samplers import BestOfN, FeynmanKac


def test_ledger_counts_what_ran(toy_pipeline: Any) -> None:
    calls = []
    handle = toy_pipeline.unet.register_forward_hook(lambda m, a, o: calls.append(len(a[0])))
    pipe = SteeredPipeline(toy_pipeline, FeynmanKac(4, events=[0.5]), brightness, chunk=5)
    said = pipe.estimate(2, STEPS)
    out = pipe(PROMPTS, num_inference_steps=STEPS, seed=0)
    handle.remove()
    assert out.ledger.evaluations == sum(calls) == 2 * 4 * STEPS * 2 and out.ledger.forwards == len(calls)
    assert out.ledger.counts == said.counts
    assert out.ledger.decodes == out.ledger.reward_calls == 2 * 4 * 2
    unguided = pipe(PROMPTS, num_inference_steps=STEPS, seed=0, guidance_scale=1.0)
    assert unguided.ledger.counts == pipe.estimate(2, STEPS, guidance_scale=1.0).counts
    assert {"denoiser", "decode", "reward", "select", "total"} <= set(out.ledger.seconds) and out.ledger.peak_memory > 0


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("sampler", [None, BestOfN(2, eta=0.0), BestOfN(2), FeynmanKac(4)])
def test_the_estimate_is_what_is_counted(toy_pipeline: Any, name: str, sampler: Any) -> None:
    pipe = with_scheduler(toy_pipeline, name)
    for options in ({}, {"decoder": "none"}, {"choice": lambda x, p: x.mean((1, 2, 3)), "chunk": 3}):
        steered_pipe = SteeredPipeline(pipe, sampler, brightness, **options)
        said = steered_pipe.estimate(2, STEPS).counts
        counted = steered_pipe(PROMPTS, num_inference_steps=STEPS, seed=0).ledger.counts
        assert said == counted, options


def test_a_rehearsal_tells_seconds_and_memory(toy_pipeline: Any) -> None:
    said = SteeredPipeline(toy_pipeline, FeynmanKac(4), brightness).estimate(2, STEPS, rehearse="a red circle")
    assert {"denoiser", "decode", "reward", "total"} <= set(said.seconds) and said.peak_memory > 0
    assert 0 < said.seconds["denoiser"] < 60


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("DDIMScheduler", {}),
        ("EulerDiscreteScheduler", {"sigmas": [14.0, 3.0, 0.5, 0.0]}),
        ("EulerDiscreteScheduler", {"timesteps": [900, 500, 100]}),
        ("DDPMScheduler", {"timesteps": [900, 500, 100]}),
    ],
)
def test_the_estimate_knows_grids_of_ones_own(toy_pipeline: Any, name: str, grid: dict[str, Any]) -> None:
    pipe = with_scheduler(toy_pipeline, name)
    for sampler in (FeynmanKac(2), None):
        steered = SteeredPipeline(pipe, sampler, brightness)
        assert steered.estimate(2, **grid).counts == steered(PROMPTS, seed=0, **grid).ledger.counts
