"""Motion: correlations that know the motion and not the appearance, the first noise, the feature path, and the whole chain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.backend import DiffusersSession
from diffsteer.correlation import VARIANTS, correlations, cross_correlations, inconsistency, moving_mask, pairs_of, pooled
from diffsteer.guidance import Guidance
from diffsteer.guided import GuidedWalk
from diffsteer.media import as_clip
from diffsteer.rewards import ClipScore, MotionCoherence, MotionConsistency
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.shapes.clips import Clip, render_clip, sample_clip
from diffsteer.start import ReferenceNoise, low_pass, mixed_noise
from diffsteer.types import Context, DiffsteerError, UnsupportedError

CTX, PROMPT = Context(), "a red circle"


def clip_of(
    velocity: tuple[float, float], color: str = "red", shape: str = "circle", frames: int = 8, x: float = 32.0, y: float = 32.0
) -> Tensor:
    scene = sample_clip("colors", np.random.default_rng(0)).scene
    rgb = {"red": (220, 40, 40), "blue": (40, 80, 230)}[color]
    thing = replace(scene.things[0], shape=shape, color=color, x=x, y=y, r=9.0, rgb=rgb)
    return as_clip(render_clip(Clip(replace(scene, things=(thing,)), (velocity,), frames)))


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("mask", ["", "moving"])
def test_the_same_motion_of_another_thing_scores_above_another_motion(variant: str, mask: str) -> None:
    reward = MotionConsistency(clip_of((2.0, 0.0)), variant=variant, mask=mask)
    clips = [clip_of((2.0, 0.0)), clip_of((2.0, 0.0), "blue", "square"), clip_of((-2.0, 0.0)), clip_of((0.0, 0.0))]
    scores = reward.score(torch.stack(clips), [PROMPT] * 4, CTX)
    assert scores[0].abs() < 1e-6
    assert scores[1] > scores[2] and scores[1] > scores[3]


def test_correlations_are_cosines_and_pairs_are_pairs() -> None:
    x = torch.randn(2, 4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    cosines = correlations(x, pairs_of(4, "consecutive"))
    assert cosines.shape == (2, 3, 30, 30)
    one = torch.nn.functional.cosine_similarity(x[1, 1, :, 2, 3], x[1, 2, :, 4, 0], dim=0)
    assert float(cosines[1, 1, 2 * 5 + 3, 4 * 5]) == pytest.approx(float(one), abs=1e-5)
    assert [len(pairs_of(5, which).first) for which in ("consecutive", "first", "both", "all")] == [4, 4, 7, 10]
    with pytest.raises(ValueError, match="valid"):
        pairs_of(5, "none")
    assert torch.allclose(pooled(x, 4).mean((1, 3, 4)), torch.zeros(2, 3), atol=1e-6)


def test_cross_correlations_are_sums_of_products_at_a_distance() -> None:
    x, pairs = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)), pairs_of(3, "all")
    found = cross_correlations(x, pairs, floor=0.0)
    moving = x - x.mean(1, keepdim=True)
    for m, (i, j) in enumerate(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)):
        a, b = moving[1, i], moving[1, j]
        for dy, dx in ((0, 0), (2, -3), (-4, 5)):
            total = sum(
                float(a[:, p, q] @ b[:, p + dy, q + dx])
                for p in range(5)
                for q in range(6)
                if 0 <= p + dy < 5 and 0 <= q + dx < 6
            )
            assert float(found[1, m, dy, dx]) == pytest.approx(total / float(a.norm() * b.norm()), abs=1e-5)
    assert float(found.abs().max()) <= 1


def test_cross_correlations_know_how_far_a_thing_went_and_neither_where_nor_of_what_colour_it_is() -> None:
    ways = cross_correlations(clip_of((3.0, -2.0))[None], pairs_of(8, "first"), floor=0.0)[0, -1]  # over 7 frames, in pixels
    peak = int(ways.argmax())
    down, right = peak // 128, peak % 128
    assert abs((right + 64) % 128 - 64 - 21) <= 1 and abs((down + 64) % 128 - 64 + 14) <= 1
    reference, elsewhere = clip_of((2.0, 0.0)), clip_of((2.0, 0.0), "blue", x=24.0, y=44.0)
    others = torch.stack([elsewhere, clip_of((-2.0, 0.0)), clip_of((0.0, 0.0)), torch.full((8, 3, 64, 64), 0.5)])
    by_distance, by_place = (
        MotionConsistency(reference, variant=v).score(others, [PROMPT] * 4, CTX) for v in ("cross_correlation", "full")
    )
    assert float(by_distance[0]) > 1e-3 * float(by_distance[1:].max())  # all are below 0
    assert float(by_place[0]) < float(by_place[1:].max())
    assert by_distance[2] == by_distance[3]  # what stands still moves as little as a blank


def test_a_mask_takes_motions_out_of_the_reference() -> None:
    """Two things go different ways; the mask keeps one, and a clip of that one alone is then right."""
    left, right = clip_of((0.0, 2.0), x=14.0), clip_of((2.0, 0.0), x=40.0)
    both = torch.cat([left[..., :32], right[..., 32:]], -1)
    mask = torch.zeros(1, 3, 64, 64)
    mask[..., :32] = 1
    reward = MotionConsistency(both, variant="cross_correlation", mask=mask)
    scores = reward.score(torch.stack([left, right]), [PROMPT] * 2, CTX)
    assert float(scores[0]) > 0.01 * float(scores[1])


def test_other_clips_change_nothing_and_a_mask_counts_its_places_alone() -> None:
    reference, x = clip_of((2.0, 0.0)), torch.rand(3, 8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    reward = MotionConsistency(reference, mask="moving")
    together = reward.score(x, [PROMPT] * 3, CTX)
    torch.testing.assert_close(together[1:2], reward.score(x[1:2], [PROMPT], CTX))
    pairs, whole = pairs_of(8, "both"), torch.ones(8, 16, 16)
    for variant in VARIANTS:
        masked, all_places = (inconsistency(x, reference[None], pairs, variant, mask=m) for m in (whole, None))
        torch.testing.assert_close(masked, all_places, rtol=1e-4, atol=1e-6)
    mask = moving_mask(reference)
    assert mask.shape == (8, 16, 16) and 0 < float(mask.mean()) < 0.6
    elsewhere = reference.clone()
    elsewhere[:, :, :8] = torch.rand(8, 3, 8, 64)  # above where anything moves
    assert float(MotionConsistency(reference, variant="full").score(elsewhere[None], [PROMPT], CTX)) > float(
        MotionConsistency(reference, variant="full", mask="").score(elsewhere[None], [PROMPT], CTX)
    )


def test_coherence_is_best_without_jumps() -> None:
    even, jump = clip_of((2.0, 0.0)), clip_of((2.0, 0.0))
    jump[4:] = jump[4:].roll(20, -1)
    still = clip_of((0.0, 0.0))
    scores = MotionCoherence().score(torch.stack([still, even, jump]), [PROMPT] * 3, CTX)
    assert scores[0] == 0 and scores[0] > scores[1] > scores[2]


def test_mixed_noise_is_standard_normal() -> None:
    rng = torch.Generator().manual_seed(0)
    clips = [render_clip(sample_clip("colors", np.random.default_rng(i))) for i in range(12)]
    pipe = load_pipeline("shapes-motion")
    noise = torch.randn(12, 4, 8, 16, 16, generator=rng)
    mixed = torch.cat([ReferenceNoise(as_clip(c), 0.5)(noise[i : i + 1], _Encoder(pipe)) for i, c in enumerate(clips)])
    count = noise.numel()
    assert abs(float(mixed.mean())) < 4 / count**0.5
    assert abs(float(mixed.var()) - 1) < 0.03
    assert abs(float(mixed.pow(4).mean()) - 3) < 0.3
    for dim in (2, 3, 4):
        neighbours = (mixed.narrow(dim, 1, mixed.shape[dim] - 1) * mixed.narrow(dim, 0, mixed.shape[dim] - 1)).mean()
        assert abs(float(neighbours)) < 0.1
    assert float(torch.nn.functional.cosine_similarity(mixed.flatten(1), noise.flatten(1)).mean()) > 0.8
    assert torch.equal(ReferenceNoise(as_clip(clips[0]), 0.0)(noise, _Encoder(pipe)), noise)


class _Encoder:
    """What `ReferenceNoise` asks of a session."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.size = pipe, (64, 64)

    def encoded(self, frames: Tensor) -> Tensor:
        z: Tensor = self.pipe.vae.encode(frames * 2 - 1).latent_dist.mean
        return z.transpose(0, 1)[None].detach()


