"""What pixels alone tell: brightness, sharpness, mirror symmetry. No network is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.reward import Reward
from diffsteer.types import Context, DiffsteerError, check_numbers, setting

LUMA = (0.299, 0.587, 0.114)  # Rec. 601
AXES = ("vertical", "horizontal")
TINY = 1e-12


def luma(images: Tensor) -> Tensor:
    """The grey of images (N, 3, H, W): (N, H, W)."""
    return (images.float() * torch.tensor(LUMA, device=images.device)[:, None, None]).sum(1)


@dataclass(eq=False)
class Brightness(Reward):
    """The mean luma of an image, 0 (black) to 1 (white); with a target, minus the distance to it.

    Args:
        target: the brightness that is wanted, in [0, 1]; None for as much as there can be.

    Raises:
        DiffsteerError: a target out of its range.
    """

    target: float | None = setting(None, low=0, high=1)

    name: ClassVar[str] = "brightness"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers("brightness: ", real={"target": self.target})
        if self.target is not None:
            if not 0 <= self.target <= 1:
                raise DiffsteerError(f"brightness: target={self.target:g}; it lies in [0, 1]")
            self.__dict__.update(range=(-1.0, 0.0))

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,)."""
        mean = luma(samples).mean((1, 2))
        return mean if self.target is None else -(mean - self.target).abs()


@dataclass(eq=False)
class Sharpness(Reward):
    """How sharp an image is: the standard deviation of the Laplacian of its luma (the focus measure of Pech-Pacheco et al.,
    2000, ICPR, under a root), in grey levels of [0, 1]. Noise counts as sharp, too."""

    name: ClassVar[str] = "sharpness"
    range: ClassVar[tuple[float, float]] = (0.0, 4.0)
    differentiable: ClassVar[bool] = True

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1], of at least 3 x 3 -> (N,).

        Raises:
            DiffsteerError: smaller ones.
        """
        x = luma(samples)
        if min(x.shape[1:]) < 3:
            raise DiffsteerError(
                f"sharpness: an image of {x.shape[1]} x {x.shape[2]} has no Laplacian; at least 3 x 3 is needed"
            )
        inner = x[:, 1:-1, 1:-1]
        laplacian = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:] - 4 * inner
        variance = laplacian.var((1, 2), correction=0)
        deviation: Tensor = (variance + TINY).sqrt() - TINY**0.5  # of a single grey, too, there is a gradient
        return deviation


@dataclass(eq=False)
class Symmetry(Reward):
    """Minus the mean distance of an image to its mirror image, per pixel and channel: 0 for a symmetric one.

    Args:
        axis: vertical, left and right are alike; horizontal, top and bottom.

    Raises:
        DiffsteerError: another axis.
    """

    axis: str = setting("vertical", choices=AXES)

    name: ClassVar[str] = "symmetry"
    range: ClassVar[tuple[float, float]] = (-1.0, 0.0)
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.axis not in AXES:
            raise DiffsteerError(f"symmetry: axis={self.axis!r} is unknown; valid: {', '.join(AXES)}")

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,)."""
        x = samples.float()
        return -(x - x.flip(-1 if self.axis == "vertical" else -2)).abs().mean((1, 2, 3))
