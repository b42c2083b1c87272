"""Sessions over an unmodified pipeline: segments, schedulers, call arguments, determinism."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from diffsteer import DiffsteerError, SteeredPipeline, UnsupportedError, steered
from diffsteer.backend import DiffusersSession
from diffsteer.particles import reindex
from diffsteer.reward import Reward
from diffsteer.samplers import DNO, DPS, BestOfN, FeynmanKac, RandomSearch, ReNO, SuccessiveHalving, ZeroOrder
from diffsteer.trial import Search
from diffsteer.types import Context

PROMPTS = ["a red circle", "two stars"]
STEPS = 6
SUPPORTED = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
]
REFUSED = ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "IPNDMScheduler", "FlowMatchHeunDiscreteScheduler"]


def brightness(x: Tensor, prompts: object) -> Tensor:
    return 100 * x.mean((1, 2, 3))


def with_scheduler(pipe: Any, name: str, **options: Any) -> Any:
    pipe = copy.copy(pipe)
    if name == "PNDMScheduler":
        options = {"skip_prk_steps": True, **options}  # as Stable Diffusion's own is configured
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return pipe


def open_session(pipe: Any, **options: Any) -> DiffusersSession:
    return DiffusersSession(pipe, PROMPTS, **{"particles": 2, "seed": 0, "num_inference_steps": STEPS, **options})


def embeddings(pipe: Any, texts: list[str]) -> Tensor:
    found: Tensor = pipe.encode_prompt(texts, "cpu", 1, False)[0]
    return found


def plain(pipe: Any, seed: int = 0, **call: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    out: Tensor = pipe(PROMPTS, num_inference_steps=STEPS, generator=generator, output_type="latent", **call).images
    return out


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_run_in_pieces_is_one_run(toy_pipeline: Any, name: str) -> None:
    session = open_session(with_scheduler(toy_pipeline, name))
    x = session.noise()
    whole = session.segment(x, 0, session.steps)
    for cut in (1, 3, session.steps - 1):
        half = session.segment(x, 0, cut)
        assert torch.equal(session.segment(half.x, cut, session.steps).x, whole.x)
    assert session.steps == STEPS and len(session.levels) == STEPS + 1
    sigmas = [float(at.sigma / at.alpha) for at in session.levels]
    assert sigmas == sorted(sigmas, reverse=True) and len(set(sigmas)) == STEPS + 1


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_sampler_none_is_the_plain_pipeline_bit_for_bit(toy_pipeline: Any, name: str) -> None:
    pipe = with_scheduler(toy_pipeline, name)
    out = SteeredPipeline(pipe, None)(PROMPTS, num_inference_steps=STEPS, seed=5)
    assert torch.equal(out.latents[:, 0], plain(pipe, 5))
    images = pipe(PROMPTS, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(5)).images
    assert out.images is not None and [i.tobytes() for i in out.images] == [i.tobytes() for i in images]
    dropped = copy.copy(pipe)
    dropped.scheduler = steered(pipe.scheduler, None)
    assert torch.equal(plain(dropped, 5), plain(pipe, 5))


@pytest.mark.parametrize("name", SUPPORTED)
def test_eta_zero_is_the_users_own_solver(toy_pipeline: Any, name: str) -> None:
    """BestOfN(1, eta=0) walks with `super().step`: bit for bit the plain pipeline from the same noise."""
    pipe = with_scheduler(toy_pipeline, name)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    out = SteeredPipeline(pipe, BestOfN(1, eta=0.0), brightness)(PROMPTS, num_inference_steps=STEPS, seed=0, latents=start)
    if name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler"):
        assert out.latents.isfinite().all()  # stochastic: its noise comes from keyed generators, not from the test's
        again = SteeredPipeline(pipe, BestOfN(1, eta=0.0), brightness)(
            PROMPTS, num_inference_steps=STEPS, seed=0, latents=start
        )
        assert torch.equal(out.latents, again.latents)
    else:
        assert torch.equal(out.latents[:, 0], plain(pipe, latents=start))


def test_own_transition_equals_ddim_and_euler(toy_pipeline: Any) -> None:
    """At a vanishing eta our formula is theirs, to rounding, also in the scaled space of the sigma classes."""
    for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        pipe = with_scheduler(toy_pipeline, name)
        start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        out = SteeredPipeline(pipe, BestOfN(1, eta=1e-9), brightness)(PROMPTS, num_inference_steps=STEPS, seed=0, latents=start)
        torch.testing.assert_close(out.latents[:, 0], plain(pipe, latents=start), rtol=1e-4, atol=1e-5)


def test_own_transition_at_eta_one_is_ddims(toy_pipeline: Any) -> None:
    """One step of DDIM(eta=1) of diffusers with our noise put into it gives our step."""
    session = open_session(toy_pipeline, particles=1)
    x = session.noise()
    ours = session.segment(x, 2, 3).x
    scheduler = diffusers.DDIMScheduler.from_config(toy_pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[2]
    words = torch.cat([embeddings(toy_pipeline, ["", ""]), embeddings(toy_pipeline, PROMPTS)])
    u, c = toy_pipeline.unet(torch.cat([x, x]), t, encoder_hidden_states=words).sample.chunk(2)
    noise = session.step_noise([0, 1], 2)
    theirs = scheduler.step(u + 7.5 * (c - u), t, x, eta=1.0, variance_noise=noise).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_schedulers_without_a_transition_are_refused_by_name(toy_pipeline: Any, name: str) -> None:
    pipe = copy.copy(toy_pipeline)
    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(UnsupportedError, match=name):
        SteeredPipeline(pipe, FeynmanKac(2), brightness)(PROMPTS, num_inference_steps=STEPS)


def test_prediction_types_and_clipping(toy_pipeline: Any) -> None:
    results = []
    for options in ({"prediction_type": "v_prediction"}, {"prediction_type": "sample"}, {"clip_sample": True}, {}):
        pipe = with_scheduler(toy_pipeline, "DDIMScheduler", **options)
        start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        out = SteeredPipeline(pipe, BestOfN(1, eta=1e-9), brightness)(PROMPTS, num_inference_steps=STEPS, seed=0, latents=start)
        torch.testing.assert_close(out.latents[:, 0], plain(pipe, latents=start), rtol=1e-3, atol=1e-4)
        results.append(out.latents)
    assert not torch.equal(results[0], results[1])
    with pytest.raises(UnsupportedError, match="thresholding"):
        open_session(with_scheduler(toy_pipeline, "DDIMScheduler", thresholding=True))


def test_the_users_pipeline_is_untouched(toy_pipeline: Any, tmp_path: Any) -> None:
    before = (
        toy_pipeline.scheduler,
        dict(vars(toy_pipeline.scheduler)),
        dict(toy_pipeline.config),
        len(toy_pipeline.unet._forward_hooks),
    )
    SteeredPipeline(toy_pipeline, FeynmanKac(2), brightness)(PROMPTS, num_inference_steps=STEPS, seed=0)
    assert toy_pipeline.scheduler is before[0] and dict(toy_pipeline.config) == before[2]
    assert set(vars(toy_pipeline.scheduler)) == set(before[1]) and len(toy_pipeline.unet._forward_hooks) == before[3]
    assert type(toy_pipeline.scheduler) is diffusers.DDIMScheduler


def test_blocks_of_rows_agree(toy_pipeline: Any) -> None:
    """Up to near-ties: where rounding turns a resampling, runs part for good. They are counted."""
    parted = 0
    for seed in range(4):
        out = {
            c: SteeredPipeline(toy_pipeline, FeynmanKac(4), brightness, chunk=c)(PROMPTS, num_inference_steps=8, seed=seed)
            for c in (None, 3, 1)
        }
        for c in (3, 1):
            for p in range(len(PROMPTS)):
                pairs = zip(out[None].trace.ancestors, out[c].trace.ancestors, strict=True)
                if all(torch.equal(a[p], b[p]) for a, b in pairs):
                    torch.testing.assert_close(out[c].latents[p], out[None].latents[p], rtol=1e-3, atol=1e-3)
                else:
                    parted += 1
    assert parted <= 1, f"{parted} of 16 groups parted"


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_nothing_to_select_is_the_chain_itself_bit_for_bit(toy_pipeline: Any, name: str) -> None:
    """K = 1, and lambda = 0, against the same steered scheduler without selection."""
    pipe = with_scheduler(toy_pipeline, name)
    for particles, sampler in ((1, FeynmanKac(1, events="all")), (3, FeynmanKac(3, scale=0.0, events="all"))):
        out = SteeredPipeline(pipe, sampler, brightness)(PROMPTS, num_inference_steps=STEPS, seed=5)
        chain = SteeredPipeline(pipe, BestOfN(particles), brightness)(PROMPTS, num_inference_steps=STEPS, seed=5)
        assert torch.equal(out.latents, chain.latents) and torch.equal(out.samples, chain.samples)
        session = open_session(pipe, particles=particles, seed=5)
        assert torch.equal(out.latents.flatten(0, 1), session.segment(session.noise(), 0, STEPS).x)


def test_deterministic_bits(toy_pipeline: Any) -> None:
    """The same bits whatever the number of prompts in the batch."""
    pipe = SteeredPipeline(toy_pipeline, FeynmanKac(3), brightness, deterministic=True, chunk=4)
    prompts = [*PROMPTS, "a blue ring"]
    together = pipe(prompts, num_inference_steps=8, seed=0)
    assert together.ledger.padding > 0 and together.ledger.evaluations == 3 * 3 * 8 * 2
    for i, prompt in enumerate(prompts):
        alone = pipe([prompt], num_inference_steps=8, seed=0, ids=[i])
        assert torch.equal(alone.samples[0], together.samples[i])
        assert torch.equal(alone.log_weights[0], together.log_weights[i]) and torch.equal(alone.log_z[0], together.log_z[i])


class Contrast(Reward):
    """Of decoded images, with a gradient, and with a product of matrices whose bits depend on how many there are."""

    name, modality, differentiable = "contrast", "image", True

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        flat = samples.flatten(1)
        mixed = torch.randn(flat.shape[1], 64, generator=torch.Generator().manual_seed(0)).to(flat)
        return (flat @ mixed).tanh().mean(1)


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSearch(3),
        SuccessiveHalving(4),
        ZeroOrder(2, 2),
        ReNO(iterations=2, rate=0.5),
        DNO(iterations=2),
        DPS(particles=2),
        FeynmanKac(2),
    ],
    ids=lambda s: s.name,
)
def test_deterministic_bits_of_searches_and_guidance(toy_pipeline: Any, sampler: Any) -> None:
    """Decoder, reward and gradients see blocks of one size, too; what fills them up is not counted."""
    options: dict[str, Any] = {"draft": False} if isinstance(sampler, Search) else {}
    pipe = SteeredPipeline(toy_pipeline, sampler, Contrast(), deterministic=True, chunk=4, **options)
    prompts = [*PROMPTS, "a blue ring"]
    together = pipe(prompts, num_inference_steps=4, seed=0)
    said = pipe.estimate(3, 4).counts
    for name in ("evaluations", "decodes", "reward_calls", "backwards"):
        assert together.ledger.counts[name] == said[name], name
    for i, prompt in enumerate(prompts):
        alone = pipe([prompt], num_inference_steps=4, seed=0, ids=[i])
        assert torch.equal(alone.samples[0], together.samples[i]) and torch.equal(alone.rewards[0], together.rewards[i])


def test_any_rows_from_any_level(toy_pipeline: Any) -> None:
    session = open_session(toy_pipeline, particles=3)
    x = session.segment(session.noise(), 0, 2)
    some = session.segment(x.x[[4, 1]], 2, 5, rows=[4, 1])
    torch.testing.assert_close(some.x, session.segment(x.x, 2, 5).x[[4, 1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(session.noise([4]), session.noise()[4:5])
    for bad in ((x.x, 3, 3), (x.x, 0, 9), (x.x[:2], 0, 1)):
        with pytest.raises(ValueError, match="cannot carry"):
            session.segment(*bad)


def test_negative_prompts_and_guidance_reach_the_pipeline(toy_pipeline: Any) -> None:
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pipe = SteeredPipeline(toy_pipeline, BestOfN(1, eta=0.0), brightness)
    for negative in ("a cross", ["a cross", "three rings"]):
        call: dict[str, Any] = {"guidance_scale": 3.0, "latents": start}
        out = pipe(PROMPTS, num_inference_steps=STEPS, seed=0, negative_prompt=negative, **call)
        negatives = [negative] * 2 if isinstance(negative, str) else negative
        torch.testing.assert_close(out.latents[:, 0], plain(toy_pipeline, negative_prompt=negatives, **call))
    with pytest.raises(DiffsteerError, match="3 negative prompts for 2"):
        pipe(PROMPTS, negative_prompt=["a", "b", "c"])


def test_a_solver_whose_history_is_not_known_is_not_cut(toy_pipeline: Any) -> None:
    session = open_session(with_scheduler(toy_pipeline, "PNDMScheduler"), eta=0.0)
    x = session.noise()
    assert session.segment(x, 0, session.steps).x.isfinite().all()
    with pytest.raises(UnsupportedError, match="PNDMScheduler itself, which runs from 0 to 7 only, not 0 to 3"):
        session.segment(x, 0, 3)


def test_a_list_of_generators_is_one_key(toy_pipeline: Any) -> None:
    pipe = SteeredPipeline(toy_pipeline, FeynmanKac(2), brightness)

    def run(*seeds: int) -> Tensor:
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return pipe(PROMPTS, num_inference_steps=3, generator=generators).latents

    assert torch.equal(run(1, 2), run(1, 2)) and not torch.equal(run(1, 2), run(1, 3))


def test_a_safety_checker_blacks_out(toy_pipeline: Any) -> None:
    pipe = copy.copy(toy_pipeline)
    pipe.safety_checker = object()

    def judge(image: Tensor, device: Any, dtype: Any) -> tuple[Tensor, list[bool]]:
        return image, [True, False]

    pipe.run_safety_checker = judge
    out = SteeredPipeline(pipe, BestOfN(1), brightness)(PROMPTS, num_inference_steps=2, seed=0)
    assert out.images is not None and out.images[0].getextrema() == ((0, 0),) * 3 != out.images[1].getextrema()


def test_lora_keeps_working(toy_pipeline: Any) -> None:
    from conftest import build_toy_pipeline
    from peft import LoraConfig

    pipe = build_toy_pipeline()
    steered_pipe = SteeredPipeline(pipe, FeynmanKac(2), brightness)
    before = steered_pipe(PROMPTS, num_inference_steps=STEPS, seed=0).latents
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    changed = steered_pipe(PROMPTS, num_inference_steps=STEPS, seed=0).latents
    pipe.unet.disable_adapters()
    assert not torch.allclose(before, changed, atol=1e-3)
    torch.testing.assert_close(steered_pipe(PROMPTS, num_inference_steps=STEPS, seed=0).latents, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"guidence_scale": 3}, "did you mean 'guidance_scale'"),
        ({"prompt_embeds": torch.zeros(1)}, "cannot be given"),
        ({"ip_adapter_image": "x"}, "cannot be given"),
        ({"latents": torch.zeros(3, 4, 8, 8)}, "3 rows; 4 are needed"),
        ({"sigmas": [1.0, 0.5]}, "2 sigmas were given: leave num_inference_steps out"),
    ],
)
def test_bad_call_arguments(toy_pipeline: Any, call: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffsteerError, match=message):
        SteeredPipeline(toy_pipeline, FeynmanKac(2), brightness)(PROMPTS, num_inference_steps=STEPS, seed=0, **call)


def test_other_pipelines_are_refused_by_name(toy_pipeline: Any) -> None:
    other = diffusers.DDIMPipeline(toy_pipeline.unet, diffusers.DDIMScheduler())
    with pytest.raises(UnsupportedError, match="DDIMPipeline cannot be steered; supported: StableDiffusionPipeline"):
        SteeredPipeline(other, FeynmanKac(2), brightness)(PROMPTS)


def test_custom_timesteps_and_sizes(toy_pipeline: Any) -> None:
    pipe = SteeredPipeline(toy_pipeline, FeynmanKac(2, events="all"), brightness)
    out = pipe(PROMPTS, seed=0, num_inference_steps=3, height=32, width=16)
    assert out.latents.shape == (2, 2, 4, 16, 8) and out.images is not None and out.images[0].size == (16, 32)
    euler = SteeredPipeline(with_scheduler(toy_pipeline, "EulerDiscreteScheduler"), FeynmanKac(2), brightness)
    assert euler(PROMPTS, seed=0, sigmas=[14.0, 3.0, 0.5, 0.0]).ledger.evaluations == 2 * 2 * 3 * 2


def test_latents_can_be_scored_without_a_decoder(toy_pipeline: Any) -> None:
    shapes = []

    def reward(x: Tensor, prompts: object) -> Tensor:
        shapes.append(tuple(x.shape))
        return x.mean((1, 2, 3))

    out = SteeredPipeline(toy_pipeline, FeynmanKac(2, events=[0.5]), reward, decoder="none")(
        PROMPTS, num_inference_steps=STEPS, seed=0
    )
    assert (
        set(shapes) == {(4, 4, 8, 8)}
        and out.ledger.decodes == 0
        and out.images is None
        and torch.equal(out.samples, out.latents)
    )


def test_selection_inside_step_and_between_segments_are_the_same(toy_pipeline: Any) -> None:
    sampler = FeynmanKac(4, events=2)
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        pipe = with_scheduler(toy_pipeline, name)
        between = SteeredPipeline(pipe, sampler, brightness)(PROMPTS, num_inference_steps=9, seed=3)
        session = open_session(pipe, particles=4, seed=3)
        start = session.noise() / session._noise_scale
        dropped = copy.copy(pipe)
        dropped.scheduler = steered(pipe.scheduler, sampler, reward=brightness, decoder=pipe, prompts=PROMPTS)
        inside = dropped(
            PROMPTS,
            num_images_per_prompt=4,
            num_inference_steps=9,
            latents=start,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images.view(2, 4, 4, 8, 8)
        steering = dropped.scheduler.steering
        assert bool(torch.stack([i.resampled for i in steering.trace.events]).any()), "something must be selected"
        order = [[c, *[k for k in range(4) if k != c]] for c in between.chosen.tolist()]
        torch.testing.assert_close(inside, reindex(between.latents, torch.tensor(order)), rtol=0, atol=0)
        for a, b in zip(between.trace.ancestors, steering.trace.ancestors, strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(steering.log_weights, reindex(between.log_weights, torch.tensor(order)), rtol=0, atol=0)
