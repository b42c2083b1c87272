"""What people prefer: Human Preference Score v2.1 (Wu et al., 2023, arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffsteer.reward import Reward
from diffsteer.rewards.checkpoint import fill, located, read_tensors
from diffsteer.rewards.open_clip_model import RESIZE, OpenClip, check_resize, untrained
from diffsteer.types import Context, setting

WHERE = "HPS_v2.1_compressed.pt (or HPS_v2_compressed.pt) of huggingface.co/xswu/HPSv2"


@dataclass(eq=False)
class HumanPreference(Reward):
    """The cosine of image and text of a CLIP ViT-H/14 that was trained on 800,000 choices of people; 0.2 to 0.35 as a rule.

    The authors show it pictures whole, with a border (`resize="pad"`).

    Cost: one pass of the ViT-H/14 image tower a sample; the text tower runs once a prompt.

    Args:
        checkpoint: a file, or OWNER/REPOSITORY/FILE of huggingface.co.
        model_name: the architecture, a name of open_clip or ``local-dir:FOLDER``, whose own weights are not read.
        resize: pad | squash | crop.
        device: where it runs; None for the accelerator if there is one.

    Raises:
        DiffsteerError: an unknown `resize`; later, a checkpoint that cannot be opened or is of another architecture.
    """

    checkpoint: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    model_name: str = "ViT-H-14"
    resize: str = setting("pad", choices=RESIZE)
    device: str | None = None

    name: ClassVar[str] = "hps"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    differentiable: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = True
    licence: ClassVar[str | None] = "Apache-2.0"
    weights: ClassVar[str | None] = WHERE
    weights_bytes: ClassVar[int] = 1_970_000_000

    def __post_init__(self) -> None:
        check_resize(self.name, self.resize)
        self._loaded: OpenClip | None = None

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        """Load the checkpoint and encode the prompts."""
        texts = self._clip().encode_texts
        texts(prompts)
        texts.forget_all_but(prompts)

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,)."""
        clip = self._clip()
        return (clip.encode_images(samples, self.resize) * clip.encode_texts(prompts)).sum(-1).to(samples.device)

    def _clip(self) -> OpenClip:
        if self._loaded is None:
            path = located(self.name, self.checkpoint)
            state = read_tensors(self.name, path, WHERE)  # first: a wrong path shows before a large model is made
            clip = untrained(self.model_name, self.device)
            fill(self.name, path.name, clip.model, {k.removeprefix("module."): v.float() for k, v in state.items()})
            self._loaded = clip
        return self._loaded