def test_the_band_of_mixed_noise() -> None:
    """High frequencies stay; within the band the correlation with the reference is the share."""
    rng = torch.Generator().manual_seed(1)
    noise, reference = torch.randn(400, 1, 8, 8, 8, generator=rng), torch.randn(1, 1, 8, 8, 8, generator=rng)
    low = low_pass((8, 8, 8), 0.5)
    assert 0 < float(low.mean()) < 1 and float(low[0, 0, 0]) == 1
    mixed = mixed_noise(noise, reference, 0.6, 0.5)
    dims = (-3, -2, -1)
    before, after = (torch.fft.fftn(x.double(), dim=dims) for x in (noise, mixed))
    assert torch.allclose(after * (1 - low), before * (1 - low), atol=1e-4)
    moving = torch.fft.fftn((reference - reference.mean(2, keepdim=True)).double(), dim=dims) * low
    a, b = (after * low).flatten(1), moving.flatten(1)
    share = (a * b.conj()).sum(1).real / (a.abs().square().sum(1) * b.abs().square().sum(1)).sqrt()
    assert float(share.mean()) == pytest.approx(0.6, abs=0.03)
    # every element over many rows: variance 1 but for the share of the band that is now the same in all
    assert float(mixed.var(0).mean()) == pytest.approx(1 - 0.36 * float(low.mean()), abs=0.02)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("shapes-motion")


