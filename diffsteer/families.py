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
        entry: how states enter a call: "latents", as its argument of that name; "prepared", in the place of what the
            pipeline's own `prepare_latents` makes of a picture and a keyed noise; "step", as what a first step returns, for
            whose sake the denoiser is evaluated once more in every segment.
        enter: from states as `step` sees them to what ``latents=`` wants.
        doubled: `step` is handed every row twice, the guided estimate in both halves.
        together: conditions of one row depend on the other rows', so all are encoded at once.
        prompt: the argument that a session's prompts enter by; "batch_size" takes their number alone.
        guidance: the argument whose values above `guided_above` double the evaluations; "" where none does.
        mixed: why a row's bits depend on the other rows of its call; "" where they do not.
        by_index: arguments that take effect by the loop's own count of steps, where that is lost in a run in pieces.
        apart: guidance evaluates the denoiser in two forwards of N rows, not in one of 2 N.
        tiny: where its published tiny decoder lies; "" where there is none.
        returns_states: the call can return its last states. left: its end decodes to arrays, so it is left before.
    """

    layout: Layout
    makes: str = "images"
    no_reentry: str = ""
    entry: str = "latents"
    enter: Callable[[Any, Size, Tensor], Tensor] = as_it_is
    doubled: bool = False
    together: bool = False
    prompt: str = "prompt"
    guidance: str = "guidance_scale"
    guided_above: float = 1.0
    returns_states: bool = True
    left: bool = False
    mixed: str = ""
    by_index: tuple[str, ...] = ()
    apart: bool = False
    tiny: str = ""


TOGETHER = "it pads the texts of a call to one length"
SECOND_STREAM = "its sound is a second stream with states of its own"

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(decoding.image, tiny="madebyollin/taesd"),
    "StableDiffusionControlNetPipeline": Family(decoding.image, tiny="madebyollin/taesd"),
    "StableDiffusionImg2ImgPipeline": Family(decoding.image, entry="prepared"),
    "StableDiffusionInpaintPipeline": Family(decoding.image, entry="prepared"),
    "LatentConsistencyModelPipeline": Family(decoding.image, guidance="", returns_states=False, left=True),
    "StableDiffusionXLPipeline": Family(decoding.image, tiny="madebyollin/taesdxl"),
    "StableDiffusionXLImg2ImgPipeline": Family(decoding.image, entry="prepared"),
    "StableDiffusion3Pipeline": Family(decoding.image, tiny="madebyollin/taesd3"),
    "FluxPipeline": Family(decoding.packed, guidance="true_cfg_scale", apart=True, tiny="madebyollin/taef1"),
    "Flux2Pipeline": Family(decoding.patched, enter=decoding.unpacked, guidance="", tiny="madebyollin/taef2"),
    "QwenImagePipeline": Family(decoding.packed_video_vae, guidance="true_cfg_scale", apart=True, mixed=TOGETHER),
    "ZImagePipeline": Family(decoding.image, guided_above=0.0, tiny="madebyollin/taef1"),
    "PixArtSigmaPipeline": Family(decoding.image, tiny="madebyollin/taesdxl"),
    "SanaPipeline": Family(decoding.image),
    "HunyuanDiTPipeline": Family(decoding.image),
    "Lumina2Pipeline": Family(decoding.image, apart=True, by_index=("cfg_trunc_ratio",)),
    "AuraFlowPipeline": Family(decoding.image),
    "AnimateDiffPipeline": Family(decoding.video_by_image, makes="video", tiny="madebyollin/taesd"),
    "WanPipeline": Family(decoding.video, makes="video", apart=True),
    "CogVideoXPipeline": Family(decoding.frames_first, makes="video"),
    "LTXPipeline": Family(decoding.packed_video, makes="video"),
    "LTX2Pipeline": Family(decoding.packed_video, makes="video", no_reentry=SECOND_STREAM, returns_states=False, left=True),
    "HunyuanVideoPipeline": Family(decoding.scaled_video, makes="video", guidance="true_cfg_scale", apart=True),
    "StableAudioPipeline": Family(decoding.sound, makes="sound"),
    "AudioLDM2Pipeline": Family(decoding.spectrogram, makes="sound", together=True, mixed=TOGETHER),
    "DDPMPipeline": Family(decoding.pixels, entry="step", prompt="batch_size", guidance="", returns_states=False, left=True),
    "DiTPipeline": Family(decoding.image, entry="step", doubled=True, prompt="class_labels", returns_states=False, left=True),
}


def family_of(pipe: Any) -> Family | None:
    """The facts of a pipeline's class, or of the nearest class that it descends from."""
    cls = pipe if isinstance(pipe, type) else type(pipe)
    return next((FAMILIES[c.__name__] for c in cls.__mro__ if c.__name__ in FAMILIES), None)
