"""Where the general machinery meets what single classes do: experts, memory that runs out, decodes in the call, odd sizes."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from families.test_families import CARRIED, PROMPTS, built, call_of, level_of, prompts_of, session
from families.toys import TOYS
from torch import Tensor

from diffsteer import DiffsteerError, SteeredPipeline, UnsupportedError, decoder_of, rng, steered
from diffsteer.control import Control, Follower
from diffsteer.families import FAMILIES
from diffsteer.pipes import denoisers_of
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.warn import Notice

TEXTS = [name for name in CARRIED if TOYS[name].rows == "prompt" and not FAMILIES[name.split()[0]].no_reentry]


@pytest.mark.parametrize("name", TEXTS)
def test_two_equal_experts_are_one(name: str) -> None:
    toy, call = TOYS[name], call_of(TOYS[name])
    out = {}
    for experts in ((1.0,), (0.3, 0.7)):
        asked: list[Any] = list(PROMPTS) if len(experts) == 1 else [(p, p) for p in PROMPTS]
        pipe = SteeredPipeline(built(name), BestOfN(2), level_of, output="all", decoder="none", experts=experts)
        out[experts] = pipe(asked, seed=0, reward_prompts=PROMPTS, **call)
    one, two = out.values()
    torch.testing.assert_close(one.latents, two.latents, rtol=1e-2, atol=1e-2)
    assert two.ledger.evaluations == 2 * one.ledger.evaluations, toy


@pytest.mark.parametrize("name", ["DDPMPipeline", "DiTPipeline", "StableDiffusionPipeline", "StableDiffusionInpaintPipeline"])
def test_a_run_in_one_call_goes_on_in_segments_where_memory_ends(name: str) -> None:
    """A class that draws by itself, and a callback, want one call; memory for three rows is there at the last event."""
    toy, call = TOYS[name], call_of(TOYS[name])
    if toy.rows == "prompt":
        call["callback_on_step_end"] = lambda pipe, i, t, tensors: {}
    [denoiser], calls = denoisers_of(built(name)), [0]
    pipe = SteeredPipeline(built(name), FeynmanKac(2, events="all", trigger="always"), level_of, output="all", chunk="auto")
    expected = pipe(prompts_of(toy), seed=0, **call)

    def planted(module: Any, args: Any, kwargs: Any) -> None:
        calls[0] += 1
        rows = len(args[0] if args else kwargs["hidden_states"]) // (2 if call.get("guidance_scale", 0) > 1 else 1)
        if rows > 2 and calls[0] > 3:
            raise torch.OutOfMemoryError("planted")

    handle = denoiser.register_forward_pre_hook(planted, with_kwargs=True)
    try:
        with pytest.warns(UserWarning, match="out of memory with 4 rows at a time: going on with 2") as said:
            out = pipe(prompts_of(toy), seed=0, **call)
        assert {w.filename for w in said if issubclass(w.category, Notice)} == {__file__}  # diffusers' pipeline stands between
    finally:
        handle.remove()
    assert len(out.trace.events) == len(expected.trace.events)
    same = [torch.equal(a.ancestors, b.ancestors) for a, b in zip(out.trace.events, expected.trace.events, strict=True)]
    assert same[0] and bool(out.samples.isfinite().all())
    if all(same) and name != "StableDiffusionInpaintPipeline":  # where the blend with the picture comes before the selection
        torch.testing.assert_close(out.samples, expected.samples, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["LatentConsistencyModelPipeline", "DDPMPipeline", "DiTPipeline", "LTX2Pipeline"])
def test_nothing_is_decoded_that_the_ledger_does_not_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, pipe, decoded = TOYS[name], built(name), [0]
    if getattr(pipe, "vae", None) is not None:
        decode = pipe.vae.decode

        def counted(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            decoded[0] += len(z)
            return decode(z, *args, **kwargs)

        monkeypatch.setattr(pipe.vae, "decode", counted)
    for decoder in ("full", "none"):
        decoded[0] = 0
        out = SteeredPipeline(pipe, FeynmanKac(2, events=(0.5,)), level_of, output="all", decoder=decoder)(
            prompts_of(toy), seed=0, **call_of(toy)
        )
        assert decoded[0] == (out.ledger.decodes if hasattr(pipe, "vae") else 0)


def test_flux_2_with_as_many_rows_as_layers_are_read() -> None:
    toy = TOYS["Flux2Pipeline"]
    pipe = SteeredPipeline(built("Flux2Pipeline"), BestOfN(2), level_of, output="all")
    pair = pipe([PROMPTS[0]], seed=0, **toy.call)
    torch.testing.assert_close(pair.samples[0], pipe(PROMPTS, seed=0, **toy.call).samples[0], rtol=1e-3, atol=1e-3)


def test_the_drop_in_form_shows_the_chosen_first_where_the_estimate_is_shown() -> None:
    toy = TOYS["LatentConsistencyModelPipeline"]
    pipe = copy.copy(built("LatentConsistencyModelPipeline"))
    reward = lambda x, prompts: level_of(x, prompts)  # noqa: E731
    pipe.scheduler = steered(pipe.scheduler, BestOfN(4), reward=reward, decoder="none", prompts=PROMPTS)
    generator = torch.Generator().manual_seed(0)
    shown = pipe(PROMPTS, num_images_per_prompt=4, output_type="latent", generator=generator, **toy.call).images
    rewards = pipe.scheduler.steering.rewards
    assert rewards.argmax(1).tolist() == [0, 0]
    torch.testing.assert_close(level_of(shown, None).view(2, 4).double(), rewards, rtol=1e-3, atol=1e-3)


def test_a_step_of_another_kind_is_refused_by_name() -> None:
    pipe = copy.copy(built("CogVideoXPipeline"))
    pipe.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    for sampler in (None, BestOfN(2, eta=0.0), BestOfN(2)):
        with pytest.raises(UnsupportedError, match="CogVideoXDPMScheduler has a step of its own kind"):
            SteeredPipeline(pipe, sampler, level_of)(PROMPTS, seed=0, **call_of(TOYS["CogVideoXPipeline"]))


def test_estimates_where_guidance_begins_and_blocks_are_filled() -> None:
    toy = TOYS["ZImagePipeline"]
    for scale in (0.0, 0.5, 3.0):
        call = {**toy.call, "guidance_scale": scale}
        pipe = SteeredPipeline(built("ZImagePipeline"), BestOfN(2), level_of)
        assert pipe(PROMPTS, seed=0, **call).ledger.counts == pipe.estimate(2, **call).counts
    for name in ("DDPMPipeline", "DiTPipeline"):
        toy = TOYS[name]
        pipe = SteeredPipeline(built(name), FeynmanKac(2, events=(0.5,)), level_of, deterministic=True)
        counts = pipe(prompts_of(toy), seed=0, **call_of(toy)).ledger.counts
        assert counts == pipe.estimate(2, **call_of(toy)).counts | {"padding": counts["padding"]}


def test_parameters_want_no_gradients_inside_a_gradient() -> None:
    opened, seen = session("StableDiffusionPipeline"), list[bool]()
    unet = opened.user.unet
    handle = unet.register_forward_hook(
        lambda module, args, out: seen.append(any(p.requires_grad for p in module.parameters()))
    )
    try:
        opened.gradient(opened.noise(), 0, lambda x0, rows: x0.flatten(1).sum(1))
    finally:
        handle.remove()
    assert seen and not any(seen) and all(p.requires_grad for p in unet.parameters())


def test_an_amount_of_noise_reaches_a_pipeline() -> None:
    """One step of Stable Diffusion 3 by hand, with g(t) = 3 t^2."""
    from diffsteer.algebra import noise_std, transition

    opened = session("StableDiffusion3Pipeline", noise="quadratic")
    x = opened.noise()
    arrival, (at, to) = opened.segment(x, 1, 2), opened.levels[1:3]
    eps = (x - at.alpha * arrival.x0) / at.sigma
    by_hand = transition(arrival.x0, eps.float(), at, to, 1.0, opened.step_noise(range(4), 1), "quadratic")
    torch.testing.assert_close(arrival.x, by_hand.float(), rtol=1e-3, atol=1e-3)
    assert float(noise_std(at, to, 1.0, "quadratic")) != float(noise_std(at, to, 1.0))


def test_noises_of_different_steps_are_different() -> None:
    """Of a solver's own step, and of a second stream."""
    opened = session("StableDiffusionPipeline", transition="native")
    opened._control.rows = [0, 1]
    drawn = [[g.initial_seed() for g in opened._control.native_options(k)["generator"]] for k in (0, 1)]
    assert len({s for seeds in drawn for s in seeds}) == 4


