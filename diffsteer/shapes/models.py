"""Where the embedded models lie, and what was found best for them. Imports neither torch nor diffusers by itself."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).resolve().parent / "weights"
MODELS = {"shapes": WEIGHTS / "sd"}
CLIP = WEIGHTS / "clip"


@functools.cache
def _defaults() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((WEIGHTS / "defaults.json").read_text())
    return loaded


@functools.cache
def _first_weights() -> dict[str, Any]:
    from safetensors import safe_open

    found = {}
    for name, path in MODELS.items():
        with safe_open(path / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
            found[name] = file.get_tensor("conv_in.weight")
    return found


def is_embedded(pipe: Any) -> bool:
    """Has this pipeline the package's own weights? Told by the denoiser's first layer, wherever it was loaded from."""
    weight = getattr(getattr(getattr(pipe, "unet", None), "conv_in", None), "weight", None)
    if weight is None:
        return False
    return any(
        own.shape == weight.shape and bool((weight.cpu().to(own.dtype) == own).all()) for own in _first_weights().values()
    )


@functools.cache
def digest() -> str:
    """SHA-256 of everything that makes an embedded model's result: its weights, the rewards' and the defaults."""
    sha = hashlib.sha256((WEIGHTS / "defaults.json").read_bytes())
    for file in sorted(WEIGHTS.rglob("*.safetensors")):
        sha.update(file.read_bytes())
    return sha.hexdigest()


def recommended(pipe: Any) -> dict[str, Any]:
    """Call arguments chosen for an embedded model on development captions (guidance scale, steps); {} for any other."""
    return dict(_defaults()) if is_embedded(pipe) else {}
