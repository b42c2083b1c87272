"""What a configuration asks for, checked: values that Hydra's types let through, and the prompts."""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from diffsteer.algebra import NOISES
from diffsteer.blocks import check_size
from diffsteer.config import Config
from diffsteer.media import check_video
from diffsteer.pipeline import TRANSITIONS, check_effect
from diffsteer.prompts import Item, as_items, read_items
from diffsteer.registry import nearest
from diffsteer.run import OUTPUTS
from diffsteer.shapes.models import MODELS
from diffsteer.sinks import check_sinks
from diffsteer.types import DiffsteerError

# What runs without a prompt: one caption a task of the shapes world.
CAPTIONS = (
    "a small star",
    "a triangle and a ring",
    "three red circles",
    "a large purple square",
    "a red circle left of a blue square",
    "a yellow star and a blue ring",
)
# The same for clips: what holds while things move.
CLIP_CAPTIONS = (
    "a small star",
    "a red circle",
    "a large purple square",
    "a blue ring",
    "a green triangle",
    "a yellow cross",
)
DTYPES = ("float32", "float16", "bfloat16")
# Arguments of a call that no text stands for, or that say who is who in a batch.
_NOT_HERE = ("latents", "callback_on_step_end", "ids", "reward_prompts", "watch", "rehearse", "generator")


def check(config: DictConfig, prompted: bool = False) -> bool:
    """Refuse what Hydra's types let through. Is this the demonstration, no prompt being given?

    Args:
        prompted: prompts are somebody else's matter.

    Raises:
        DiffsteerError: with the key.
    """
    valid = [f.name for f in fields(Config)]
    for key in config:
        if key not in valid:
            raise DiffsteerError(f"unknown key {key!r}{nearest(str(key), valid)}")
    choices = (("output", OUTPUTS), ("model.dtype", DTYPES), ("transition", TRANSITIONS), ("noise", NOISES))
    for key, allowed in choices:
        value = OmegaConf.select(config, key)
        if value not in allowed:
            raise DiffsteerError(f"{key}={value} is unknown{nearest(str(value), allowed)}")
    check_video(config.video)
    if not 0 <= config.seed < 2**63:
        raise DiffsteerError(f"seed={config.seed}; it lies in [0, 2^63)")
    if config.device is not None:
        try:
            torch.zeros(1, device=config.device).cpu()  # "meta" makes tensors that hold nothing
        except RuntimeError as error:
            raise DiffsteerError(f"device={config.device}: {str(error).splitlines()[0]}") from error
    if config.decoder not in ("full", "tiny") and not config.decoder.startswith("tiny:"):
        raise DiffsteerError(
            f"decoder={config.decoder}; valid: full, tiny, tiny:PATH (images are made, so that none is no choice)"
        )
    if config.decoder == "tiny" and config.model.path in MODELS:
        raise DiffsteerError(f"model={config.model.path} has no tiny decoder: give decoder=tiny:PATH, or decoder=full")
    check_effect(config.transition, config.noise, config.sampler.get("name") != "none")
    if isinstance(config.chunk, bool | float | DictConfig | ListConfig):
        raise DiffsteerError(f'chunk={config.chunk}; a number of rows, at least 1, or "auto"')
    check_size(config.chunk, config.deterministic)
    for key in ("batch", "num_inference_steps"):
        if config[key] is not None and config[key] < 1:
            raise DiffsteerError(f"{key}={config[key]}; at least 1 is needed")
    if config.guidance_scale is not None and not math.isfinite(config.guidance_scale):
        raise DiffsteerError(f"guidance_scale={config.guidance_scale}; it must be finite")
    check_sinks(list(config.sinks))
    if config.report < 0:
        raise DiffsteerError(f"report={config.report}; a number of prompts, 0 for none")
    if config.prompt is not None and config.prompts is not None:
        raise DiffsteerError("give prompt= or prompts=, not both")
    for key in config.call:
        if key in valid or key in _NOT_HERE:
            instead = f": give {key}=" if key in valid else " on the command line"
            raise DiffsteerError(f"call.{key} cannot be given{instead}")
    for key in ("sigmas", "timesteps"):
        values = config[key]
        if values is not None and not (isinstance(values, ListConfig) and all(type(v) in (int, float) for v in values)):
            raise DiffsteerError(f"{key}={values}; wanted numbers that fall, such as {key}=[...]")
    demo = config.prompt is None and config.prompts is None
    if demo and not prompted and config.model.path not in MODELS:
        raise DiffsteerError(f"model={config.model.path} needs prompts: give prompt=TEXT or prompts=FILE")
    return demo


def items_of(config: DictConfig) -> list[Item]:
    if config.prompts is not None:
        items = read_items(config.prompts)
    else:
        captions = CLIP_CAPTIONS if config.model.path == "shapes-motion" else CAPTIONS
        items = as_items(captions if config.prompt is None else [config.prompt])
    for item in items:
        try:
            f"{item.id}{item.prompt}".encode()
        except UnicodeEncodeError as error:
            raise DiffsteerError(
                f"prompt {item.id!r} is not Unicode text ({error.reason} at character {error.start})"
            ) from error
    return items
