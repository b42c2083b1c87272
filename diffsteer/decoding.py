"""From latents, as a scheduler's `step` sees them, to samples in [0, 1]: one small decoder a layout of latents.

A decoder is a function ``(pipe, size, latents) -> samples``: images (N, 3, H, W), videos (N, F, 3, H, W), or sound
(N, channels, T) in [-1, 1]. What it computes is what the pipeline itself does after its loop, without its progress, its safety
checker and its conversion to pictures; autograd reaches the latents.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsteer.types import DiffsteerError

Layout = Callable[[Any, "Size", Tensor], Tensor]


class Size(NamedTuple):
    """Of what a call makes, as the pipeline was asked: height and width in pixels, frames, seconds of sound from `start` on."""

    height: int
    width: int
    frames: int = 1
    start: float = 0.0
    end: float | None = None


def size_of(pipe: Any, call: dict[str, Any]) -> Size:
    """The size that a call asks for, by its arguments, the signature's defaults or the pipeline's own.

    Raises:
        DiffsteerError: a text for a number.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters

    def asked(name: str, otherwise: Any) -> Any:
        value = call.get(name)
        if value is None and name in parameters:
            value = parameters[name].default
        value = otherwise if value in (None, inspect.Parameter.empty) else value
        if isinstance(value, str):
            raise DiffsteerError(f"{name}={value!r} is no number")
        return value

    factor = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", 8)
    usual = getattr(pipe, "default_sample_size", None)
    if usual is None:
        denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        usual = getattr(getattr(denoiser, "config", None), "sample_size", None) or 64
    tall, wide = usual if isinstance(usual, (list, tuple)) else (usual, usual)
    return Size(
        height=int(asked("height", tall * factor)),
        width=int(asked("width", wide * factor)),
        frames=int(asked("num_frames", 1)),
        start=float(asked("initial_audio_start_s" if "initial_audio_start_s" in parameters else "audio_start_in_s", 0.0)),
        end=asked("audio_end_in_s", asked("audio_length_in_s", None)),
    )


def unit_range(x: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], what lies outside cut off."""
    return (x / 2 + 0.5).clamp(0, 1)


def pixels(pipe: Any, size: Size, x: Tensor) -> Tensor:
    """A model of pixels has nothing to decode."""
    return unit_range(x)


def image(pipe: Any, size: Size, z: Tensor) -> Tensor:
    """One image a row, (N, C, h, w), scaled and perhaps shifted, or normalised by channel."""
    vae, config = pipe.vae, pipe.vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(config[key], device=z.device, dtype=z.dtype)[:, None, None] for key in ("latents_mean", "latents_std")
        )
        z = z * std / config.scaling_factor + mean
    else:
        z = z / config.scaling_factor + (config.get("shift_factor") or 0)
    return unit_range(_decode(vae, z))


def packed(pipe: Any, size: Size, z: Tensor) -> Tensor:
    """Flux: (N, h w / 4, 4 C), each token a square of 2 x 2."""
    return image(pipe, size, pipe._unpack_latents(z, size.height, size.width, pipe.vae_scale_factor))


def packed_video_vae(pipe: Any, size: Size, z: Tensor) -> Tensor:
    """Qwen-Image: packed as Flux's, decoded as a video of one frame."""
    z = pipe._unpack_latents(z, size.height, size.width, pipe.vae_scale_factor)
    return _video(pipe, z)[:, 0]


