"""What can be asked of a pipeline before it runs: facts, the arguments it takes, its networks, its decoder, its pictures."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from diffsteer.decoding import rate_of, size_of
from diffsteer.families import FAMILIES, Family, family_of
from diffsteer.media import Sound
from diffsteer.shapes.models import MODELS, is_embedded
from diffsteer.types import DiffsteerError, UnsupportedError

DENOISERS = ("unet", "transformer", "transformer_2")
# Call arguments that may have one value a prompt.
PER_PROMPT = (
    "prompt_2",
    "prompt_3",
    "negative_prompt",
    "negative_prompt_2",
    "negative_prompt_3",
    "image",
    "mask_image",
    "control_image",
)
# Call arguments that the session gives itself, or that have one row an image and so cannot follow blocks of rows.
_OWN = {
    *("prompt", "prompt_embeds", "negative_prompt_embeds", "class_labels", "batch_size"),
    *("denoising_start", "denoising_end"),  # between a base and its refiner
    *("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "output_type", "return_dict", "generator"),
}
_PER_ROW = {"ip_adapter_image", "ip_adapter_image_embeds"}


def check_pipeline(pipe: Any) -> Family:
    """The facts of a pipeline's class.

    Raises:
        UnsupportedError: a pipeline class that no session was tried on; FreeInit.
    """
    family = family_of(pipe)
    if not isinstance(pipe, DiffusionPipeline) or family is None:
        raise UnsupportedError(f"{type(pipe).__name__} cannot be steered; supported: {', '.join(FAMILIES)}, and CallableModel")
    if getattr(pipe, "free_init_enabled", False):
        raise UnsupportedError(
            f"{type(pipe).__name__} has FreeInit enabled, which walks its grid several times over: call its disable_free_init()"
        )
    return family


def refuse_by_name(path: str, **options: Any) -> None:
    """Refuse a saved pipeline by what its index says, before its weights are fetched.

    Raises:
        UnsupportedError: a pipeline class that no session was tried on.
    """
    if path in MODELS:
        return
    try:
        name = DiffusionPipeline.load_config(path, **options).get("_class_name")
    except (OSError, ValueError):  # nothing there: loading says so
        return
    known = getattr(diffusers, str(name), None)
    if known is None or family_of(known) is None:
        raise UnsupportedError(f"{path} is a {name}, which cannot be steered; supported: {', '.join(FAMILIES)}")


def check_call(pipe: Any, call: dict[str, Any]) -> None:
    """Refuse call arguments that the pipeline does not know, or that the session gives itself.

    Raises:
        DiffsteerError: with the nearest valid name.
    """
    valid = [p for p in inspect.signature(type(pipe).__call__).parameters if p not in ("self", "kwargs")]
    for name in call:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DiffsteerError(f"{type(pipe).__name__} takes no argument {name!r}{hint}")
        if name in _OWN | _PER_ROW:
            raise DiffsteerError(f"the argument {name!r} of {type(pipe).__name__} cannot be given to a steered run")


def given_per_prompt(call: dict[str, Any], negative_prompt: Any, prompts: int) -> dict[str, list[Any]]:
    """Arguments with one value a prompt: their rows follow the blocks.

    Raises:
        DiffsteerError: another number of them.
    """
    each = {k: list(call[k]) for k in PER_PROMPT if isinstance(call.get(k), (list, tuple, Tensor))}
    if negative_prompt is not None:
        given = [negative_prompt] * prompts if isinstance(negative_prompt, str) else list(negative_prompt)
        each["negative_prompt"] = given
    for name, values in each.items():
        if len(values) == 1:
            each[name] = values * prompts
        elif len(values) != prompts:
            what = name.replace("_", " ") + ("s" if len(values) != 1 else "")
            raise DiffsteerError(f"{len(values)} {what} for {prompts} prompts; give one, or one each")
    return each


def class_labels(pipe: Any, prompts: Sequence[Any]) -> list[int]:
    """The numbers of classes that are given as numbers, in digits or by one of the names that the pipeline knows them by.

    Raises:
        DiffsteerError: no such class, and the nearest.
    """
    known = getattr(pipe, "labels", {})

    def number(prompt: Any) -> int:
        if isinstance(prompt, int) or str(prompt).isdecimal():
            return int(prompt)
        if prompt not in known:
            near = difflib.get_close_matches(str(prompt), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DiffsteerError(f"{type(pipe).__name__} draws classes, by number or by name, and knows no {prompt!r}{hint}")
        return int(known[prompt])

    return [number(prompt) for prompt in prompts]


def asked_of(pipe: Any, prompts: Sequence[Any]) -> dict[str, Any]:
    """Prompts as the argument of the pipeline's call that they enter by.

    Raises:
        DiffsteerError: see `class_labels`.
    """
    name = check_pipeline(pipe).prompt
    if name == "batch_size":
        return {name: len(prompts)}
    return {name: class_labels(pipe, prompts) if name == "class_labels" else list(prompts)}


def quiet() -> None:
    """No progress bars and, unless their own variables ask for more, only errors from diffusers and transformers."""
    from transformers.utils import logging as transformers_logging

    for name, logging in (("DIFFUSERS_VERBOSITY", diffusers_logging), ("TRANSFORMERS_VERBOSITY", transformers_logging)):
        if name not in os.environ:
            logging.set_verbosity_error()
        logging.disable_progress_bar()


def is_guided(pipe: Any, call: dict[str, Any]) -> bool:
    """Does a call double its rows for classifier-free guidance?"""
    family = check_pipeline(pipe)
    name = family.guidance
    if not name:
        return False
    parameters = inspect.signature(type(pipe).__call__).parameters
    if name == "true_cfg_scale" and call.get("negative_prompt") is None:
        return False
    embedded = getattr(getattr(getattr(pipe, "unet", None), "config", None), "time_cond_proj_dim", None)
    return bool(call.get(name, parameters[name].default) > family.guided_above and embedded is None)


def skipped_steps(pipe: Any, steps: int, call: dict[str, Any]) -> int:
    """At how many of so many steps skip-layer guidance evaluates the denoiser once more for every row."""
    if call.get("skip_guidance_layers") is None:
        return 0
    parameters = inspect.signature(type(pipe).__call__).parameters
    start, stop = (
        steps * float(call.get(name, parameters[name].default))
        for name in ("skip_layer_guidance_start", "skip_layer_guidance_stop")
    )
    return sum(start < i < stop for i in range(steps))


def denoisers_of(pipe: Any) -> list[Any]:
    """The networks that are called at every step."""
    return [m for m in (getattr(pipe, n, None) for n in DENOISERS) if m is not None]


def is_offloaded(module: torch.nn.Module) -> bool:
    """Do hooks of accelerate, or of diffusers' group offloading, move the weights of a component to and fro?"""
    if getattr(module, "_hf_hook", None) is not None:
        return True
    registries = (getattr(m, "_diffusers_hook", None) for m in module.modules())
    return any(r is not None and r.get_hook("group_offloading") is not None for r in registries)


