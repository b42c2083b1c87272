"""The pipelines that ship with diffsteer, loaded by diffusers from the folders of the package."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from diffsteer.shapes.models import MODELS, SHARED


def load_embedded(name: str, **kwargs: Any) -> Any:
    """A pipeline of `MODELS`; keyword arguments go to `from_pretrained`."""
    parts, shared = dict[str, Any](), SHARED.get(name, {})
    if "vae" in shared:
        parts["vae"] = AutoencoderKL.from_pretrained(shared["vae"], torch_dtype=kwargs.get("torch_dtype"))
    if "tokenizer" in shared:
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(shared["tokenizer"])
    return StableDiffusionPipeline.from_pretrained(MODELS[name], **{"safety_checker": None, **parts, **kwargs})
