"""Where the embedded models lie, and what was found best for them. Imports neither torch nor diffusers by itself."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).resolve().parent / "weights"
MODELS = {
    "shapes": WEIGHTS / "sd",
    "shapes-flow": WEIGHTS / "sd-flow",
    "shapes-motion": WEIGHTS / "sd-motion",
    "shapes-turbo": WEIGHTS / "sd-turbo",
}
PIXELS = WEIGHTS / "pixels"  # a network alone, which no pipeline that can be steered has
_OF_THE_FIRST = {part: WEIGHTS / "sd" / part for part in ("vae", "tokenizer", "unet", "text_encoder")}
# What a model has from another folder.
SHARED = {
    "shapes-flow": {part: _OF_THE_FIRST[part] for part in ("vae", "tokenizer")},
    "shapes-turbo": {part: _OF_THE_FIRST[part] for part in ("vae", "tokenizer")},
    "shapes-motion": _OF_THE_FIRST,
}
NOISE = WEIGHTS / "noise-turbo" / "change.safetensors"  # of the few-step model, for its noise network
CLIP, CLIP2 = WEIGHTS / "clip", WEIGHTS / "clip2"
DEFAULTS = WEIGHTS / "defaults.json"


@functools.cache
def _defaults() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = json.loads(DEFAULTS.read_text())
    return loaded


@functools.cache
def _first_weights() -> dict[str, Any]:
    from safetensors import safe_open

    found = {}
    for name in ("shapes", "shapes-flow", "shapes-turbo"):
        with safe_open(MODELS[name] / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
            found[name] = file.get_tensor("conv_in.weight")
    return found


def embedded_name(pipe: Any) -> str:
    """Which of the package's own weights a pipeline has, wherever it was loaded from; "" if none. Told by the denoiser's first
    layer."""
    weight = getattr(getattr(getattr(pipe, "unet", None), "conv_in", None), "weight", None)
    if weight is not None:
        for name, own in _first_weights().items():
            if own.shape == weight.shape and bool((weight.cpu() == own.to(weight.dtype)).all()):
                return "shapes-motion" if getattr(pipe, "motion_adapter", None) is not None else name
    return ""


def is_embedded(pipe: Any) -> bool:
    """Has this pipeline weights that ship with diffsteer?"""
    return bool(embedded_name(pipe))


@functools.cache
def digest(name: str) -> str:
    """SHA-256 of everything that makes an embedded model's result: its weights, the rewards' and its defaults."""
    sha = hashlib.sha256(json.dumps(_defaults()[name], sort_keys=True).encode())
    for folder in (MODELS[name], *SHARED.get(name, {}).values(), CLIP, CLIP2):
        for file in sorted(folder.rglob("*.safetensors")):
            sha.update(file.read_bytes())
    return sha.hexdigest()


def recommended(pipe: Any) -> dict[str, Any]:
    """Call arguments chosen for an embedded model on development captions (guidance scale, steps); {} for any other."""
    return recommended_for(embedded_name(pipe))


def recommended_for(name: str) -> dict[str, Any]:
    """The same for a model by its name."""
    return dict(_defaults().get(name, {}))