def refuse_counted(pipe: Any, call: dict[str, Any], instead: str) -> None:
    """Refuse to run a part of the grid with arguments that take effect by the loop's own count of steps.

    Raises:
        UnsupportedError: with the argument, and what it runs instead.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in check_pipeline(pipe).by_index:
        default = parameters[name].default if name in parameters else None
        if call.get(name, default) != default:
            raise UnsupportedError(
                f"{type(pipe).__name__} counts the steps of its call for {name}, so that it runs from {instead}: "
                f"leave {name} out"
            )


def refuse_graph(pipe: Any, modules: Sequence[torch.nn.Module]) -> None:
    """Refuse gradients through a class that cannot be cut, or through modules whose weights are moved away.

    Raises:
        UnsupportedError: with the reason.
    """
    name, family = type(pipe).__name__, check_pipeline(pipe)
    if family.no_reentry:
        raise UnsupportedError(f"{name} gives no gradients: {family.no_reentry}")
    if any(is_offloaded(m) for m in modules):
        raise UnsupportedError(
            f"{name} is offloaded, which moves weights away before the backward pass needs them: for gradients load it "
            "without enable_model_cpu_offload, enable_sequential_cpu_offload or enable_group_offload"
        )


def refuse_caches(pipe: Any) -> None:
    """Refuse what is remembered by row, where rows are about to be permuted on the way.

    Raises:
        UnsupportedError: a denoiser with one of diffusers' caches.
    """
    for module in denoisers_of(pipe):
        if getattr(module, "is_cache_enabled", False):
            name, cache = type(module).__name__, type(module._cache_config).__name__.removesuffix("Config")
            raise UnsupportedError(
                f"{name} has a cache ({cache}), which would hand a particle what was computed for another: "
                "call its disable_cache(), or select at the end alone (BestOfN)"
            )


def refuse_tiny(pipe: Any, where: str = "") -> None:
    """Refuse to look for a tiny decoder that nobody published.

    Raises:
        UnsupportedError: an embedded model, whose latents are its own, without a path.
    """
    if not where and is_embedded(pipe):
        raise UnsupportedError("the embedded shapes models have no tiny decoder: give decoder=tiny:PATH, or decoder=full")


def decoder_of(pipe: Any, **call: Any) -> Callable[[Tensor], Tensor]:
    """The decoder of a pipeline: latents as `step` sees them, to samples as the pipeline itself makes them.

    Args:
        call: the arguments that decide sizes (height, width, num_frames, audio_end_in_s), where they are not the defaults.

    Raises:
        UnsupportedError: a pipeline class that cannot be steered.
    """
    return partial(check_pipeline(pipe).layout, pipe, size_of(pipe, call))


def tiny_decoder_of(pipe: Any, where: str = "", **call: Any) -> Callable[[Tensor], Tensor]:
    """As `decoder_of`, with a tiny decoder (see `diffsteer.tiny`).

    Args:
        where: a local path or a hub id; "" is the published one of the pipeline's family.

    Raises:
        UnsupportedError: see `refuse_tiny`.
    """
    refuse_tiny(pipe, where)
    from diffsteer.tiny import tiny_layout

    return partial(tiny_layout(pipe, check_pipeline(pipe), where), pipe, size_of(pipe, call))


def as_images(pipe: Any, samples: Tensor) -> list[Any]:
    """Samples (N, 3, H, W) in [0, 1] to PIL images, rounded as diffusers rounds; blacked out where a safety checker says so.
    Of a video (N, F, 3, H, W) a list of its frames; of a sound (N, channels, T) a `Sound`."""
    from diffusers.image_processor import VaeImageProcessor

    if samples.ndim == 3:
        return [Sound(wave, rate_of(pipe)) for wave in samples]
    if samples.ndim == 5:
        return [as_images(pipe, frames) for frames in samples]
    if getattr(pipe, "safety_checker", None) is not None:
        signed, flags = pipe.run_safety_checker(samples * 2 - 1, samples.device, samples.dtype)
        black = torch.tensor([bool(f) for f in flags], device=samples.device)[:, None, None, None]
        samples = torch.where(black, torch.zeros_like(samples), signed / 2 + 0.5)
    array = samples.detach().cpu().permute(0, 2, 3, 1).float().numpy()
    return list(VaeImageProcessor.numpy_to_pil(array))