@pytest.mark.parametrize("name", ["StableDiffusionInpaintPipeline", "StableDiffusionImg2ImgPipeline"])
def test_pictures_are_encoded_once_a_session(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, encoded = session(name), [0]
    vae = opened.user.vae
    encode = vae.encode

    def counted(*args: Any, **kwargs: Any) -> Any:
        encoded[0] += 1
        return encode(*args, **kwargs)

    x = opened.noise()
    monkeypatch.setattr(vae, "encode", counted)
    y = opened.segment(opened.segment(x, 0, 2).x, 2, opened.steps).x
    assert encoded[0] == 0 and torch.equal(y, opened.segment(x, 0, opened.steps).x)


@pytest.mark.parametrize("name", ["LatentConsistencyModelPipeline", "Lumina2Pipeline", "StableDiffusionPipeline"])
def test_callbacks_hear_the_true_index(name: str) -> None:
    heard: list[int] = []

    def callback(pipe: Any, i: int, t: Any, tensors: Any) -> Any:
        heard.append(i)
        return {}

    call = {**call_of(TOYS[name]), "callback_on_step_end": callback}
    SteeredPipeline(built(name), FeynmanKac(2, events=(0.5,)), level_of, chunk=2)(PROMPTS, seed=0, **call)
    assert sorted(heard) == sorted(2 * list(range(5))), "once a block and step"


def test_arguments_that_count_steps_want_one_call() -> None:
    call = {**call_of(TOYS["Lumina2Pipeline"]), "cfg_trunc_ratio": 0.5}
    pipe = built("Lumina2Pipeline")
    out = SteeredPipeline(pipe, FeynmanKac(2, events=(0.5,), trigger="always"), level_of, output="all")(PROMPTS, seed=0, **call)
    assert out.ledger.evaluations < 2 * 2 * 2 * 5, "guidance ends on the way"
    with pytest.raises(UnsupportedError, match="Lumina2Pipeline counts the steps of its call for cfg_trunc_ratio"):
        SteeredPipeline(pipe, FeynmanKac(2, events=(0.5,)), level_of, chunk=2)(PROMPTS, seed=0, **call)


@pytest.mark.parametrize("name", CARRIED)
def test_deterministic_bits_or_a_refusal(name: str) -> None:
    """A prompt alone and beside another, in blocks that have to be filled up."""
    toy, call, facts = TOYS[name], call_of(TOYS[name]), FAMILIES[name.split()[0]]
    pipe = SteeredPipeline(built(name), BestOfN(2), level_of, output="all", decoder="none", deterministic=True, chunk=3)
    alone = {k: v[:1] if k in toy.each else v for k, v in call.items()}
    if facts.no_reentry or facts.mixed:
        with pytest.raises(
            UnsupportedError, match="runs all particles in one call" if facts.no_reentry else "cannot be deterministic"
        ):
            pipe(prompts_of(toy), seed=0, **call)
        return
    both, first = pipe(prompts_of(toy), seed=0, **call), pipe(prompts_of(toy)[:1], seed=0, **alone)
    assert torch.equal(both.latents[:1], first.latents)


def test_one_picture_is_for_all_and_some_strength_is_needed() -> None:
    toy = TOYS["StableDiffusionImg2ImgPipeline"]
    pipe, call = SteeredPipeline(built("StableDiffusionImg2ImgPipeline"), BestOfN(2), level_of, output="all"), call_of(toy)
    both = pipe(PROMPTS, seed=0, **call)
    one = pipe(PROMPTS, seed=0, **{**call, "image": call["image"][0][None]})
    torch.testing.assert_close(one.samples, both.samples)
    with pytest.raises(DiffsteerError, match="leave no step to take"):
        pipe(PROMPTS, seed=0, **{**call, "strength": 0.1})


def test_a_cache_is_refused_behind_a_sized_decoder_too() -> None:
    pipe = copy.copy(built("FluxPipeline"))
    call = {k: v for k, v in TOYS["FluxPipeline"].call.items() if k != "true_cfg_scale"}
    decoder = decoder_of(pipe, height=call["height"], width=call["width"])
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    try:
        pipe.scheduler = steered(pipe.scheduler, FeynmanKac(2), reward=level_of, decoder=decoder, prompts=PROMPTS, seed=0)
        with pytest.raises(UnsupportedError, match="FirstBlockCache"):
            pipe(PROMPTS, num_images_per_prompt=2, **call)
    finally:
        pipe.transformer.disable_cache()


def test_a_second_stream_has_noise_of_its_own_at_every_step() -> None:
    class Leader(Control):
        def keys(self) -> Any:
            return 0, [(0, 0), (0, 1)]

    leader, x = Leader(), torch.zeros(2, 4)
    follower, drawn = Follower(leader), []
    seed, keys = leader.keys()
    for leader.at in (0, 1):
        drawn += [*follower.noise(leader.at, x, None), *rng.normal(seed, keys, leader.at, "step", (4,))]
    assert len({tuple(z.tolist()) for z in drawn}) == 8


def test_noise_by_no_key_is_refused() -> None:
    pipe = copy.copy(built("StableDiffusion3Pipeline"))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    call = call_of(TOYS["StableDiffusion3Pipeline"])
    with pytest.raises(UnsupportedError, match="FlowMatchEulerDiscreteScheduler with stochastic_sampling=True draws by no key"):
        SteeredPipeline(pipe, BestOfN(2, eta=0.0), level_of)(PROMPTS, seed=0, **call)
    assert bool(SteeredPipeline(pipe, BestOfN(2), level_of)(PROMPTS, seed=0, **call).samples.isfinite().all())


def test_the_drop_in_form_takes_an_amount_of_noise() -> None:
    """Selection at the end alone: the states are those of a session with the same key and first noises."""
    toy, made = TOYS["StableDiffusion3Pipeline"], []
    opened = session("StableDiffusion3Pipeline", noise="quadratic")
    x = opened.noise()
    whole = opened.segment(x, 0, opened.steps).x
    pipe = copy.copy(built("StableDiffusion3Pipeline"))
    for noise in ("quadratic", "eta"):
        pipe.scheduler = steered(
            built("StableDiffusion3Pipeline").scheduler, BestOfN(2), reward=level_of, prompts=PROMPTS, seed=0, noise=noise
        )
        made.append(pipe(PROMPTS, latents=x, num_images_per_prompt=2, output_type="latent", **toy.call)[0])
    order = [0, 1, 2, 3]
    near = [min(float((made[0][i] - whole[j]).abs().max()) for j in order) for i in order]
    assert max(near) < 1e-3 and not torch.allclose(made[0], made[1], atol=1e-3)
    with pytest.raises(DiffsteerError, match="noise='cubic' is unknown; valid: eta, quadratic"):
        steered(pipe.scheduler, BestOfN(2), reward=level_of, prompts=PROMPTS, noise="cubic")
