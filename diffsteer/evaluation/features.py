"""What samples are compared by: a feature space, and pictures from files as it takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsteer.diversity import features_of
from diffsteer.registry import nearest, registered
from diffsteer.reward import Reward
from diffsteer.sheet import first_frame
from diffsteer.types import Context, DiffsteerError

COLOURS, INCEPTION = "colours", "inception"
AT_A_TIME = 64
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".mp4")

Space = Callable[[Tensor], Tensor]  # from pictures (N, 3, H, W) in [0, 1] to features (N, D)


def space_of(named: str | Reward, ctx: Context) -> Space:
    """A feature space.

    Args:
        named: "colours" (on a grid of 8 x 8, centred, of length one: no network), "inception" (the 2048 numbers of Inception
            v3 that FID was defined with, by torch-fidelity, which fetches them; ``inception:FILE`` for weights at hand), or a
            reward that has features, such as `clip`.
        ctx: whose model it is that made the pictures.

    Raises:
        DiffsteerError: an unknown name, a reward without features, weights that cannot be loaded.
    """
    if isinstance(named, Reward):
        if not callable(getattr(named, "image_features", None)):
            have = sorted(n for n, cls in registered("reward").items() if hasattr(cls, "image_features"))
            raise DiffsteerError(f"evaluate.features: the reward {named.name} has no features; some have: {', '.join(have)}")
        return lambda x: named.image_features(x, ctx)  # type: ignore[attr-defined]
    if named == COLOURS:
        return features_of
    if named.partition(":")[0] == INCEPTION:
        return _inception(named.partition(":")[2] or None)
    raise DiffsteerError(f"evaluate.features={named} is unknown{nearest(named, [COLOURS, INCEPTION, *registered('reward')])}")


def features_of_files(space: Space, files: Sequence[Path]) -> Tensor:
    """Features (N, D), float32, of pictures in files; of a clip, its first frame. Pictures of one size go together."""
    found: list[Tensor] = []
    for group in _alike(files):
        with torch.no_grad():
            found.append(space(torch.stack(group)).float().cpu())
    return torch.cat(found)


def pictures_in(folder: str | Path) -> list[Path]:
    """The pictures in a folder and below it, in the order of their names.

    Raises:
        DiffsteerError: no folder, or one without pictures.
    """
    path = Path(folder)
    found = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
    if not found:
        what = "holds no pictures" if path.is_dir() else "is no folder"
        raise DiffsteerError(f"evaluate.reference={folder} {what}: give a folder with {', '.join(SUFFIXES)} files")
    return found


def _alike(files: Sequence[Path]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for path in files:
        try:
            picture = as_tensor(first_frame(path))
        except (OSError, ValueError) as error:
            raise DiffsteerError(f"{path} is no picture: {str(error).splitlines()[0]}") from error
        if group and (group[0].shape != picture.shape or len(group) == AT_A_TIME):
            yield group
            group = []
        group.append(picture)
    if group:
        yield group


def as_tensor(picture: Any) -> Tensor:
    """An RGB picture as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture, dtype=np.uint8).copy()).permute(2, 0, 1).float() / 255


def _inception(weights: str | None) -> Space:
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    except ModuleNotFoundError as error:
        raise DiffsteerError("evaluate.features=inception wants torch-fidelity: pip install torch-fidelity") from error
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DiffsteerError(f"evaluate.features=inception: its weights could not be loaded ({said})") from error

    def space(x: Tensor) -> Tensor:
        found: Tensor = network((x * 255).round().byte())
        return found

    return space
