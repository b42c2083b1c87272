"""What ``diffsteer list`` tells: the facts that samplers, rewards, models and schedules state of themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffsteer.registry import registered
from diffsteer.shapes.models import MODELS


def samplers() -> Iterator[str]:
    """Of each sampler: is it exact, does it need gradients, where it comes from, its parameters."""
    for name, cls in sorted(registered("sampler").items()):
        kind = "exact as particles grow" if cls.exact else "a heuristic"
        needs = "gradients by its settings" if isinstance(cls.needs_grad, property) else ""
        needs = needs or ("needs gradients" if cls.needs_grad else "no gradients")
        yield f"{name:18} {kind}; {needs}; {cls.source}"
        yield from _parameters(cls)
    for file in sorted((Path(__file__).parent / "configs" / "sampler").glob("*.yaml")):
        config = OmegaConf.load(file)
        if isinstance(config, DictConfig) and config.get("name") not in (None, "none", file.stem):
            told = ", ".join(f"{key!s}={value}" for key, value in config.items() if key not in ("defaults", "name"))
            yield f"{file.stem:18} {str(config.get('name'))} with {told}"
    yield f"{'none':18} the pipeline as it is, scored at the end"


def rewards() -> Iterator[str]:
    """Of each reward: what it looks at, the range of its scores, its licence and weights, its parameters."""
    for name, cls in sorted(registered("reward").items()):
        sees = f"{cls.input}{' and prompt' if cls.needs_prompt else ''}"
        kind = "differentiable" if cls.differentiable else "not differentiable"
        low, high = cls.range
        size = f" ({cls.weights_bytes / 1e9:.1f} GB)" if cls.weights_bytes else ""
        weights = f"weights: {cls.weights}{size}; licence: {cls.licence}" if cls.weights else "no weights"
        yield f"{name:18} {sees}; {kind}; range {low:g} to {high:g}; {weights}"
        yield from _parameters(cls)


def models() -> Iterator[str]:
    """Of each model: whether it ships, where it lies, its size."""
    for file in sorted((Path(__file__).parent / "configs" / "model").glob("*.yaml")):
        config = OmegaConf.load(file)
        if OmegaConf.is_missing(config, "path"):
            continue
        path = MODELS.get(str(config.path))
        if path is None:
            yield f"{config.name:16} fetched from huggingface.co/{config.path} when first used"
        elif not path.is_dir():
            yield f"{config.name:16} should ship with diffsteer, but {path} is missing"
        else:
            size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
            yield f"{config.name:16} ships with diffsteer: {path}, {size / 1e6:.0f} MB"
    yield f"{'PATH':16} a folder, or an id of the Hugging Face hub: model=./my-model, model=owner/name"


def _parameters(cls: type[Any]) -> Iterator[str]:
    fields = [f for f in dataclasses.fields(cls) if f.init] if dataclasses.is_dataclass(cls) else []
    if fields:
        yield " " * 17 + ", ".join(f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default}" for f in fields)


def schedules() -> Iterator[str]:
    """Of each schedule: where it comes from, its parameters."""
    for name, cls in sorted(registered("schedule").items()):
        yield f"{name:16} {cls.source}"
        yield from _parameters(cls)
    yield f"{'none':16} the model's own; timesteps=[...] or sigmas=[...] give numbers"


KINDS: dict[str, Callable[[], Iterator[str]]] = {
    "samplers": samplers,
    "rewards": rewards,
    "models": models,
    "schedules": schedules,
}
