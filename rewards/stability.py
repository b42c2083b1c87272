"""How stable a picture looks to a network that nobody told what it shows: features of views of it. It needs no prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsteer.reward import Reward
from diffsteer.rewards.clip_score import ClipScore
from diffsteer.rewards.open_clip_model import RESIZE, OpenClip, load
from diffsteer.types import Context, DiffsteerError, check_numbers, setting


@dataclass(eq=False)
class Stability(Reward):
    """The mean cosine similarity of CLIP's features of a picture and of views of it: cut by a tenth at the side, with noise.

    A picture that falls apart under small changes is often one that went wrong. A heuristic of self-supervision, blind to the
    prompt: a clean picture of something else scores well. All samples are shown the same views.

    The CLIP is the one that `ClipScore` would take.

    Cost: ``views + 1`` passes of the image tower a sample.

    Args:
        views: how many. noise: the deviation of the noise in them, of grey levels in [0, 1].
        model_name, pretrained, resize, device: as in `ClipScore`.

    Raises:
        DiffsteerError: a number out of its range, or what `ClipScore` refuses.
    """

    views: int = setting(4, low=1)
    noise: float = setting(0.05, low=0, high=1)
    model_name: str | None = None
    pretrained: str | None = None
    resize: str = setting("squash", choices=RESIZE)
    device: str | None = None

    name: ClassVar[str] = "stability"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    differentiable: ClassVar[bool] = True
    licence: ClassVar[str | None] = ClipScore.licence
    weights: ClassVar[str | None] = ClipScore.weights
    weights_bytes: ClassVar[int] = ClipScore.weights_bytes

    def __post_init__(self) -> None:
        check_numbers("stability: ", whole={"views": self.views}, real={"noise": self.noise})
        if self.views < 1 or not 0 <= self.noise <= 1:
            raise DiffsteerError(f"stability: views={self.views}, noise={self.noise:g}; at least 1 view, noise in [0, 1]")
        self._which = ClipScore(self.model_name, self.pretrained, self.resize, self.device)
        self._loaded: dict[str, OpenClip] = {}

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        """Load the CLIP model."""
        self._clip(ctx)

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,)."""
        clip = self._clip(ctx)
        whole = clip.encode_images(samples, self.resize)
        each = [(whole * clip.encode_images(self._view(samples, n), self.resize)).sum(-1) for n in range(self.views)]
        return torch.stack(each).mean(0).to(samples.device)

    def _view(self, images: Tensor, number: int) -> Tensor:
        """A view of all images, the same for each: a part of nine tenths, back at the old size, and noise on it."""
        draw = torch.Generator().manual_seed(number)
        height, width = images.shape[-2:]
        inner = (max(1, height - height // 10), max(1, width - width // 10))
        top, left = (int(torch.randint(a - b + 1, (), generator=draw)) for a, b in zip((height, width), inner, strict=True))
        noise = self.noise * torch.randn(images.shape[1:], generator=draw).to(images.device)
        part = images.float()[..., top : top + inner[0], left : left + inner[1]]
        return F.interpolate(part, (height, width), mode="bilinear", align_corners=False) + noise

    def _clip(self, ctx: Context) -> OpenClip:
        name, pretrained = self._which.checkpoint(ctx)
        if name not in self._loaded:
            self._loaded[name] = load(name, pretrained, self.device)
        return self._loaded[name]
