"""What pictures are compared in, and with: the feature space and the real pictures that a configuration names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffsteer.evaluation.features import COLOURS, INCEPTION, Space, as_tensor, features_of_files, pictures_in, space_of
from diffsteer.prompts import Item
from diffsteer.shapes.models import MODELS
from diffsteer.told import named_reward
from diffsteer.types import Context, DiffsteerError

CLIP = "clip"  # whose score is CLIPScore
SHAPES, RENDERS = "shapes", 16  # the reference that the shapes world draws itself: so many pictures of each caption
Real = Callable[[Sequence[Item]], Tensor]  # from prompts to features (M, D) of real pictures


@dataclass(frozen=True)
class Reading:
    """What pictures are compared in, by its name, and the real ones, of so many a prompt (or in all, a folder's)."""

    name: str
    space: Space
    real: Real | None = None
    a_prompt: int = 0
    in_all: int = 0

    def many(self, prompts: int) -> int:
        """How many real pictures there are for so many prompts."""
        return self.in_all or prompts * self.a_prompt


def reading(told: DictConfig, base: DictConfig) -> Reading:
    """The feature space, and what makes the features of real pictures; None without a reference.

    Raises:
        DiffsteerError: an unknown space, a reference that is none.
    """
    embedded = base.model.path in MODELS
    ctx = Context(embedded=embedded)
    given = ("clip2" if embedded else CLIP) if told.features is None else told.features
    value = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    if isinstance(value, str) and (value == COLOURS or value.partition(":")[0] == INCEPTION):
        space = space_of(value, ctx)
    else:
        space = space_of(named_reward(value, "evaluate.features", COLOURS, INCEPTION), ctx)
    if told.reference is None:
        return Reading(str(value), space)
    if told.reference == SHAPES and not Path(SHAPES).exists():
        if not embedded or base.model.path == "shapes-motion":
            raise DiffsteerError(f"evaluate.reference={SHAPES} draws the shapes world; model={base.model.path} draws others")
        return Reading(str(value), space, partial(_renders, space), RENDERS)
    files = pictures_in(told.reference)
    return Reading(str(value), space, lambda items: features_of_files(space, files), in_all=len(files))


def _renders(space: Space, items: Sequence[Item]) -> Tensor:
    """Features of pictures that the shapes world draws itself of the prompts' captions."""
    from diffsteer.shapes.grammar import parse
    from diffsteer.shapes.scene import render, scene_of

    found = []
    for item in items:
        key = int.from_bytes(hashlib.sha256(item.prompt.encode()).digest()[:8], "little")
        pictures = [as_tensor(render(scene_of(parse(item.prompt), np.random.default_rng((key, n))))) for n in range(RENDERS)]
        with torch.no_grad():
            found.append(space(torch.stack(pictures)).float().cpu())
    return torch.cat(found)
