"""What each class can do, proven: the unmodified pipeline is steered through its two seams."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from families.toys import SIX, TOYS, Toy
from torch import Tensor

from diffsteer import DiffsteerError, SteeredPipeline, UnsupportedError
from diffsteer.backend import DiffusersSession
from diffsteer.families import FAMILIES, Family, family_of
from diffsteer.pipes import decoder_of
from diffsteer.samplers import BestOfN, FeynmanKac

PROMPTS = ["a red circle", "a large blue square"]
CARRIED = [name for name in TOYS if name.split()[0] in FAMILIES]


@functools.cache
def built(name: str) -> Any:
    pipe = TOYS[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def facts(name: str) -> Family:
    family = family_of(built(name))
    assert family is not None
    return family


def prompts_of(toy: Toy) -> list[Any]:
    return [1, 2] if toy.rows == "class_labels" else list(PROMPTS)


def call_of(toy: Toy) -> dict[str, Any]:
    """The call without what a session gives itself."""
    return {**toy.call, **{name: [value] * 2 for name, value in toy.each.items()}}


def session(name: str, **options: Any) -> DiffusersSession:
    toy = TOYS[name]
    call = call_of(toy)
    keys: dict[str, Any] = {"particles": 2, "seed": 0, **options}
    return DiffusersSession(
        built(name),
        prompts_of(toy),
        num_inference_steps=call.pop("num_inference_steps"),
        negative_prompt=call.pop("negative_prompt", None),
        call=call,
        **keys,
    )


def level_of(samples: Tensor, prompts: object) -> Tensor:
    return 100 * samples.flatten(1).mean(1)


@pytest.mark.parametrize("name", CARRIED)
def test_particles_stay_in_their_group_and_cost_what_was_said(name: str) -> None:
    """Other noises of the second prompt change nothing of the first, though everybody is replaced by others on the way."""
    toy = TOYS[name]
    pipe = SteeredPipeline(built(name), FeynmanKac(3, events="all", trigger="always"), level_of, output="all")
    out, other = (pipe(prompts_of(toy), seed=0, ids=ids, **call_of(toy)) for ids in ([0, 1], [0, 2]))
    assert torch.equal(out.samples[0], other.samples[0]) and torch.equal(out.log_weights[0], other.log_weights[0])
    assert not torch.equal(out.samples[1], other.samples[1])
    first = torch.stack(out.trace.ancestors)[:, 0]
    assert bool((first != torch.arange(3)).any()), "somebody must be replaced"
    assert out.samples.shape[:2] == (2, 3) and bool(out.samples.isfinite().all())
    assert out.ledger.counts == pipe.estimate(2, **call_of(toy)).counts
    plain = SteeredPipeline(built(name), reward=level_of)
    assert plain(prompts_of(toy), seed=0, **call_of(toy)).ledger.counts == plain.estimate(2, **call_of(toy)).counts


@pytest.mark.parametrize("name", CARRIED)
def test_a_run_in_pieces_is_one_run(name: str) -> None:
    opened = session(name)
    if facts(name).no_reentry:
        with pytest.raises(UnsupportedError, match=f"{name.split()[0]} runs all particles in one call"):
            SteeredPipeline(built(name), BestOfN(2), level_of, chunk=1)(prompts_of(TOYS[name]), seed=0, **call_of(TOYS[name]))
        return
    x = opened.noise()
    whole = opened.segment(x, 0, opened.steps)
    for cuts in ((2,), (1, 3)):
        y, at = x, 0
        for stop in (*cuts, opened.steps):
            arrival = opened.segment(y, at, stop)
            y, at = arrival.x, stop
        assert torch.equal(y, whole.x) and torch.equal(arrival.x0, whole.x0)
    memory = getattr(opened.shadow, "encode_prompt", None)
    if memory is not None:
        before = memory.calls
        opened.segment(x, 0, 2)
        assert memory.calls == before, "conditions are encoded once a session"


@pytest.mark.parametrize("name", [name for name in CARRIED if FAMILIES[name.split()[0]].no_reentry])
def test_where_a_call_cannot_be_cut_gradients_are_refused(name: str) -> None:
    opened = session(name)
    with pytest.raises(UnsupportedError, match=f"{name.split()[0]} gives no gradients"):
        opened.gradient(torch.zeros(4, 1), 0, lambda x0, rows: x0.flatten(1).sum(1))


@pytest.mark.parametrize("name", [name for name in CARRIED if not FAMILIES[name.split()[0]].no_reentry])
def test_rows_run_in_blocks_and_give_gradients(name: str) -> None:
    whole, parts = session(name), session(name, chunk=1)
    x = whole.noise()
    assert torch.equal(x, parts.noise())
    one, other = (s.segment(x, 0, 2) for s in (whole, parts))
    torch.testing.assert_close(one.x, other.x, rtol=1e-3, atol=1e-3)
    found, arrival = whole.gradient(x, 0, lambda x0, rows: x0.square().flatten(1).mean(1))
    assert found.shape == x.shape and bool(found.isfinite().all()) and bool((found.flatten(1).abs().amax(1) > 0).all())
    assert torch.equal(arrival.x, whole.segment(x, 0, 1).x)
    torch.testing.assert_close(
        parts.gradient(x, 0, lambda x0, rows: x0.square().flatten(1).mean(1))[0], found, rtol=1e-2, atol=1e-4
    )


@pytest.mark.parametrize("name", [name for name in CARRIED if not FAMILIES[name.split()[0]].no_reentry])
def test_blocks_of_rows_are_the_whole_and_cost_what_was_said(name: str) -> None:
    """The same first noises, too, where the pipeline draws them itself."""
    toy, made = TOYS[name], []
    for chunk in (None, 3):
        pipe = SteeredPipeline(built(name), FeynmanKac(2, events=(0.5,), trigger="always"), level_of, output="all", chunk=chunk)
        made.append(pipe(prompts_of(toy), seed=0, **call_of(toy)))
        assert made[-1].ledger.counts == pipe.estimate(2, **call_of(toy)).counts
    whole, parts = made
    for p in range(2):
        if torch.equal(whole.trace.ancestors[0][p], parts.trace.ancestors[0][p]):  # no near-tie that rounding turned
            torch.testing.assert_close(parts.samples[p], whole.samples[p], rtol=1e-3, atol=1e-3)
    assert any(torch.equal(*(m.trace.ancestors[0][p] for m in made)) for p in range(2))


DRAWN = [name for name in CARRIED if FAMILIES[name.split()[0]].entry != "latents"]


@pytest.mark.parametrize("scheduler", ["its own", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("name", DRAWN)
def test_states_that_a_pipeline_makes_itself_enter_as_it_makes_them(name: str, scheduler: str) -> None:
    """With the user's own solver a segment over all steps is the pipeline's own call with the same generators (texts encoded
    row by row, hence to rounding)."""
    toy, pipe, call = TOYS[name], copy.copy(built(name)), call_of(TOYS[name])
    if scheduler != "its own":
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    opened = DiffusersSession(
        pipe,
        prompts_of(toy),
        particles=1,
        seed=0,
        eta=0.0,
        num_inference_steps=call.pop("num_inference_steps"),
        negative_prompt=call.pop("negative_prompt", None),
        call=call,
    )
    x = opened.noise()
    torch.testing.assert_close(x[1:], opened.noise([1]))
    assert not torch.equal(x, x.roll(1, 0))
    last = opened.segment(x, 0, opened.steps).x
    states: list[Tensor] = []
    step = type(pipe.scheduler).step

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = step(self, *args, **kwargs)
        states.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    asked = {**toy.arguments(PROMPTS), **({"class_labels": [1, 2]} if toy.rows == "class_labels" else {})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.scheduler), "step", functools.wraps(step)(spy))
        own = pipe(
            **asked, output_type="latent" if facts(name).returns_states else "pt", generator=[opened._stream(r) for r in (0, 1)]
        )
    torch.testing.assert_close(last, own[0] if facts(name).returns_states else states[-1][:2], rtol=1e-4, atol=1e-4)
    with pytest.raises(DiffsteerError, match="begins with states of its own: leave latents= out"):
        SteeredPipeline(pipe, BestOfN(1), level_of)(prompts_of(toy), seed=0, latents=x, **call_of(toy))


def test_what_walks_its_grid_several_times_is_refused() -> None:
    pipe = TOYS["AnimateDiffPipeline"].build()
    pipe.enable_free_init(num_iters=2)
    with pytest.raises(UnsupportedError, match="AnimateDiffPipeline has FreeInit enabled.*disable_free_init"):
        SteeredPipeline(pipe, BestOfN(2), level_of)(PROMPTS, seed=0, **call_of(TOYS["AnimateDiffPipeline"]))
    pipe.disable_free_init()
    SteeredPipeline(pipe, BestOfN(2), level_of)(PROMPTS, seed=0, **call_of(TOYS["AnimateDiffPipeline"]))


def test_the_variants_are_no_mere_names() -> None:
    """Layers are skipped, the second network and the control are used, each at some steps and not at others."""
    for name, without in (
        ("StableDiffusion3Pipeline with skipped layers", {"skip_guidance_layers": None}),
        ("StableDiffusionControlNetPipeline for some steps", {"control_guidance_start": 0.0, "control_guidance_end": 1.0}),
    ):
        toy = TOYS[name]
        some, all_steps = (
            built(name)(**{**toy.arguments(PROMPTS), **more}, output_type="latent", generator=torch.Generator().manual_seed(0))[
                0
            ]
            for more in ({}, without)
        )
        assert not torch.equal(some, all_steps)
    opened, used = session("WanPipeline with two denoisers"), [0, 0]
    for i, denoiser in enumerate(opened._denoisers):
        denoiser.register_forward_hook(lambda *_, i=i: used.__setitem__(i, used[i] + 1))
    opened.segment(opened.noise(), 0, opened.steps)
    assert min(used) > 0


def test_without_guidance_dit_hands_no_row_twice() -> None:
    pipe = SteeredPipeline(built("DiTPipeline"), BestOfN(2), level_of, output="all", decoder="none")
    one, two = (pipe([1, 2], seed=0, num_inference_steps=4, guidance_scale=w) for w in (1.0, 1.0 + 1e-6))
    assert one.ledger.evaluations * 2 == two.ledger.evaluations
    torch.testing.assert_close(one.samples, two.samples, rtol=1e-3, atol=1e-4)
    plain = SteeredPipeline(built("DiTPipeline"))([1, 2], seed=0, num_inference_steps=4, guidance_scale=1.0)
    assert len(plain.samples) == 2


@pytest.mark.parametrize("name", CARRIED)
def test_decoding_is_the_pipelines_own(name: str) -> None:
    """The last latents, decoded by the layout, are what the pipeline returns."""
    toy, pipe = TOYS[name], built(name)
    states: list[Tensor] = []
    step = type(pipe.scheduler).step

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = step(self, *args, **kwargs)
        if self is pipe.scheduler:  # and no copy of it, for a second stream
            states.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    family = facts(name)
    call = toy.arguments(PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.scheduler), "step", functools.wraps(step)(spy))
        out = pipe(**call, output_type="pt", generator=[torch.Generator().manual_seed(s) for s in (0, 1)])
    own = out[toy.output]
    z = states[-1][: len(states[-1]) // 2] if family.doubled else states[-1]
    if name == "StableDiffusionInpaintPipeline":  # it puts the image back around the mask after the last step
        again = toy.arguments(PROMPTS)
        z = pipe(**again, output_type="latent", generator=[torch.Generator().manual_seed(s) for s in (0, 1)])[0]
    with torch.no_grad():
        ours = decoder_of(pipe, **toy.call)(z)
    if own.ndim < ours.ndim:
        ours = ours.squeeze(1)
    torch.testing.assert_close(ours, own.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CARRIED)
def test_sampler_none_is_the_plain_pipeline(name: str) -> None:
    """Its states bit for bit, its samples to the rounding of the decoder."""
    toy, pipe = TOYS[name], built(name)
    out = SteeredPipeline(pipe)(prompts_of(toy), seed=4, **call_of(toy))
    labels = {"class_labels": [1, 2]} if toy.rows == "class_labels" else {}

    def own_call(kind: str) -> Any:
        call = {**toy.arguments(PROMPTS), **labels}
        return pipe(**call, output_type=kind, generator=torch.Generator().manual_seed(4))

    if facts(name).returns_states:
        assert torch.equal(out.latents[:, 0], own_call("latent")[0])
    own = own_call("pt")[toy.output]
    ours = out.samples[:, 0]
    torch.testing.assert_close(ours if own.ndim == ours.ndim else ours.squeeze(1), own.float(), rtol=1e-4, atol=1e-4)


def table() -> str:
    """The README's table: what the tests above prove of each class."""
    kinds = {"images": "images", "frames": "video", "audios": "sound"}
    lines = [
        "| pipeline class | makes | particles | in blocks, from any step, gradients | tiny decoder |",
        "|---|---|---|---|---|",
    ]
    for name in CARRIED:
        if " " in name:  # a variant of the row above
            continue
        family = FAMILIES[name]
        cut = f"no: {family.no_reentry}" if family.no_reentry else "yes"
        assert family.makes == kinds[TOYS[name].output]
        lines.append(f"| {name} | {family.makes} | yes | {cut} | {family.tiny or 'none'} |")
    return "\n".join(lines)


