"""How people would rate an image's looks: LAION's aesthetic predictors, small heads on features of OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsteer.reward import Reward
from diffsteer.rewards.checkpoint import read_tensors
from diffsteer.rewards.open_clip_model import OpenClip, check_options, load
from diffsteer.types import Context, DiffsteerError

WHERE = (
    "sac+logos+ava1-l14-linearMSE.pth (v2) of github.com/christophschuhmann/improved-aesthetic-predictor, "
    "or sa_0_4_vit_l_14_linear.pth (v1) of github.com/LAION-AI/aesthetic-predictor"
)
_V2_WIDTHS = {"layers.0": 1024, "layers.2": 128, "layers.4": 64, "layers.6": 16, "layers.7": 1}


class AestheticHead(nn.Module):
    """v1, one linear layer, or v2, five of them without nonlinearities (the dropouts between them act in training only).

    Args:
        version: "v1" or "v2".
        features: D, the length of the feature vectors.
    """

    def __init__(self, version: str, features: int = 768) -> None:
        super().__init__()
        self.version, self.features = version, features
        if version == "v1":
            self.layers = nn.Sequential(nn.Linear(features, 1))
        else:
            widths = [features, *_V2_WIDTHS.values()]
            linear = [nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
            drop = nn.Identity
            self.layers = nn.Sequential(linear[0], drop(), linear[1], drop(), linear[2], drop(), linear[3], linear[4])

    def forward(self, features: Tensor) -> Tensor:
        """CLIP image features (N, D), of whatever length, -> ratings (N,)."""
        rating: Tensor = self.layers(F.normalize(features, dim=-1))[:, 0]
        return rating


def load_head(path: str | Path) -> AestheticHead:
    """Load a head, float32 and frozen, from .safetensors or a pickle of nothing but tensors. Its layout tells v1 from v2.

    Raises:
        DiffsteerError: no file, more than tensors in it, or tensors of another layout.
    """
    path = Path(path)
    state = read_tensors("aesthetic", path, f"a head, {WHERE}")
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    last = shapes.get("weight") or shapes.get("layers.0.weight") or (0, 1)
    version = "v1" if "weight" in shapes else "v2"
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        head = AestheticHead(version, last[-1])
        if version == "v1":
            state = {f"layers.0.{key}": value for key, value in state.items()}
        if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in head.state_dict().items()}:
            found = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items())
            valid = "weight [1, D] and bias [1] (v1), or layers.{0,2,4,6,7} with D-1024-128-64-16-1 (v2)"
            raise DiffsteerError(f"aesthetic: {path.name} has no known layout: it holds {found or 'nothing'}; valid: {valid}")
        head.load_state_dict(state)
    return head.eval().requires_grad_(False)


@dataclass(eq=False)
class Aesthetic(Reward):
    """The rating of an image by a LAION head: v2 (Schuhmann, 2022, improved-aesthetic-predictor) or v1 (aesthetic-predictor).

    Ratings were given from 1 to 10; the heads are linear and not clamped, so an odd image can leave that range. They hold for
    the features of OpenAI's ViT-L/14 only (1.7 GB, fetched once), which were made with resize="crop": the same as "squash" for
    square images. The heads are not shipped.

    Cost: one pass of the ViT-L/14 image tower a sample.

    Args:
        head: file of the head, .pth or .safetensors.
        model_name: as in `ClipScore`. The -quickgelu is OpenAI's activation, also for a checkpoint file.
        pretrained: a tag of the model or a checkpoint file.
        resize: squash | crop | pad.
        device: where CLIP and the head run; None for the accelerator if there is one.

    Raises:
        DiffsteerError: options that contradict each other; later, a head or a checkpoint that cannot be loaded, or that do
            not go together.
    """

    head: str | None = None
    model_name: str = "ViT-L-14-quickgelu"
    pretrained: str | None = "openai"
    resize: str = "squash"
    device: str | None = None

    name: ClassVar[str] = "aesthetic"
    range: ClassVar[tuple[float, float]] = (1.0, 10.0)
    differentiable: ClassVar[bool] = True
    licence: ClassVar[str | None] = "Apache-2.0 (v2 head), MIT (v1 head, ViT-L/14)"
    weights: ClassVar[str | None] = f"{WHERE}; openai/clip-vit-large-patch14"
    weights_bytes: ClassVar[int] = 1_710_000_000

    def __post_init__(self) -> None:
        check_options(self.name, self.model_name, self.pretrained, self.resize)
        self._loaded: tuple[OpenClip, AestheticHead] | None = None

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        """Load the head and the CLIP model."""
        self._load()

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,)."""
        clip, head = self._load()
        rating: Tensor = head(clip.encode_images(samples, self.resize))
        return rating.to(samples.device)

    def _load(self) -> tuple[OpenClip, AestheticHead]:
        if self._loaded is None:
            if self.head is None:
                raise DiffsteerError(f"aesthetic: give the file of a head as head=FILE: {WHERE}")
            head = load_head(self.head)  # first: a wrong path shows before a long download
            clip = load(self.model_name, self.pretrained, self.device)
            features = clip.encode_images(torch.zeros(1, 3, *clip.size), self.resize).shape[1]
            if features != head.features:
                raise DiffsteerError(
                    f"aesthetic: {self.head} takes {head.features} features, {self.model_name} gives {features}"
                )
            with torch.inference_mode(False):
                self._loaded = clip, head.to(clip.device)
        return self._loaded