SHORT: dict[str, Any] = {"num_inference_steps": 4, "seed": 0}


def test_the_embedded_model_makes_clips(pipe: Any) -> None:
    out = SteeredPipeline(pipe, BestOfN(2), ClipScore())([PROMPT], **SHORT)
    assert out.samples.shape == (1, 2, 8, 3, 64, 64) and out.images is not None and len(out.images[0]) == 8


@pytest.mark.parametrize(
    ("features", "clean", "network"),
    [
        ("pixels", 0.0, 0.2),
        ("network", 0.2, 0.0),
        pytest.param("pixels", 0.2, 0.0, marks=pytest.mark.slow),
        pytest.param("network", 0.0, 0.2, marks=pytest.mark.slow),
    ],
)
def test_guidance_by_motion_raises_its_reward_and_costs_what_it_declares(
    pipe: Any, features: str, clean: float, network: float
) -> None:
    reward = MotionConsistency(clip_of((2.0, 0.0)), features=features)
    plain = SteeredPipeline(pipe, BestOfN(2), reward)([PROMPT, "a blue ring"], **SHORT)
    steered = SteeredPipeline(pipe, BestOfN(2), reward, guide=Guidance(clean=clean, network=network, lowest=0.0))
    out = steered([PROMPT, "a blue ring"], **SHORT)
    assert not torch.equal(out.latents, plain.latents)
    if features == "pixels" and network:  # at x0 four steps are too few for it
        assert out.rewards.mean() > plain.rewards.mean()
    declared = steered.estimate(2, 4)
    assert {**declared.counts, "padding": 0} == {**out.ledger.counts, "padding": 0}


