"""Gradient guidance on an unmodified pipeline: real call paths, small sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffsteer import SteeredPipeline
from diffsteer.guidance import Guidance
from diffsteer.guided import pieces
from diffsteer.samplers import DPS, MPGD, BestOfN, FeynmanKac, UniversalGuidance

CALL: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0, "seed": 1}
PROMPTS = ["a red star", "two blue rings"]


def red(images: Tensor, prompts: list[str]) -> Tensor:
    """How much redder an image is than blue."""
    return (images[:, 0] - images[:, 2]).flatten(1).mean(1)


@pytest.mark.parametrize(
    "sampler", [MPGD(2), DPS(2, normaliser="uncertainty"), UniversalGuidance(2, iterations=1)], ids=lambda s: s.name
)
def test_guidance_raises_the_reward_in_blocks_as_in_one(toy_pipeline: Any, sampler: Any) -> None:
    plain = SteeredPipeline(toy_pipeline, BestOfN(2), red)(PROMPTS, **CALL)
    pipe = SteeredPipeline(toy_pipeline, sampler, red)
    out = pipe(PROMPTS, **CALL)
    assert bool((out.rewards > plain.rewards).all())
    assert out.ledger.counts == pipe.estimate(2, 5, guidance_scale=3.0).counts
    blocks = SteeredPipeline(toy_pipeline, sampler, red, chunk=3)(PROMPTS, **CALL)
    torch.testing.assert_close(blocks.samples, out.samples, rtol=1e-3, atol=1e-3)
    assert blocks.ledger.backwards == out.ledger.backwards
    assert not any(p.grad is not None for part in (toy_pipeline.unet, toy_pipeline.vae) for p in part.parameters())
    off = SteeredPipeline(toy_pipeline, BestOfN(2), red, guide=Guidance(clean=0.0))(PROMPTS, **CALL)
    torch.testing.assert_close(off.samples, plain.samples)


def test_guidance_beside_weighted_particles(toy_pipeline: Any) -> None:
    pipe = SteeredPipeline(toy_pipeline, FeynmanKac(3), red, guide=MPGD(strength=0.1))
    out, again = pipe(PROMPTS, **CALL), pipe(PROMPTS[1:], ids=[1], **CALL)
    alone = SteeredPipeline(toy_pipeline, FeynmanKac(3), red)(PROMPTS, **CALL)
    assert out.ledger.reward_calls == alone.ledger.reward_calls + 2 * 3 * 4  # of the last step no weight could know
    assert not torch.allclose(out.samples, alone.samples)
    torch.testing.assert_close(again.samples[0], out.samples[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out.log_weights.exp().sum(1), torch.ones(2, dtype=torch.float64))


def test_pieces_of_a_walk() -> None:
    assert pieces([False] * 6, 1, (2, 6)) == 2
    assert pieces([True] * 6, 2, (6,)) == 12
    assert pieces([False, True, False, False, True, False], 3, (3, 6)) == 1 + 3 + 1 + 1 + 3 + 1


def test_a_class_that_enters_by_a_step_pays_for_each_piece() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    drawn = SteeredPipeline(DDPMPipeline(network, DDPMScheduler()), DPS(2, normaliser="uncertainty"), red)
    out = drawn([""], num_inference_steps=4, seed=0)
    assert out.ledger.counts == drawn.estimate(1, 4).counts
    assert out.ledger.evaluations == 2 * (4 + 4)
