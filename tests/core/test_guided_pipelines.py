"""Gradient guidance on an unmodified pipeline: real call paths, small sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.test_backend import PROMPTS, embeddings, open_session, with_scheduler
from torch import Tensor

from diffsteer import SteeredPipeline, UnsupportedError
from diffsteer.backend import DiffusersSession
from diffsteer.guidance import Guidance
from diffsteer.guided import GuidedWalk, pieces
from diffsteer.reward import FunctionReward
from diffsteer.samplers import DPS, MPGD, BestOfN, FeynmanKac, FreeDoM, UniversalGuidance

CALL: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0, "seed": 1}


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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_what_classifier_free_guidance_did_is_told_row_by_row(toy_pipeline: Any, prediction: str, chunk: int | None) -> None:
    """By hand, from the denoiser's own outputs for both texts."""
    pipe = with_scheduler(toy_pipeline, "DDIMScheduler", prediction_type=prediction)
    session = open_session(pipe, particles=1, chunk=chunk, call={"guidance_scale": 3.0})
    session.measure_pulls()
    x = session.noise()
    for k in (0, 2):
        session.segment(x, k, k + 1)
        t = session.shadow.scheduler._grid[k]
        u, c = (
            toy_pipeline.unet(x, t, encoder_hidden_states=embeddings(toy_pipeline, t_)).sample for t_ in (["", ""], PROMPTS)
        )
        factor = 3.0 * (1.0 if prediction == "epsilon" else float(session.levels[k].alpha))
        wanted = factor * (c - u).flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(session.pulls, wanted.detach(), rtol=1e-2, atol=1e-6)


def test_freedom_moves_by_a_fifth_of_what_guidance_did(toy_pipeline: Any) -> None:
    always: dict[str, Any] = {"recurrence": 1, "highest": 1.0, "lowest": 0.0}
    session = open_session(toy_pipeline, call={"guidance_scale": 3.0})
    walk = GuidedWalk(session, FreeDoM(**always).guidance, FunctionReward(red), PROMPTS)
    x = session.noise()
    moved = walk._moved(x, 1)[1].flatten(1).square().mean(1).sqrt()
    assert session.pulls is not None
    torch.testing.assert_close(moved, 0.2 * session.pulls / float(session.levels[1].alpha), rtol=1e-4, atol=1e-7)
    for call in ({"guidance_scale": 1.0}, {"guidance_scale": 0.5}):
        with pytest.raises(UnsupportedError, match="normaliser=cfg wants a pipeline under classifier-free guidance"):
            SteeredPipeline(toy_pipeline, FreeDoM(**always), red)(PROMPTS, **CALL | call)


@pytest.mark.parametrize("name", ["DDPMScheduler", "LCMScheduler", "HeunDiscreteScheduler"])
def test_solvers_that_cannot_be_cut_want_noise(toy_pipeline: Any, name: str) -> None:
    pipe = with_scheduler(toy_pipeline, name)
    with pytest.raises(UnsupportedError, match="set the sampler's eta above 0"):
        SteeredPipeline(pipe, MPGD(eta=0.0), red)(PROMPTS, **CALL)


def test_memory_that_runs_out_on_the_way_back(toy_pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are halved there, too, and the result is that of blocks of that size."""
    sampler = DPS(4, normaliser="uncertainty")
    wanted = SteeredPipeline(toy_pipeline, sampler, red, chunk=2)(PROMPTS[:1], **CALL)
    grad, raised = torch.autograd.grad, []

    def scarce(total: Tensor, leaf: Tensor, *args: Any) -> Any:
        if len(leaf) > 2:
            raised.append(len(leaf))
            raise torch.OutOfMemoryError("simulated")
        return grad(total, leaf, *args)

    monkeypatch.setattr(torch.autograd, "grad", scarce)
    out = SteeredPipeline(toy_pipeline, sampler, red, chunk="auto")(PROMPTS[:1], **CALL)
    assert raised
    torch.testing.assert_close(out.samples, wanted.samples, rtol=1e-3, atol=1e-3)


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


@pytest.mark.parametrize(
    ("guide", "through"), [(Guidance(clean=0.0, network=0.2, every=2, lowest=0.5), True), (Guidance(), False)]
)
def test_a_graph_is_built_at_guided_steps_alone(toy_pipeline: Any, guide: Guidance, through: bool) -> None:
    seen: list[bool] = []
    hook = toy_pipeline.unet.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    try:
        steered = SteeredPipeline(toy_pipeline, BestOfN(1), lambda x, prompts: x.mean((1, 2, 3)), guide=guide)
        out = steered(["a star"], num_inference_steps=6, seed=0)
    finally:
        hook.remove()
    session = DiffusersSession(toy_pipeline, ["a star"], particles=1, seed=0, num_inference_steps=6)
    guided = [guide.guides(k, session.levels[k]) for k in range(6)]
    assert any(guided) and not all(guided) and bool(out.ledger.backwards) == through
    assert seen == [g and through for g in guided]