def test_features_of_the_network_are_a_batch_of_their_own(pipe: Any) -> None:
    """A row's guidance does not depend on the others; and with checkpointing, which runs layers again, it is the same."""
    reward = MotionConsistency(clip_of((2.0, 0.0)), features="network", variant="softmax")
    steered = SteeredPipeline(pipe, BestOfN(1), reward, guide=Guidance(clean=0.0, network=0.3, lowest=0.0))
    both = steered([PROMPT, "a blue ring"], ids=[3, 4], **SHORT)
    one = steered(["a blue ring"], ids=[4], **SHORT)
    torch.testing.assert_close(both.latents[1], one.latents[0], rtol=1e-3, atol=1e-3)
    runs = []
    hook = pipe.unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    try:
        steered(["a blue ring"], ids=[4], **SHORT)
        usual = len(runs)
        pipe.unet.enable_gradient_checkpointing()
        again = steered(["a blue ring"], ids=[4], **SHORT)
    finally:
        pipe.unet.disable_gradient_checkpointing()
        hook.remove()
    assert len(runs) - usual == usual + again.ledger.backwards, "each pass back ran the layer once more"
    torch.testing.assert_close(again.latents, one.latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_pull_towards_the_reference(pipe: Any, variant: str) -> None:
    """The guided direction is that in which the reward of the features rises: finite differences through the network."""
    reward = MotionConsistency(clip_of((2.0, 0.0)), features="network", variant=variant)
    session = DiffusersSession(pipe, [PROMPT], particles=1, seed=0, num_inference_steps=4)
    walk, k = GuidedWalk(session, Guidance(clean=0.0, network=0.3), reward, [PROMPT]), 1
    x = session.segment(session.noise(), 0, k).x
    assert walk.tapped is not None
    wanted = walk.tapped.reference(k)

    def value(state: Tensor) -> float:
        with session.tapping(reward.taps) as features:
            session.segment(state, k, k + 1)
        return float(reward.score_features(features, wanted))

    _, moved = walk._moved(x, k)
    along = moved / moved.norm()
    assert value(x + 0.5 * along) > value(x) + 1e-7 > value(x - 0.5 * along) + 2e-7
    with session.tapping(reward.taps) as features:
        gradient, _ = session.gradient(x, k, lambda x0, rows: reward.score_features(features, wanted))
    slope = (value(x + 0.2 * along) - value(x - 0.2 * along)) / 0.4
    assert slope == pytest.approx(float((gradient * along).sum()), rel=0.1)
    with pytest.raises(DiffsteerError, match="features of the network are not smoothed"):
        GuidedWalk(session, Guidance(clean=0.0, network=0.3, draws=4, smoothing=1.0), reward, [PROMPT])


@pytest.mark.parametrize("frames", [8, 11, 4])
def test_a_reference_may_be_longer_than_what_is_made(pipe: Any, frames: int) -> None:
    reference = clip_of((1.0, 0.0), frames=frames)
    run = SteeredPipeline(pipe, BestOfN(1), MotionConsistency(reference), start=ReferenceNoise(reference, 0.5))
    if frames < 8:
        with pytest.raises(DiffsteerError, match="has 4 frames, and clips of 8 are made"):
            run([PROMPT], **SHORT)
    else:
        assert run([PROMPT], **SHORT).rewards.shape == (1, 1)


@pytest.mark.parametrize("block", ["up_blocks.0", "mid_block", "down_blocks.1"])
def test_a_mask_fits_features_of_any_size(pipe: Any, block: str) -> None:
    reward = MotionConsistency(clip_of((2.0, 0.0)), features="network", mask="moving", blocks=(block,))
    guide = Guidance(clean=0.0, network=0.3, lowest=0.9)
    assert SteeredPipeline(pipe, BestOfN(1), reward, guide=guide)([PROMPT], **SHORT).ledger.backwards > 0


def test_a_still_picture_is_a_mask(tmp_path: Path) -> None:
    left = torch.zeros(1, 3, 64, 64)
    left[..., :32] = 1
    Image.fromarray((left[0].permute(1, 2, 0) * 255).byte().numpy()).save(tmp_path / "left.png")
    clips = torch.stack([clip_of((2.0, 0.0)), clip_of((-2.0, 0.0))])
    found = [MotionConsistency(clips[0], mask=m).score(clips, [PROMPT] * 2, CTX) for m in (left, str(tmp_path / "left.png"))]
    torch.testing.assert_close(*found)
    assert not torch.equal(found[0], MotionConsistency(clips[0], mask="").score(clips, [PROMPT] * 2, CTX))


def test_particles_select_by_motion(pipe: Any) -> None:
    reward = MotionConsistency(clip_of((2.0, 0.0)))
    sampler = FeynmanKac(4, events=(0.5, 0.75))
    out = SteeredPipeline(pipe, sampler, reward, start=ReferenceNoise(clip_of((2.0, 0.0)), 0.5))([PROMPT], **SHORT)
    assert float(out.rewards[0, out.chosen[0]]) == float(out.rewards.max())
    without = SteeredPipeline(pipe, sampler, reward, start=ReferenceNoise(clip_of((2.0, 0.0)), 0.0))([PROMPT], **SHORT)
    assert torch.equal(without.latents, SteeredPipeline(pipe, sampler, reward)([PROMPT], **SHORT).latents)


def wrongly(**values: Any) -> MotionConsistency:
    return MotionConsistency(**values)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MotionConsistency(variant="best"), "valid: full, softmax, displacement"),
        (lambda: MotionConsistency(pairs="some"), "valid: both"),
        (lambda: MotionConsistency(temperature=0.0), "must be positive"),
        (lambda: MotionConsistency(side=1), "at least 2"),
        (lambda: MotionConsistency(features="words"), "valid: pixels, network"),
        (lambda: MotionConsistency("/nowhere.gif"), "no such clip"),
        (lambda: MotionConsistency(clip_of((2.0, 0.0)), mask=True), "mask=True; valid"),
        (lambda: MotionConsistency(clip_of((2.0, 0.0)), mask=torch.zeros(1, 3, 8, 8)), "black all over"),
        (lambda: MotionConsistency(clip_of((0.0, 0.0)), mask="moving"), "nothing moves in the reference"),
        (lambda: MotionConsistency(features="network", blocks=()), "wants blocks"),
        (lambda: MotionConsistency(features="network", blocks=3), "blocks=3; wanted names of modules"),
        (lambda: MotionConsistency(features="network", blocks=None), "blocks=None; wanted names of modules"),
        (lambda: MotionConsistency(blocks="mid_block"), "no effect with features=pixels"),
        (lambda: wrongly(temperature="a"), "temperature='a' is no number"),
        (lambda: MotionConsistency(temperature=0.5), "no effect with variant=cross_correlation"),
        (lambda: wrongly(side=2.5), "side=2.5 is no whole number"),
        (lambda: MotionConsistency(clip_of((2.0, 0.0)), mask=None), "mask=None; valid"),
        (lambda: MotionConsistency(clip_of((2.0, 0.0)) * 255), "a clip lies in"),
        (lambda: MotionConsistency([np.zeros((8, 8, 3))] * 4), "PIL images, not ndarray"),
        (lambda: MotionConsistency(3), "a clip is a file"),
        (lambda: MotionCoherence(side=0), "at least 1"),
        (lambda: ReferenceNoise(torch.zeros(2, 3, 8, 8), share=2), "share=2"),
    ],
)
def test_wrong_values_are_told(make: Any, said: str) -> None:
    with pytest.raises(DiffsteerError, match=said):
        make()


