"""ClipScore against open_clip's own preprocessing, and everything that can be named wrongly."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffsteer.rewards import ClipScore, open_clip_model
from diffsteer.rewards.open_clip_model import fit, load
from diffsteer.types import Context, DiffsteerError

PROMPTS = ["a red star", "two blue rings", "a star left of a ring", "a large circle on a black background", "a cross"]
MODES = {"squash": "squash", "crop": "shortest", "pad": "longest"}
CTX = Context()


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("resize", MODES)
@pytest.mark.parametrize("shape", [(48, 40), (33, 90), (20, 24), (32, 32)])
def test_preprocessing_is_that_of_pil(images: Tensor, resize: str, shape: tuple[int, int]) -> None:
    cfg = open_clip.transform.PreprocessCfg(size=32, mean=(0,) * 3, std=(1,) * 3, resize_mode=MODES[resize], fill_color=51)
    preprocess = open_clip.transform.image_transform_v2(cfg, is_train=False)
    x = (fit(images, shape, "squash") * 255).round() / 255
    expected = torch.stack([preprocess(pil(image)) for image in x])
    assert (fit(x, (32, 32), resize, fill=0.2) - expected).abs().max() < 1.6 / 255  # PIL rounds twice, to whole grey levels


def test_crop_alone_loses_the_edge(images: Tensor) -> None:
    images = torch.zeros_like(images)
    changed = images.clone()
    changed[:, :, 0] = 1
    gap = {r: (fit(images, (32, 32), r) - fit(changed, (32, 32), r)).abs().max().item() for r in MODES}
    assert gap["crop"] == 0 and gap["squash"] > 0.5 and gap["pad"] > 0.5


@pytest.mark.parametrize(("shape", "tolerance"), [((48, 40), 0.06), ((32, 32), 1e-4)])  # PIL rounds whatever it resizes
@pytest.mark.parametrize("resize", MODES)
def test_scores_equal_open_clip(
    clip_folder: Path, images: Tensor, resize: str, shape: tuple[int, int], tolerance: float
) -> None:
    images = images[..., : shape[0], : shape[1]]
    name = f"local-dir:{clip_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, image_resize_mode=MODES[resize])
    tokens = open_clip.get_tokenizer(name)(PROMPTS)
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([preprocess(pil(i)) for i in images]), normalize=True)
        text = model.encode_text(tokens, normalize=True)
    scores = ClipScore(name, resize=resize).score(images, PROMPTS, CTX)
    expected = 100 * (image * text).sum(-1)
    assert expected.std() > 20 * tolerance
    torch.testing.assert_close(scores, expected, atol=tolerance, rtol=0)


def test_stored_halves_compute_in_float32(clip_folder: Path) -> None:
    stored = load_file(clip_folder / "open_clip_model.safetensors")
    loaded = load(f"local-dir:{clip_folder}", None).model
    assert {v.dtype for v in stored.values()} == {torch.float16}
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


def test_each_prompt_is_encoded_once_and_alone(clip_folder: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    reward, seen = ClipScore(f"local-dir:{clip_folder}"), []
    encode = open_clip.CLIP.encode_text

    def counted(self: Any, text: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(text))
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(open_clip.CLIP, "encode_text", counted)
    twice = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    reward.prepare(twice, CTX)
    assert seen == [1, 1]
    for _ in range(3):
        reward.score(images, twice, CTX)
    assert seen == [1, 1]
    reward.prepare(PROMPTS[1:3], CTX)  # the next run: one prompt is new, none is dropped
    reward.score(images[:1], PROMPTS[:1], CTX)
    assert seen == [1, 1, 1]
    monkeypatch.setattr(open_clip_model, "MANY_TEXTS", 2)
    reward.prepare(PROMPTS[1:3], CTX)
    reward.score(images[:1], PROMPTS[:1], CTX)
    assert seen == [1, 1, 1, 1]


def test_gradient_is_that_of_finite_differences(clip_folder: Path, images: Tensor) -> None:
    reward = ClipScore(f"local-dir:{clip_folder}")
    x = images[:1].clamp(0.2, 0.8).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(x, PROMPTS[:1], CTX).sum(), x)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        high, low = (reward.score(x + h * direction, PROMPTS[:1], CTX) for h in (5e-3, -5e-3))
    assert gradient.norm() > 0
    torch.testing.assert_close((high - low)[0] / 1e-2, gradient.norm(), rtol=0.03, atol=0)


def test_checkpoint_follows_the_model(embedded_clip: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def recorded(name: str, pretrained: str | None, device: str) -> Any:
        asked.append((name, pretrained))
        return load("shapes", None)

    monkeypatch.setattr("diffsteer.rewards.clip_score.load", recorded)
    follows, named = ClipScore(), ClipScore("ViT-L-14", "openai")
    for _ in range(2):
        for embedded in (True, False):
            follows.score(images, PROMPTS, Context(embedded=embedded))
            named.score(images, PROMPTS, Context(embedded=embedded))
    ClipScore("ViT-B-32").prepare(PROMPTS, Context(embedded=True))
    default = ("ViT-B-32", "laion2b_s34b_b79k")
    assert asked == [("shapes", None), ("ViT-L-14", "openai"), default, default]
    assert default[1] in open_clip.list_pretrained_tags_by_model(default[0])


@pytest.mark.parametrize("name", [None, "shapes", "local-dir"])
def test_embedded_clip_refuses_unknown_words(embedded_clip: Path, name: str | None) -> None:
    reward = ClipScore(f"local-dir:{embedded_clip}" if name == "local-dir" else name)
    reward.prepare(PROMPTS, Context(embedded=name is None))
    with pytest.raises(DiffsteerError, match=r"no word 'zebra' \('a red zebra'\); it knows: a, above, an, .*yellow$"):
        reward.prepare(["a red star", "a red zebra"], Context(embedded=name is None))


def test_another_clip_takes_any_word(clip_folder: Path, images: Tensor) -> None:
    reward = ClipScore(f"local-dir:{clip_folder}")
    reward.prepare(["a red zebra"], Context(embedded=True))
    assert reward.score(images[:1], ["a red zebra"], Context(embedded=True)).isfinite().all()


@pytest.fixture
def known_tiny(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny architecture among open_clip's own, with two tags: one trained with QuickGELU."""
    config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = str(clip_folder)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", config)
    file = {"file": str(clip_folder / "open_clip_model.safetensors"), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny", {"plain": file, "quick": file | {"quick_gelu": True}})
    return "ViT-tiny"


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_local_checkpoint_file(clip_folder: Path, known_tiny: str, images: Tensor, tmp_path: Path, kind: str) -> None:
    file = clip_folder / "open_clip_model.safetensors"
    if kind == "pickle":
        torch.save(load_file(file), tmp_path / "tiny.pt")
        file = tmp_path / "tiny.pt"
    loaded = load(known_tiny, str(file))
    expected = load_file(clip_folder / "open_clip_model.safetensors")
    assert all(torch.equal(v, expected[k].float()) for k, v in loaded.model.state_dict().items())
    assert ClipScore(known_tiny, str(file)).score(images, PROMPTS, CTX).isfinite().all()


def test_tags_bring_their_activation(known_tiny: str, images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kinds = {tag: {type(m).__name__ for m in load(known_tiny, tag).model.modules()} for tag in ("plain", "quick")}
    assert "QuickGELU" in kinds["quick"] and "QuickGELU" not in kinds["plain"]


def test_pickles_with_code_are_not_run(known_tiny: str, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"weight": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(DiffsteerError, match="could not be loaded"):
        load(known_tiny, str(tmp_path / "trap.pt"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-33", "openai", r"no CLIP model 'ViT-B-33'; nearest: .*ViT-B-32"),
        ("vit-b-32", "openai", r"no CLIP model 'vit-b-32'; nearest: ViT-B-32,"),
        ("shape", None, r"no CLIP model 'shape'; nearest: shapes,"),
        ("ViT-B-32", "laion2b_s34b_b79", r"ViT-B-32 has no weights 'laion2b_s34b_b79'; nearest: laion2b_s34b_b79k,"),
        ("ViT-L-14", None, r"which weights of ViT-L-14\?.*openai, .*laion2b_s32b_b82k"),
        ("ViT-B-32", "/nowhere/clip.pt", r"no checkpoint file '/nowhere/clip.pt'"),
        ("ViT-B-32", "clip.safetensors", r"no checkpoint file 'clip.safetensors'"),
        ("local-dir:/nowhere", None, r"local-dir:/nowhere could not be loaded \(.*not found"),
        ("ViT-B-32", "datacomp_m_s128m_b4k", r"datacomp_m_s128m_b4k.* could not be loaded \(.*pretrained"),  # offline
    ],
)
def test_what_cannot_be_loaded(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(DiffsteerError, match=message) as caught:
        ClipScore(name, pretrained).prepare(PROMPTS, CTX)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_not_random(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text((clip_folder / "open_clip_config.json").read_text())
    with pytest.raises(DiffsteerError, match="the CLIP model local-dir:.* could not be loaded"):
        ClipScore(f"local-dir:{tmp_path}").prepare(PROMPTS, CTX)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "stretch"}, "resize='stretch' is unknown; valid: squash, crop, pad"),
        ({"pretrained": "openai"}, "needs a model_name"),
        ({"model_name": "shapes", "pretrained": "openai"}, "brings its own weights"),
        ({"model_name": "hf-hub:a/b", "pretrained": "openai"}, "brings its own weights"),
    ],
)
def test_options_that_contradict(options: dict[str, str], message: str) -> None:
    with pytest.raises(DiffsteerError, match=message):
        ClipScore(**options)


def test_long_prompts_are_not_cut_in_silence(clip_folder: Path) -> None:
    reward = ClipScore(f"local-dir:{clip_folder}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.prepare([" ".join(["star"] * 14)], CTX)  # and a start and an end: 16 tokens
    with pytest.warns(UserWarning, match="CLIP reads 16 tokens"):
        reward.prepare([" ".join(["star"] * 15)], CTX)


def test_loading_leaves_logging_and_randomness_alone(clip_folder: Path) -> None:
    program = f"""
import logging, sys, torch
state = torch.random.get_rng_state()
from diffsteer.rewards import ClipScore
from diffsteer.types import Context
heavy = {{"open_clip", "diffusers", "transformers", "torchvision"}} & set(sys.modules)
assert not heavy, heavy
ClipScore("local-dir:{clip_folder}").prepare(["a star"], Context())
assert torch.equal(state, torch.random.get_rng_state())
assert not logging.root.handlers and not logging.root.filters
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_users_own_log_is_kept(clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load(f"local-dir:{clip_folder}", None)
        logging.warning("mine")
    assert [r.message for r in caplog.records if r.name == "root"] == ["mine"]