def unpacked(pipe: Any, size: Size, z: Tensor) -> Tensor:
    """Flux 2's (N, h w, 4 C) as (N, 4 C, h, w), each place a square of 2 x 2."""
    tall, wide = (side // (2 * pipe.vae_scale_factor) for side in (size.height, size.width))
    return z.permute(0, 2, 1).reshape(len(z), z.shape[2], tall, wide)


def patched(pipe: Any, size: Size, z: Tensor) -> Tensor:
    """Flux 2: (N, h w, 4 C), normalised by the running statistics of a batch norm."""
    norm, epsilon = pipe.vae.bn, pipe.vae.config.batch_norm_eps
    mean, std = norm.running_mean.view(1, -1, 1, 1), (norm.running_var.view(1, -1, 1, 1) + epsilon).sqrt()
    z = unpacked(pipe, size, z)
    return unit_range(_decode(pipe.vae, pipe._unpatchify_latents(z * std.to(z) + mean.to(z))))


def video_by_image(pipe: Any, size: Size, z: Tensor) -> Tensor:
    """AnimateDiff: (N, C, F, h, w), every frame an image of its own."""
    frames = image(pipe, size, z.transpose(1, 2).flatten(0, 1))
    return frames.reshape(len(z), -1, *frames.shape[1:])


def encoded_by_image(pipe: Any, size: Size, frames: Tensor) -> Tensor:
    """Frames (F, 3, H, W) in [0, 1] -> (1, C, F, h, w), the inverse of `video_by_image`: the means of their posteriors."""
    vae = pipe.vae
    x = torch.nn.functional.interpolate(frames, (size.height, size.width), mode="bilinear", antialias=True, align_corners=False)
    z: Tensor = vae.encode((x * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor
    return z.transpose(0, 1)[None]


def video(pipe: Any, size: Size, z: Tensor) -> Tensor:
    """Wan: (N, C, F, h, w), normalised by channel."""
    return _video(pipe, z)


def scaled_video(pipe: Any, size: Size, z: Tensor) -> Tensor:
    """HunyuanVideo: (N, C, F, h, w), scaled."""
    return unit_range(_decode(pipe.vae, z / pipe.vae.config.scaling_factor)).transpose(1, 2)


def frames_first(pipe: Any, size: Size, z: Tensor) -> Tensor:
    """CogVideoX: (N, F, C, h, w), scaled."""
    return scaled_video(pipe, size, z.transpose(1, 2))


def packed_video(pipe: Any, size: Size, z: Tensor) -> Tensor:
    """LTX: (N, tokens, C), normalised by channel."""
    spatial, temporal = pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio
    patches = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    frames = (size.frames - 1) // temporal + 1
    z = pipe._unpack_latents(z, frames, size.height // spatial, size.width // spatial, *patches)
    vae = pipe.vae
    z = pipe._denormalize_latents(z, vae.latents_mean, vae.latents_std, vae.config.scaling_factor).to(vae.dtype)
    return unit_range(vae.decode(z, None, return_dict=False)[0]).transpose(1, 2)


def rate_of(pipe: Any) -> int:
    """Of a pipeline's sound, in samples a second: its vocoder's, or its autoencoder's."""
    return int((getattr(pipe, "vocoder", None) or pipe.vae).config.sampling_rate)


def sound(pipe: Any, size: Size, z: Tensor) -> Tensor:
    """Stable Audio: (N, C, T) to the seconds that were asked for, (N, channels, samples) in [-1, 1]."""
    rate = rate_of(pipe)
    end = size.end
    if end is None:
        end = pipe.transformer.config.sample_size * pipe.vae.hop_length / rate
    wave: Tensor = pipe.vae.decode(z.to(pipe.vae.dtype)).sample[:, :, int(size.start * rate) : int(end * rate)]
    return wave


def spectrogram(pipe: Any, size: Size, z: Tensor) -> Tensor:
    """AudioLDM 2: latents of a spectrogram, which a vocoder makes heard: (N, 1, samples)."""
    mel = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample
    rate = rate_of(pipe)
    wave: Tensor = pipe.vocoder(mel.squeeze(1) if mel.ndim == 4 else mel)
    end = size.end
    if end is None:
        seconds_a_step = math.prod(pipe.vocoder.config.upsample_rates) / rate
        end = pipe.unet.config.sample_size * pipe.vae_scale_factor * seconds_a_step
    return wave[:, None, : int(end * rate)]


def _video(pipe: Any, z: Tensor) -> Tensor:
    vae = pipe.vae
    z = z.to(vae.dtype)
    mean, std = (
        torch.tensor(vae.config[key], device=z.device, dtype=z.dtype).view(1, -1, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    return unit_range(_decode(vae, z * std + mean)).transpose(1, 2)


def _decode(vae: Any, z: Tensor) -> Tensor:
    decoded: Tensor = vae.decode(z.to(vae.dtype), return_dict=False)[0]
    return decoded
