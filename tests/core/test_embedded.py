"""The models that ship: they load as any other, keep their promises, and their rewards and defaults follow them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from families.toys import TOYS

from diffsteer import DiffsteerError, SteeredPipeline, load_pipeline, steered
from diffsteer.backend import DiffusersSession
from diffsteer.cli import main
from diffsteer.draft import Draft
from diffsteer.rewards import ClipScore, Compressibility
from diffsteer.samplers import BestOfN, FeynmanKac, ReNO
from diffsteer.shapes import TASKS, caption, check, one_attribute_changed, render, sample_scene
from diffsteer.shapes.models import (
    CLIP,
    MODELS,
    NOISE,
    PIXELS,
    WEIGHTS,
    embedded_name,
    is_embedded,
    recommended,
    recommended_for,
)
from diffsteer.shapes.tokenizer import CONTEXT, unknown_words
from diffsteer.types import Context

EMBEDDED = Context(embedded=True)


@pytest.fixture(scope="module")
def shapes() -> Any:
    pipe = load_pipeline("shapes")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["shapes", "shapes-flow"])
def painter(request: pytest.FixtureRequest) -> Any:
    pipe = load_pipeline(request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# On the other model it is a slow proof.
first_of_both = pytest.mark.parametrize(
    "painter", ["shapes", pytest.param("shapes-flow", marks=pytest.mark.slow)], indirect=True
)


def renders(count: int, stream: int) -> tuple[list[Any], torch.Tensor]:
    scenes = [sample_scene(TASKS[i % 6], np.random.default_rng((stream, i))) for i in range(count)]
    images = [torch.from_numpy(np.array(render(s))).permute(2, 0, 1) / 255 for s in scenes]
    return scenes, torch.stack(images)


def test_they_are_small_and_load_without_us() -> None:
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    own = {
        "shapes-flow": (MODELS["shapes-flow"], 4.0),
        "turbo": (MODELS["shapes-turbo"], 3.0),
        "noise network": (NOISE.parent, 1.0),
        "motion": (MODELS["shapes-motion"], 1.5),
        "pixels": (PIXELS / "unet", 3.0),
    }
    sizes = {name: sum(f.stat().st_size for f in files if folder in f.parents) / 1e6 for name, (folder, _) in own.items()}
    assert all(sizes[name] <= most for name, (_, most) in own.items())
    assert sum(f.stat().st_size for f in files) / 1e6 - sum(sizes.values()) <= 8.5
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".ckpt")]
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["shapes"], safety_checker=None)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {p.dtype for m in parts for p in m.parameters()} == {torch.float32}
    assert pipe.vae.config.scaling_factor == 1.0 and pipe.scheduler.config.prediction_type == "epsilon"
    import open_clip

    model = open_clip.create_model(f"local-dir:{CLIP}", require_pretrained=True)
    tokens = open_clip.get_tokenizer(f"local-dir:{CLIP}")(["a red circle", "a blue ring"])
    assert tokens.shape == (2, 16) and model.encode_text(tokens).isfinite().all()


def test_the_autoencoder_keeps_what_the_checker_reads(shapes: Any) -> None:
    scenes, x = renders(240, 21)
    with torch.no_grad():
        y = shapes.vae.decode(shapes.vae.encode(x * 2 - 1).latent_dist.mode()).sample
    right = [check((i / 2 + 0.5).clamp(0, 1), caption(s)).correct for i, s in zip(y, scenes, strict=True)]
    assert np.mean(right) >= 0.96


@pytest.mark.slow
def test_the_autoencoder_keeps_what_the_checker_reads_in_full(shapes: Any) -> None:
    scenes, x = renders(3000, 27)
    rng, errors = np.random.default_rng(0), 0
    for start in range(0, len(scenes), 100):
        with torch.no_grad():
            y = shapes.vae.decode(shapes.vae.encode(x[start : start + 100] * 2 - 1).latent_dist.mode()).sample
        for image, scene in zip((y / 2 + 0.5).clamp(0, 1), scenes[start : start + 100], strict=True):
            changed = one_attribute_changed(scene.statement)
            errors += not check(image, caption(scene)).correct
            errors += check(image, str(changed[rng.integers(len(changed))])).correct
    assert errors <= 0.02 * 3000


@pytest.mark.slow
def test_clip_prefers_the_right_caption_in_full() -> None:
    scenes, x = renders(3000, 28)
    rng, wins = np.random.default_rng(0), 0
    wrong = [str(c[rng.integers(len(c))]) for c in (one_attribute_changed(s.statement) for s in scenes)]
    right, reward = [caption(s) for s in scenes], ClipScore()
    for i in range(0, 3000, 100):
        part = slice(i, i + 100)
        wins += int((reward.score(x[part], right[part], EMBEDDED) > reward.score(x[part], wrong[part], EMBEDDED)).sum())
    assert wins >= 0.90 * 3000


@pytest.mark.slow
def test_what_steering_costs_outside_the_denoiser(shapes: Any) -> None:
    """At most 5 % of the time with 16 rows and 20 steps, the best of three."""
    pipe = SteeredPipeline(
        shapes, FeynmanKac(4, trigger="always"), lambda samples, prompts: torch.zeros(len(samples)), decoder="none"
    )
    texts = ["a red circle", "two stars", "a ring above a cross", "a blue square"]
    seconds = [pipe(texts, num_inference_steps=20, seed=0).ledger.seconds for _ in range(4)][1:]
    assert min(1 - s["denoiser"] / s["total"] for s in seconds) <= 0.05


def test_latents_have_unit_scale(shapes: Any) -> None:
    _, x = renders(120, 22)
    with torch.no_grad():
        z = shapes.vae.encode(x * 2 - 1).latent_dist.mode()
    assert z.mean((0, 2, 3)).abs().max() < 0.3 and (z.std((0, 2, 3)) - 1).abs().max() < 0.3


def test_clip_prefers_the_right_caption() -> None:
    scenes, x = renders(300, 23)
    rng = np.random.default_rng(0)
    wrong = [str(c[rng.integers(len(c))]) for c in (one_attribute_changed(s.statement) for s in scenes)]
    reward = ClipScore()
    higher = reward.score(x, [caption(s) for s in scenes], EMBEDDED) > reward.score(x, wrong, EMBEDDED)
    assert float(higher.float().mean()) >= 0.88


@first_of_both
def test_the_painter_paints(painter: Any) -> None:
    """It listens: its pictures show their own captions far more often than one another's."""
    texts = [caption(sample_scene("single_object", np.random.default_rng((24, i)))) for i in range(40)]
    out = SteeredPipeline(painter, BestOfN(1))(texts, seed=0)
    pictures = [s[0].float() for s in out.samples]
    own = np.mean([check(p, t).correct for p, t in zip(pictures, texts, strict=True)])
    others = np.mean([check(p, t).correct for i, p in enumerate(pictures) for t in texts[:i] + texts[i + 1 :]])
    assert own > 0.65 and own > 4 * others


