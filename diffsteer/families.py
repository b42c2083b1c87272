"""What is true of each pipeline class that can be steered. `tests/families` proves every line and prints the README's table.

A class stands here by name, and its subclasses with it. Nothing here steers: a line says where samples come from and what of
the general machinery (`diffsteer.backend`) a class carries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffsteer import decoding
from diffsteer.decoding import Layout, Size


def as_it_is(pipe: Any, size: Size, x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Family:
    """The facts of a class.

    Attributes:
        layout: the decoder of its latents. makes: "images", "video" or "sound".
        no_reentry: why a run cannot be cut into calls; "" where it can. Without re-entry all particles run in one call,
            selection happening inside `step`, and there are no gradients.
        takes_latents: the first states enter as ``latents=``; else they are drawn by the pipeline from a keyed generator a row.
        enter: from states as `step` sees them to what ``latents=`` wants.
        doubled: `step` is handed every row twice, the guided estimate in both halves.
        together: conditions of one row depend on the other rows', so all are encoded at once.
        prompt: the argument that a session's prompts enter by; "batch_size" takes their number alone.
        guidance: the argument whose values above 1 double the evaluations; "" where none does.
        apart: guidance evaluates the denoiser in two forwards of N rows, not in one of 2 N.
        tiny: where its published tiny decoder lies; "" where there is none.
        returns_states: the call can return its last states, as `step` left them.
    """

    layout: Layout
    makes: str = "images"
    no_reentry: str = ""
    takes_latents: bool = True
    enter: Callable[[Any, Size, Tensor], Tensor] = as_it_is
    doubled: bool = False
    together: bool = False
    prompt: str = "prompt"
    guidance: str = "guidance_scale"
    returns_states: bool = True
    apart: bool = False
    tiny: str = ""


NO_LATENTS = "its call takes no latents="
SECOND_STREAM = "its sound is a second stream with states of its own"
IMAGE_AS_NOISE = "it re-noises its image with latents="

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(decoding.image, tiny="madebyollin/taesd"),
    "StableDiffusionControlNetPipeline": Family(decoding.image, tiny="madebyollin/taesd"),
    "StableDiffusionImg2ImgPipeline": Family(decoding.image, no_reentry=NO_LATENTS, takes_latents=False),
    "StableDiffusionInpaintPipeline": Family(decoding.image, no_reentry=IMAGE_AS_NOISE),
    "LatentConsistencyModelPipeline": Family(decoding.image, guidance="", returns_states=False),
    "StableDiffusionXLPipeline": Family(decoding.image, tiny="madebyollin/taesdxl"),
    "StableDiffusionXLImg2ImgPipeline": Family(
        decoding.image, no_reentry="its call cuts the time grid by strength=", takes_latents=False
    ),
    "StableDiffusion3Pipeline": Family(decoding.image, tiny="madebyollin/taesd3"),
    "FluxPipeline": Family(decoding.packed, guidance="true_cfg_scale", apart=True, tiny="madebyollin/taef1"),
    "Flux2Pipeline": Family(decoding.patched, enter=decoding.unpacked, guidance="", tiny="madebyollin/taef2"),
    "QwenImagePipeline": Family(decoding.packed_video_vae, guidance="true_cfg_scale", apart=True),
    "ZImagePipeline": Family(decoding.image, tiny="madebyollin/taef1"),
    "PixArtSigmaPipeline": Family(decoding.image, tiny="madebyollin/taesdxl"),
    "SanaPipeline": Family(decoding.image),
    "HunyuanDiTPipeline": Family(decoding.image),
    "Lumina2Pipeline": Family(decoding.image, apart=True),
    "AuraFlowPipeline": Family(decoding.image),
    "AnimateDiffPipeline": Family(decoding.video_by_image, makes="video", tiny="madebyollin/taesd"),
    "WanPipeline": Family(decoding.video, makes="video", apart=True),
    "CogVideoXPipeline": Family(decoding.frames_first, makes="video"),
    "LTXPipeline": Family(decoding.packed_video, makes="video"),
    "LTX2Pipeline": Family(decoding.packed_video, makes="video", no_reentry=SECOND_STREAM, returns_states=False),
    "HunyuanVideoPipeline": Family(decoding.scaled_video, makes="video", guidance="true_cfg_scale", apart=True),
    "StableAudioPipeline": Family(decoding.sound, makes="sound"),
    "AudioLDM2Pipeline": Family(decoding.spectrogram, makes="sound", together=True),
    "DDPMPipeline": Family(
        decoding.pixels, no_reentry=NO_LATENTS, takes_latents=False, prompt="batch_size", guidance="", returns_states=False
    ),
    "DiTPipeline": Family(
        decoding.image, no_reentry=NO_LATENTS, takes_latents=False, doubled=True, prompt="class_labels", returns_states=False
    ),
}


def family_of(pipe: Any) -> Family | None:
    """The facts of a pipeline's class, or of the nearest class that it descends from."""
    cls = pipe if isinstance(pipe, type) else type(pipe)
    return next((FAMILIES[c.__name__] for c in cls.__mro__ if c.__name__ in FAMILIES), None)