def test_wrong_uses_are_told(pipe: Any) -> None:
    reference = clip_of((2.0, 0.0))
    through = Guidance(clean=0.0, network=0.1)
    with pytest.raises(DiffsteerError, match="has no reference"):
        SteeredPipeline(pipe, BestOfN(1), MotionConsistency())([PROMPT], **SHORT)
    with pytest.raises(DiffsteerError, match="looks at clips, but this pipeline makes images"):
        SteeredPipeline(load_pipeline(), BestOfN(1), MotionConsistency(reference))([PROMPT], **SHORT)
    with pytest.raises(DiffsteerError, match="has 4 frames"):
        SteeredPipeline(pipe, BestOfN(1), MotionConsistency(reference[:4]))([PROMPT], **SHORT)
    reading = MotionConsistency(reference, features="network")
    with pytest.raises(DiffsteerError, match="cannot be one term"):
        SteeredPipeline(pipe, BestOfN(1), reading + ClipScore(), guide=through)([PROMPT], **SHORT)
    times = MotionConsistency(reference, features="network", blocks="time_embedding")
    with pytest.raises(DiffsteerError, match="the module time_embedding gives no features of frames"):
        SteeredPipeline(pipe, BestOfN(1), times, guide=through)([PROMPT], **SHORT)
    with pytest.raises(DiffsteerError, match="clips of one frame are made"):
        MotionConsistency(reference).score(torch.rand(1, 1, 3, 64, 64), [PROMPT], CTX)
    unknown = MotionConsistency(reference, features="network", blocks="up_block.0")
    with pytest.raises(DiffsteerError, match="no module 'up_block.0'; did you mean 'up_blocks.0'"):
        SteeredPipeline(pipe, BestOfN(1), unknown, guide=through)([PROMPT], **SHORT)
    with pytest.raises(UnsupportedError, match="AnimateDiffPipeline"):
        SteeredPipeline(load_pipeline(), BestOfN(1), ClipScore(), start=ReferenceNoise(reference))([PROMPT], **SHORT)