@first_of_both
def test_steering_raises_the_reward(painter: Any) -> None:
    """Paired, the same captions and first noises: a gain of more than two standard errors."""
    texts = [caption(sample_scene("color_attr", np.random.default_rng((25, i)))) for i in range(12)]
    plain, draws, out = (
        SteeredPipeline(painter, sampler, ClipScore())(texts, seed=0) for sampler in (BestOfN(1), BestOfN(4), FeynmanKac(4))
    )
    gain = out.rewards.max(1).values - plain.rewards[:, 0]
    assert gain.mean() > 2 * gain.std() / len(texts) ** 0.5
    # not by the final choice alone: the whole population is better than as many independent draws
    gain = out.rewards.mean(1) - draws.rewards.mean(1)
    assert gain.mean() > 2 * gain.std() / len(texts) ** 0.5
    assert bool(torch.stack([i.resampled for i in out.trace.events]).any())


def test_defaults_follow_the_model(painter: Any, toy_pipeline: Any) -> None:
    advised = recommended(painter)
    assert {"guidance_scale", "num_inference_steps"} <= set(advised) and recommended(toy_pipeline) == {}
    out = SteeredPipeline(painter, BestOfN(1), Compressibility())(["a star"], seed=0)
    assert out.ledger.evaluations == 2 * advised["num_inference_steps"]
    assert out.ledger.counts == SteeredPipeline(painter, BestOfN(1), Compressibility()).estimate().counts
    plain = SteeredPipeline(painter)(["a star"], seed=3).latents
    own = painter("a star", generator=torch.Generator().manual_seed(3), output_type="latent", **advised).images
    assert torch.equal(plain[:, 0], own)


