"""How warm the colours of a picture are: a whole reward, as another distribution brings it to diffsteer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffsteer import DiffsteerError, Reward
from diffsteer.types import Context, setting


@dataclass(eq=False)
class Warmth(Reward):
    """The mean of red less blue, -1 (blue) to 1 (red).

    Args:
        middle: the share of the picture, around its centre, that counts.

    Raises:
        DiffsteerError: a share out of its range.
    """

    middle: float = setting(1.0, low=0.1, high=1.0)

    name: ClassVar[str] = "warmth"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.1 <= self.middle <= 1:
            raise DiffsteerError(f"warmth: middle={self.middle:g}; it lies in [0.1, 1]")

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,)."""
        height, width = samples.shape[-2:]
        top, left = int(height * (1 - self.middle) / 2), int(width * (1 - self.middle) / 2)
        inner = samples.float()[:, :, top : height - top, left : width - left]
        return (inner[:, 0] - inner[:, 2]).mean((1, 2))
