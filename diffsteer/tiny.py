"""Tiny decoders: good enough to score what a sample is becoming, at a hundredth of the cost of the model's own decoder.

diffusers' `AutoencoderTiny` for Stable Diffusion, SDXL, SD3 and Flux latents. For those of FLUX.2 a decoder of our own that
reads the published weights (madebyollin/taesd, MIT): its first three blocks have a second path with a group norm, which
diffusers' class lacks. Tiny decoders take latents as the model denoises them: neither scaled nor shifted nor normalised.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer import decoding
from diffsteer.decoding import Size
from diffsteer.families import Family
from diffsteer.types import DiffsteerError, UnsupportedError

WIDTH, GROUPS, LATENT = 64, 4, 32
FILES = ("taef2_decoder.safetensors", "taef2.safetensors", "taef2_decoder.pth")


class Block(nn.Module):
    """Three convolutions around a skip; with `normed` a path of 1x1 convolutions and a group norm comes before."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
        self.pool: nn.Module | None = None
        if normed:
            inner = 4 * WIDTH
            narrow, widen = nn.Conv2d(WIDTH, inner, 1, bias=False), nn.Conv2d(inner, WIDTH, 1, bias=False)
            self.pool = nn.Sequential(narrow, nn.GroupNorm(GROUPS, inner), nn.ReLU(), widen)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        y: Tensor = (self.conv(x) + x).relu()
        return y


class Squash(nn.Module):
    """Latents softly within three."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * (x / 3).tanh()


def flux2_decoder() -> nn.Sequential:
    """Latents (N, 32, h, w) to images (N, 3, 8 h, 8 w) in about [0, 1]."""
    layers: list[nn.Module] = [Squash(), nn.Conv2d(LATENT, WIDTH, 3, padding=1), nn.ReLU()]
    for stage in range(3):
        layers += [Block(normed=stage == 0) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Block(False), nn.Conv2d(WIDTH, 3, 3, padding=1))


def load_flux2(where: str | Path) -> nn.Sequential:
    """The FLUX.2 decoder with weights from a file, a folder, or a hub id: plain tensors only.

    Raises:
        DiffsteerError: nothing there, or other weights.
    """
    path = Path(where)
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).is_file()), path)
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(str(where), "taef2.safetensors"))
        except (OSError, ValueError) as error:
            raise DiffsteerError(f"no tiny decoder in {str(where)!r} ({str(error).splitlines()[0]})") from error
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        found = load_file(path)
    else:
        found = torch.load(path, weights_only=True, map_location="cpu")
    # in the one file of encoder and decoder layers are named, and counted without the squashing in front
    named = {re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key): value for key, value in found.items()}
    if any(named):
        found = {f"{int(m[1]) + 1}.{m[2]}": value for m, value in named.items() if m}
    decoder = flux2_decoder()
    try:
        decoder.load_state_dict(found)
    except RuntimeError as error:
        raise DiffsteerError(f"{path} holds no tiny decoder of FLUX.2 latents: {str(error).splitlines()[0]}") from error
    return decoder.eval().requires_grad_(False)


def tiny_layout(pipe: Any, family: Family, where: str = "") -> decoding.Layout:
    """A layout that decodes with a tiny decoder: of a local path or hub id, or the published one of the family.

    Raises:
        UnsupportedError: no tiny decoder of these latents is known.
        DiffsteerError: it cannot be loaded.
    """
    where = where or family.tiny
    if not where:
        raise UnsupportedError(f"{type(pipe).__name__} has no tiny decoder; decoder=full and decoder=none are left")
    device = pipe._execution_device
    if family.layout is decoding.patched:
        network = load_flux2(where).to(device)

        def flux2(pipe: Any, size: Size, z: Tensor) -> Tensor:
            image: Tensor = network(pipe._unpatchify_latents(decoding.unpacked(pipe, size, z)).float())
            return image.clamp(0, 1)

        return flux2
    from diffusers import AutoencoderTiny

    try:
        vae = AutoencoderTiny.from_pretrained(where).to(device).requires_grad_(False)
    except (OSError, ValueError) as error:
        raise DiffsteerError(f"no tiny decoder in {where!r} ({str(error).strip().splitlines()[0]})") from error

    def tiny(pipe: Any, size: Size, z: Tensor) -> Tensor:
        unpack = getattr(pipe, "_unpack_latents", None)
        stand_in = SimpleNamespace(vae=vae, vae_scale_factor=getattr(pipe, "vae_scale_factor", 8), _unpack_latents=unpack)
        return family.layout(stand_in, size, z.to(vae.dtype))

    return tiny