def test_the_flow_model_is_one_in_an_unmodified_pipeline(tmp_path: Path) -> None:
    pipe = load_pipeline("shapes-flow")
    assert type(pipe) is StableDiffusionPipeline and pipe.scheduler.config.prediction_type == "flow_prediction"
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    steered = SteeredPipeline(pipe, BestOfN(2), Compressibility(), noise="quadratic")
    assert bool(steered("a red star", seed=0, num_inference_steps=4).samples.isfinite().all())
    session = DiffusersSession(pipe, ["a star"], particles=1, seed=0, num_inference_steps=6)
    for at in session.levels:
        assert float(at.alpha + at.sigma) == pytest.approx(1, abs=1e-6)
    half = load_pipeline("shapes-flow", torch_dtype=torch.float16)
    assert {p.dtype for m in (half.unet, half.vae, half.text_encoder) for p in m.parameters()} == {torch.float16}


def test_a_stable_diffusion_3_saved_without_its_t5_loads(tmp_path: Path) -> None:
    """diffusers wants to be told again what is missing; `load_pipeline` sees to that."""
    TOYS["StableDiffusion3Pipeline without T5"].build().save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path)
    assert pipe.text_encoder_3 is None and pipe.tokenizer_3 is None


def test_words_outside_the_list_are_refused(shapes: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(DiffsteerError, match="'dog'"):
        SteeredPipeline(shapes, FeynmanKac(2), ClipScore())(["a red dog"], seed=0)
    assert main(["generate", "prompt=a red dog", f"out={tmp_path / 'o'}"]) == 2
    said = capsys.readouterr().err.strip()
    assert "'dog'" in said and "\n" not in said and not (tmp_path / "o" / "manifest.jsonl").exists()


def test_every_prompt_that_is_accepted_is_read_to_its_end(shapes: Any) -> None:
    """A comma, say, has no token: the tokenizer would end the text there, and CLIP would not see the rest."""
    tokenizer, end = shapes.tokenizer, None
    for text in [caption(sample_scene(task, np.random.default_rng((26, i)))) for i, task in enumerate(TASKS * 20)]:
        ids = tokenizer(text).input_ids
        end = ids[-1]
        assert unknown_words(text) == [] and ids.count(end) == 1 and len(ids) == len(text.split()) + 2 <= CONTEXT
    assert tokenizer("a star, a ring").input_ids.count(end) == 2
    for text, said in (("a red star, a ring", "'star,'"), ("a star.", "'star.'"), ("a red star " * 5, "14 words at most")):
        with pytest.raises(DiffsteerError, match=said):
            ClipScore().prepare([text], EMBEDDED)


def test_they_are_known_by_content(painter: Any, toy_pipeline: Any, tmp_path: Path) -> None:
    assert not is_embedded(toy_pipeline) and not is_embedded(object())
    again = StableDiffusionPipeline(**painter.components, requires_safety_checker=False)
    assert embedded_name(again) == embedded_name(painter) in MODELS
    painter.save_pretrained(tmp_path / "copy")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert embedded_name(load_pipeline(tmp_path / "copy").to(dtype)) == embedded_name(painter)


def test_drop_in_uses_the_embedded_clip(shapes: Any) -> None:
    import copy

    pipe = copy.copy(shapes)
    prompts = ["a red circle left of a blue square"]
    pipe.scheduler = steered(shapes.scheduler, FeynmanKac(4), reward=ClipScore(), decoder=pipe, prompts=prompts)
    generator = torch.Generator().manual_seed(0)
    images = pipe(prompts, num_images_per_prompt=4, generator=generator, num_inference_steps=10, output_type="pt").images
    rewards = ClipScore().score(images, prompts * 4, EMBEDDED)
    assert int(rewards.argmax()) == 0


def test_generate_without_arguments(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "num_inference_steps=4", "out=demo"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if "right" in line or "wrong" in line]
    assert len(lines) == 6 and "evaluations" in said
    assert len(list((tmp_path / "demo" / "images").glob("*.png"))) == 6 and (tmp_path / "demo" / "grid.png").exists()


def test_the_flow_model_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["generate", "prompt=a red star", "model=shapes-flow", "noise=quadratic", "num_inference_steps=6", "out=o"]
    assert main([*asked, "sampler.particles=2"]) == 0
    assert (tmp_path / "o/images/000.png").exists()
    assert main(["generate", "prompt=a red dog", "model=shapes-flow", "out=p"]) == 2
    assert "'dog'" in capsys.readouterr().err


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    scope: dict[str, Any] = {"prompts": ["a red circle"]}
    for block in [part.split("```")[0] for part in text.split("```python\n")[1:]]:
        exec(block, scope)
    assert (tmp_path / "run" / "000.png").exists() and len(scope["images"]) == 4


def test_the_model_of_clips_knows_its_name_and_moves_what_it_draws() -> None:
    from diffsteer.shapes.clips import track

    pipe = load_pipeline("shapes-motion")
    pipe.set_progress_bar_config(disable=True)
    assert embedded_name(pipe) == "shapes-motion" and is_embedded(pipe) and recommended(pipe)["num_frames"] == 8
    out = SteeredPipeline(pipe, BestOfN(1), ClipScore())(["a large purple square", "a blue ring"], seed=0)
    assert out.images is not None
    for frames in out.images:
        assert any(t.straight < 4 for t in track(frames))  # something is there from frame to frame


def test_the_model_of_pixels_draws_pictures_in_their_range() -> None:
    model = load_pipeline("shapes-pixels")
    out = SteeredPipeline(model, BestOfN(1, eta=1.0))([""] * 16, num_inference_steps=20, seed=0)
    pictures = out.samples[:, 0]
    assert pictures.shape == (16, 3, 32, 32) and 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
    variance = out.latents.flatten(2).var(2).mean()
    assert 0.03 < float(variance) < 0.2  # of the training pictures 0.085


def test_the_few_step_model_draws_what_the_first_one_does_from_the_same_noise(shapes: Any) -> None:
    """Four evaluations in the place of sixty, and a like picture: what drafts and optimised noise live on."""
    fast, reward = load_pipeline("shapes-turbo"), ClipScore()
    fast.set_progress_bar_config(disable=True)
    cases = [caption(sample_scene(TASKS[i % 6], np.random.default_rng((31, i)))) for i in range(18)]
    full, few, other = (
        SteeredPipeline(pipe, BestOfN(1, eta=0.0), reward, chunk=18)(cases, seed=seed)
        for pipe, seed in ((shapes, 0), (fast, 0), (fast, 1))
    )
    assert few.ledger.evaluations == 18 * 4 and full.ledger.evaluations == 18 * 60
    near, far = ((full.latents - o.latents).square().flatten(2).mean(2) for o in (few, other))
    assert float(near.median()) < 0.3 * float(far.median())
    assert np.corrcoef(full.rewards[:, 0], few.rewards[:, 0])[0, 1] > 0.7
    assert is_embedded(fast) and few.images is not None and recommended_for("shapes-turbo")["guidance_scale"] == 1.0


def test_optimised_on_the_few_step_model_rendered_on_the_first(shapes: Any) -> None:
    fast = load_pipeline("shapes-turbo")
    fast.set_progress_bar_config(disable=True)
    prompts = ["three red circles", "a blue ring left of a green star"]
    draft = Draft(model=fast, finalists=2)
    steered = SteeredPipeline(shapes, ReNO(iterations=8, rate=1.0, checkpoint=False), ClipScore(), draft=draft)
    out = steered(prompts, seed=0)
    plain = SteeredPipeline(shapes, BestOfN(1, eta=0.0), ClipScore())(prompts, seed=0)
    assert out.ledger.evaluations == 2 * (8 * 4 + 2 * 60) == steered.estimate(2).evaluations
    assert float(out.rewards.max(1).values.mean()) > float(plain.rewards.mean())
