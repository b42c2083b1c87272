"""How small an image is as a JPEG file: Black et al. (2023), arXiv 2305.13301. No network is needed."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.media import picture_of
from diffsteer.reward import Reward
from diffsteer.types import Context, DiffsteerError, setting


@dataclass(eq=False)
class Compressibility(Reward):
    """Minus the size of the image as a JPEG file, in kB of 1000 bytes.

    The encoder is Pillow's with its default chroma subsampling, as in the paper's code; sizes may differ by bytes between
    builds of libjpeg.

    Cost: some 30 ms a megapixel, on the CPU.

    Args:
        quality: of the JPEG, 1 to 100.
        incompressible: reward large files instead: the size without the minus.

    Raises:
        DiffsteerError: a quality out of its range.
    """

    quality: int = setting(95, low=1, high=100)
    incompressible: bool = False

    name: ClassVar[str] = "compressibility"
    range: ClassVar[tuple[float, float]] = (-math.inf, 0.0)

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise DiffsteerError(f"compressibility: quality={self.quality} is a JPEG quality, 1 to 100")
        if self.incompressible:
            self.__dict__.update(range=(0.0, math.inf))

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,). NaN for an image with NaN."""
        sizes = torch.tensor([self._kilobytes(image) for image in samples.detach()], dtype=torch.float32)
        return (sizes if self.incompressible else -sizes).to(samples.device)

    def _kilobytes(self, image: Tensor) -> float:
        if bool(image.isnan().any()):
            return math.nan
        file = io.BytesIO()
        picture_of(image).save(file, format="JPEG", quality=self.quality)
        return file.tell() / 1000