def test_the_readmes_table_is_this() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert table() in text, f"put this into README.md:\n{table()}"
    assert {name.split()[0] for name in CARRIED} == set(FAMILIES), "every class in the table of facts has a toy"


SINGLE = {"FluxPipeline": 1e-2, "WanPipeline": 1e-2}  # compute in float32 inside


@pytest.mark.parametrize("name", SIX)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    """Of a reward of the decoded clean estimate, in float64, along a random direction; then of the whole path to its noise."""
    toy = TOYS[name]
    pipe = toy.build().to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    call = call_of(toy)
    opened = DiffusersSession(
        pipe,
        prompts_of(toy),
        particles=1,
        seed=0,
        num_inference_steps=call.pop("num_inference_steps"),
        negative_prompt=call.pop("negative_prompt", None),
        call=call,
    )
    decode = opened.decoder
    assert decode is not None
    weights: list[Tensor] = []

    def objective(x0: Tensor, rows: list[int]) -> Tensor:
        samples = decode(x0).flatten(1).double()
        if not weights:
            weights.append(torch.randn(samples.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        return (samples * weights[0]).sum(1)

    flags = [p.requires_grad for m in opened._modules for p in m.parameters()]
    with torch.no_grad():
        x = opened.segment(opened.noise(), 0, 2).x
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    direction /= direction.norm()
    step = SINGLE.get(name, 1e-5)
    found, arrival = opened.gradient(x, 2, objective)
    assert not arrival.x.requires_grad
    rounding = 1e-5 if name in SINGLE else 1e-12  # on some processors attention has another kernel where there is a gradient
    torch.testing.assert_close(arrival.x, opened.segment(x, 2, 3).x, rtol=rounding, atol=rounding)
    with torch.no_grad():
        up, down = (objective(opened.segment(x + s * direction, 2, 3).x0, [0, 1]).sum() for s in (step, -step))
    central = float(up - down) / (2 * step)
    assert float((found * direction).sum()) == pytest.approx(central, rel=1e-2 if name in SINGLE else 1e-4)

    z = opened.noise().requires_grad_(True)
    whole = torch.autograd.grad(objective(opened.trajectory(z), [0, 1]).sum(), z)[0]
    with torch.no_grad():
        first = opened.noise()
        ends = [objective(opened.segment(first + s * direction, 0, opened.steps).x, [0, 1]).sum() for s in (step, -step)]
    central = float(ends[0] - ends[1]) / (2 * step)
    assert float((whole * direction).sum()) == pytest.approx(central, rel=2e-2 if name in SINGLE else 1e-4)
    assert all(p.grad is None for m in opened._modules for p in m.parameters())
    assert [p.requires_grad for m in opened._modules for p in m.parameters()] == flags
