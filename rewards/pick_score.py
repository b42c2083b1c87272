"""Which of two pictures people would pick: PickScore (Kirstain et al., 2023, arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from diffsteer.reward import Reward
from diffsteer.rewards.checkpoint import fetched, usual_device
from diffsteer.rewards.open_clip_model import RESIZE, Texts, check_resize, prepared
from diffsteer.types import Context, setting


@dataclass(eq=False)
class PickScore(Reward):
    """``exp(s) cos(image, text)`` of a CLIP ViT-H/14 that was trained on half a million choices of people; near 20, and one
    more means odds of e to 1.

    The authors crop pictures to a square; here that is one of the ways (`resize`).

    Cost: one pass of the ViT-H/14 image tower a sample; the text tower runs once a prompt.

    Args:
        model: a folder as ``save_pretrained`` writes it, or an id of huggingface.co: a CLIP of transformers.
        processor: where its tokenizer and the size, mean and deviation of its pictures are, likewise.
        resize: squash | crop | pad.
        device: where it runs; None for the accelerator if there is one.

    Raises:
        DiffsteerError: an unknown `resize`; later, a model that cannot be loaded.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    resize: str = setting("squash", choices=RESIZE)
    device: str | None = None

    name: ClassVar[str] = "pick_score"
    range: ClassVar[tuple[float, float]] = (-100.0, 100.0)  # CLIP's scale is at most 100
    differentiable: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = True
    licence: ClassVar[str | None] = "MIT"
    weights: ClassVar[str | None] = "yuvalkirstain/PickScore_v1 on huggingface.co"
    weights_bytes: ClassVar[int] = 3_940_000_000

    def __post_init__(self) -> None:
        check_resize(self.name, self.resize)
        self._loaded: tuple[Any, Any, Any] | None = None
        self._texts = Texts(self._encode)

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        """Load the model and encode the prompts."""
        self._texts(prompts)
        self._texts.forget_all_but(prompts)

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,)."""
        model, _, facts = self._load()
        size = facts.crop_size if facts.do_center_crop else facts.size
        x = prepared(samples.to(model.device), (size["height"], size["width"]), self.resize, facts.image_mean, facts.image_std)
        seen = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
        score = model.logit_scale.exp() * (F.normalize(seen, dim=-1) * self._texts(prompts)).sum(-1)
        return score.to(samples.device)  # type: ignore[no-any-return]

    def _encode(self, prompt: str) -> Tensor:
        model, tokenizer, _ = self._load()
        ids = tokenizer([prompt], truncation=True, return_tensors="pt").to(model.device)
        read = model.text_model(input_ids=ids.input_ids, attention_mask=ids.attention_mask).pooler_output
        return F.normalize(model.text_projection(read), dim=-1)[0]

    def _load(self) -> tuple[Any, Any, Any]:
        if self._loaded is None:
            from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

            tokenizer = fetched(self.name, self.processor, lambda: AutoTokenizer.from_pretrained(self.processor))
            facts = fetched(self.name, self.processor, lambda: CLIPImageProcessor.from_pretrained(self.processor))
            model: Any = fetched(self.name, self.model, lambda: CLIPModel.from_pretrained(self.model))
            self._loaded = model.float().to(usual_device(self.device)), tokenizer, facts
        return self._loaded
