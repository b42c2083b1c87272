"""A tiny CLIP with random weights in open_clip's own folder format, in half precision as the embedded one is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def clip_config(vocab: int) -> dict[str, object]:
    return {
        "embed_dim": 768,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": vocab,
            "width": 32,
            "heads": 2,
            "layers": 2,
            "hf_tokenizer_name": "shapes",
            "tokenizer_kwargs": {"clean": "lower"},
        },
    }


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip
    from safetensors.torch import save_file

    from diffsteer.shapes.tokenizer import make_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    make_tokenizer().save_pretrained(folder)
    config = clip_config(len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]))
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        weights = {k: 1.5 * torch.randn_like(v) * v.std() if v.ndim > 1 else v for k, v in model.state_dict().items()}
    save_file({k: v.half().contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def embedded_clip(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny CLIP in the place of the embedded one."""
    monkeypatch.setattr("diffsteer.shapes.models.CLIP", clip_folder)
    return clip_folder


@pytest.fixture
def images() -> Tensor:
    """Five images (5, 3, 48, 40) of whole grey levels, unlike each other: smooth ones and a noisy one."""
    from torch.nn.functional import interpolate

    draws = torch.Generator().manual_seed(3)
    coarse = interpolate(torch.rand(4, 3, 6, 5, generator=draws), (48, 40), mode="bilinear")
    noisy = torch.rand(1, 3, 48, 40, generator=draws)
    return (torch.cat([coarse, noisy]) * 255).round() / 255


@pytest.fixture(scope="session")
def v2_state() -> dict[str, Tensor]:
    """Tensors in the layout of the LAION v2 head, its ratings near 5."""
    draws, widths = torch.Generator().manual_seed(1), (768, 1024, 128, 64, 16, 1)
    state = {}
    for i, a, b in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        state[f"layers.{i}.weight"] = torch.randn(b, a, generator=draws) / a**0.5
        state[f"layers.{i}.bias"] = torch.zeros(b) if b > 1 else torch.full((1,), 5.0)
    return state


@pytest.fixture
def head_file(tmp_path: Path, v2_state: dict[str, Tensor]) -> Path:
    torch.save(v2_state, tmp_path / "head.pth")
    return tmp_path / "head.pth"
