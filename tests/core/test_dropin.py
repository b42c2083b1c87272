"""The scheduler put on a pipeline by hand: a real scheduler of the user's class, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from families.toys import TOYS
from torch import Tensor

from diffsteer import DiffsteerError, SteeredPipeline, UnsupportedError, decoder_of, steered
from diffsteer.samplers import MPGD, BestOfN, EpsilonScaling, FeynmanKac, TimeShift
from diffsteer.schedules import Karras

PROMPTS = ["a red circle", "two stars"]


def brightness(x: Tensor, prompts: object) -> Tensor:
    return 100 * x.mean((1, 2, 3))


def put(pipe: Any, sampler: Any, **options: Any) -> Any:
    pipe = copy.copy(pipe)
    options = {"reward": brightness, "decoder": pipe, "prompts": PROMPTS, **options}
    pipe.scheduler = steered(pipe.scheduler, sampler, **options)
    return pipe


def call(pipe: Any, seed: int = 0, **options: Any) -> Tensor:
    options = {"num_images_per_prompt": 4, "num_inference_steps": 10, "output_type": "latent", **options}
    generator = torch.Generator().manual_seed(seed)
    images: Tensor = pipe(PROMPTS, generator=generator, **options).images
    return images


def test_it_is_a_scheduler_of_the_users_class(toy_pipeline: Any) -> None:
    old = toy_pipeline.scheduler
    new = steered(old, FeynmanKac(4), reward=brightness, decoder=toy_pipeline, prompts=PROMPTS)
    assert isinstance(new, diffusers.DDIMScheduler) and isinstance(new, diffusers.SchedulerMixin)
    assert new.config == old.config and type(old) is diffusers.DDIMScheduler and new.init_noise_sigma == old.init_noise_sigma
    deep = copy.deepcopy(new)
    assert isinstance(deep, type(new))
    for name in ("EulerDiscreteScheduler", "LMSDiscreteScheduler"):
        own = getattr(diffusers, name)()
        own.set_timesteps(10)
        taken = steered(own, FeynmanKac(4), reward=brightness, prompts=PROMPTS)
        taken.set_timesteps(10)
        assert float(taken.init_noise_sigma) == float(own.init_noise_sigma) > 1


def test_all_rows_return_with_the_chosen_first(toy_pipeline: Any) -> None:
    pipe = put(toy_pipeline, FeynmanKac(4, events=(0.2, 0.4, 0.6, 0.8)))
    images = pipe(
        PROMPTS, num_images_per_prompt=4, num_inference_steps=10, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    steering = pipe.scheduler.steering
    rewards = brightness(images, PROMPTS).view(2, 4).double()
    torch.testing.assert_close(rewards, steering.rewards, rtol=1e-4, atol=1e-3)
    assert steering.rewards.argmax(1).tolist() == [0, 0]
    assert len(steering.trace.events) == 5 and steering.log_z.shape == (2,)
    torch.testing.assert_close(steering.log_weights.exp().sum(1), torch.ones(2, dtype=torch.float64))
    assert steering.ledger.reward_calls == 8 * 5


def test_a_second_run_starts_afresh(toy_pipeline: Any) -> None:
    pipe = put(toy_pipeline, FeynmanKac(4))
    first = call(pipe)
    other = call(pipe, seed=1)
    assert torch.equal(first, call(pipe)) and not torch.equal(first, other)


def test_the_pipelines_eta_is_not_used_and_generator_is_the_key(toy_pipeline: Any) -> None:
    pipe = put(toy_pipeline, FeynmanKac(4))
    start = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    assert torch.equal(call(pipe, eta=0.7, latents=start), call(pipe, latents=start))
    assert not torch.equal(call(pipe, 0, latents=start), call(pipe, 1, latents=start))
    listed = [torch.Generator().manual_seed(i) for i in range(8)]
    twice = [
        pipe(PROMPTS, num_images_per_prompt=4, num_inference_steps=10, output_type="latent", latents=start, generator=g).images
        for g in (listed, [torch.Generator().manual_seed(i) for i in range(8)])
    ]
    assert torch.equal(*twice)
    torch.manual_seed(3)
    a = pipe(PROMPTS, num_images_per_prompt=4, num_inference_steps=10, output_type="latent", latents=start).images
    torch.manual_seed(3)
    assert torch.equal(
        a, pipe(PROMPTS, num_images_per_prompt=4, num_inference_steps=10, output_type="latent", latents=start).images
    )


def test_a_pipeline_that_hands_step_no_generator_is_keyed_by_seed() -> None:
    flux = TOYS["FluxPipeline"]
    pipe = flux.build()
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    options = {
        "num_images_per_prompt": 2,
        "output_type": "latent",
        **{k: v for k, v in flux.call.items() if k != "true_cfg_scale"},
    }
    made = []
    for seed in (7, 7, 8):
        pipe.scheduler = steered(
            own, FeynmanKac(2), reward=lambda x, p: x.flatten(1).mean(1), prompts=PROMPTS, decoder="none", seed=seed
        )
        made.append(pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **options).images)
        assert pipe.scheduler.steering.seed == seed
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("name", ["FluxPipeline", "Flux2Pipeline", "LTXPipeline"])
def test_packed_latents_of_another_size_want_it_said(name: str) -> None:
    toy = TOYS[name]
    pipe = toy.build()
    pipe.set_progress_bar_config(disable=True)
    own, many = pipe.scheduler, "num_videos_per_prompt" if name == "LTXPipeline" else "num_images_per_prompt"
    call = {k: v for k, v in toy.call.items() if k != "true_cfg_scale"} | {many: 2, "output_type": "latent"}

    def put_on(decoder: Any) -> Any:
        reward = lambda x, p: x.flatten(1).mean(1)  # noqa: E731
        pipe.scheduler = steered(own, FeynmanKac(2), reward=reward, prompts=PROMPTS, decoder=decoder, seed=0)
        return pipe(prompt=PROMPTS, **call)[0]

    with pytest.raises(DiffsteerError, match=f"do not fit the default size of {name}.*decoder_of"):
        put_on(pipe)
    sized = decoder_of(pipe, **{k: v for k, v in toy.call.items() if k in ("height", "width", "num_frames")})
    assert bool(put_on(sized).isfinite().all()) and pipe.scheduler.steering.rewards.shape == (2, 2)


def test_none_passes_everything_through(toy_pipeline: Any) -> None:
    plain = call(toy_pipeline, eta=0.5)
    assert torch.equal(call(put(toy_pipeline, None), eta=0.5), plain)


def test_best_of_n_with_the_users_solver(toy_pipeline: Any) -> None:
    plain = call(toy_pipeline)
    rows = call(put(toy_pipeline, BestOfN(4, eta=0.0)))
    assert {tuple(r.flatten().tolist()) for r in rows} == {tuple(r.flatten().tolist()) for r in plain}


def test_a_draw_is_keyed_by_the_generator_also_at_eta_zero(toy_pipeline: Any) -> None:
    pipe = put(toy_pipeline, BestOfN(4, eta=0.0), output="draw")
    assert len({tuple(call(pipe).flatten().tolist()) for _ in range(4)}) == 1


def test_ids_key_the_noise(toy_pipeline: Any) -> None:
    start = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    swapped = put(toy_pipeline, FeynmanKac(4), prompts=PROMPTS[::-1], ids=[1, 0])
    generator = torch.Generator().manual_seed(0)
    moved = swapped(
        PROMPTS[::-1],
        num_images_per_prompt=4,
        num_inference_steps=10,
        output_type="latent",
        generator=generator,
        latents=start.roll(4, 0),
    ).images
    torch.testing.assert_close(moved.roll(4, 0), call(put(toy_pipeline, FeynmanKac(4)), latents=start), rtol=1e-4, atol=1e-4)


def test_callbacks_and_guidance_keep_working(toy_pipeline: Any) -> None:
    seen: list[int] = []

    def watch(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(i)
        return {}

    pipe = put(toy_pipeline, FeynmanKac(4))
    base = call(pipe, callback_on_step_end=watch)
    assert seen == list(range(10))
    assert not torch.equal(base, call(pipe, guidance_scale=1.5))
    assert not torch.equal(base, call(pipe, negative_prompt=["a cross"] * 2))


def test_lora_keeps_working(toy_pipeline: Any) -> None:
    from conftest import build_toy_pipeline
    from peft import LoraConfig

    own = build_toy_pipeline()
    pipe = put(own, FeynmanKac(4))
    before = call(pipe)
    torch.manual_seed(0)
    own.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.allclose(before, call(pipe), atol=1e-3)
    own.unet.disable_adapters()
    torch.testing.assert_close(call(pipe), before)


def test_nothing_to_select_is_the_chain_itself_bit_for_bit(toy_pipeline: Any) -> None:
    chain = call(put(toy_pipeline, BestOfN(4), reward=lambda x, p: torch.zeros(len(x))))
    assert torch.equal(
        call(put(toy_pipeline, FeynmanKac(4, scale=0.0, events="all"), reward=lambda x, p: torch.zeros(len(x)))), chain
    )
    alone = call(put(toy_pipeline, FeynmanKac(1, events="all")), num_images_per_prompt=1)
    assert torch.equal(alone, call(put(toy_pipeline, BestOfN(1)), num_images_per_prompt=1))


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_image_to_image_pipelines_cut_the_grid(toy_pipeline: Any, name: str) -> None:
    parts = {k: v for k, v in toy_pipeline.components.items() if k in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    pipe.scheduler = steered(pipe.scheduler, FeynmanKac(4), reward=brightness, decoder=pipe, prompts=PROMPTS)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_images_per_prompt": 4, "num_inference_steps": 8, "output_type": "latent"}
    out = pipe(PROMPTS, image=image, strength=0.5, generator=torch.Generator().manual_seed(0), **options).images
    assert out.shape == (8, 4, 8, 8) and bool(out.isfinite().all())
    steering = pipe.scheduler.steering
    assert [e.done for e in steering.trace.events] == [2, 3, 4], "events at 60 and 80 % of the steps that are taken"
    assert steering.selection.problem.last_noise == 2, "the last transition but one, of four"


def test_saved_pipelines_load_again_with_the_plain_scheduler(toy_pipeline: Any, tmp_path: Any) -> None:
    pipe = put(toy_pipeline, FeynmanKac(4))
    pipe.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(again.scheduler) is diffusers.DDIMScheduler and again.scheduler.config.steps_offset == 1


def test_refusals(toy_pipeline: Any) -> None:
    scheduler = toy_pipeline.scheduler
    with pytest.raises(DiffsteerError, match="8 rows, but the pipeline has 2: call it with .* num_images_per_prompt=4"):
        call(put(toy_pipeline, FeynmanKac(4)), num_images_per_prompt=1)
    with pytest.raises(DiffsteerError, match="give prompts="):
        steered(scheduler, FeynmanKac(4), reward=brightness)
    with pytest.raises(DiffsteerError, match="give reward="):
        steered(scheduler, FeynmanKac(4), prompts=PROMPTS)
    for bad, message in (({"output": "bset"}, "best, draw"), ({"ids": [1, 1]}, "distinct ids"), ({"ids": [1]}, "distinct ids")):
        with pytest.raises(DiffsteerError, match=message):
            steered(scheduler, FeynmanKac(4), reward=brightness, prompts=PROMPTS, **bad)
    with pytest.raises(DiffsteerError, match="decoder="):
        steered(scheduler, FeynmanKac(4), reward=brightness, prompts=PROMPTS, decoder=3)
    with pytest.raises(UnsupportedError, match="steered already"):
        steered(steered(scheduler, None), None)
    new = steered(scheduler, FeynmanKac(1), reward=brightness, prompts=["a"])
    new.set_timesteps(5)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(UnsupportedError, match="not on its time grid"):
        new.step(x, torch.tensor(7), x)
    new.step(x, new.timesteps[0], x)
    with pytest.raises(UnsupportedError, match="out of the order"):
        new.step(x, new.timesteps[0], x)


def test_output_objects_and_tuples(toy_pipeline: Any) -> None:
    new = steered(toy_pipeline.scheduler, FeynmanKac(1), reward=lambda x, p: x[:, 0, 0, 0], prompts=["a"])
    x = torch.randn(1, 4, 8, 8)
    new.set_timesteps(5)
    out = new.step(x, new.timesteps[0], x, generator=torch.Generator().manual_seed(0))
    new.set_timesteps(5)
    pair = new.step(x, new.timesteps[0], x, return_dict=False, generator=torch.Generator().manual_seed(0))
    assert (
        torch.equal(out.prev_sample, pair[0])
        and torch.equal(out[1], pair[1])
        and torch.equal(out["pred_original_sample"], pair[1])
    )
    half = x.half()
    new.set_timesteps(5)
    assert new.step(half, new.timesteps[0], half, return_dict=False)[0].dtype == torch.float16


@pytest.mark.parametrize("sampler", [MPGD(4), TimeShift(4), EpsilonScaling(4)], ids=lambda s: s.name)
def test_methods_that_need_the_model_are_refused(toy_pipeline: Any, sampler: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"{sampler.name} needs the model"):
        steered(toy_pipeline.scheduler, sampler, reward=brightness, prompts=PROMPTS)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_schedule_is_walked_as_by_the_pipeline_object(toy_pipeline: Any, name: str) -> None:
    """The same keyed noises on the same levels: what both draw is the same."""
    pipe = copy.copy(toy_pipeline)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    whole = SteeredPipeline(pipe, FeynmanKac(4), brightness, schedule=Karras(), output="all")
    wanted = whole(PROMPTS, num_inference_steps=6, seed=3, latents=torch.randn(8, 4, 8, 8, generator=torch.Generator()))
    dropped = put(pipe, FeynmanKac(4), schedule=Karras(), seed=3)
    call(dropped, latents=torch.randn(8, 4, 8, 8, generator=torch.Generator()), num_inference_steps=6)
    both = [found.sort(1).values for found in (dropped.scheduler.steering.rewards, wanted.rewards)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-3)
    plain = put(pipe, FeynmanKac(4), seed=3)
    call(plain, latents=torch.randn(8, 4, 8, 8, generator=torch.Generator()), num_inference_steps=6)
    assert not torch.equal(plain.scheduler.timesteps, dropped.scheduler.timesteps)
    # how far apart depends on the toy's weights, which torch draws a little differently on every kind of processor
    apart = (plain.scheduler.steering.rewards.sort(1).values - both[0]).abs().max()
    assert float(apart) > 0.02
    with pytest.raises(DiffsteerError, match="schedule is an object"):
        steered(pipe.scheduler, FeynmanKac(4), reward=brightness, prompts=PROMPTS, schedule="karras")  # type: ignore[arg-type]
    with pytest.raises(DiffsteerError, match="a schedule wants a sampler"):
        steered(pipe.scheduler, None, schedule=Karras())
