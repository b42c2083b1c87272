"""The models that ship with diffsteer, loaded by diffusers from the folders of the package."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, MotionAdapter, StableDiffusionPipeline, UNet2DModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from diffsteer.shapes.models import MODELS, PIXELS, SHARED


def load_embedded(name: str, **kwargs: Any) -> Any:
    """A pipeline of `MODELS`; keyword arguments go to `from_pretrained`."""
    if name == "shapes-motion":
        still = load_embedded("shapes", **kwargs)
        adapter = MotionAdapter.from_pretrained(MODELS[name], torch_dtype=kwargs.get("torch_dtype", torch.float32))
        parts = {part: getattr(still, part) for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
        return AnimateDiffPipeline(**parts, motion_adapter=adapter)
    parts, shared = dict[str, Any](), SHARED.get(name, {})
    if "vae" in shared:
        parts["vae"] = AutoencoderKL.from_pretrained(shared["vae"], torch_dtype=kwargs.get("torch_dtype"))
    if "tokenizer" in shared:
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(shared["tokenizer"])
    return StableDiffusionPipeline.from_pretrained(MODELS[name], **{"safety_checker": None, **parts, **kwargs})


def load_pixels() -> tuple[nn.Module, Tensor]:
    """The network of the pixel-space model, (N, 3, 32, 32) -> noise, and its alphas_cumprod, (1000,)."""
    unet = UNet2DModel.from_pretrained(PIXELS / "unet", torch_dtype=torch.float32).eval().requires_grad_(False)
    return unet, DDIMScheduler.from_pretrained(PIXELS / "scheduler").alphas_cumprod
