"""Does a model that answers questions say yes? VQAScore (Lin et al., 2024, arXiv 2404.01291) with models of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffsteer.media import picture_of
from diffsteer.reward import Reward
from diffsteer.rewards.checkpoint import fetched, usual_device
from diffsteer.types import Context, DiffsteerError

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
ANSWERS = ("Yes", "yes", " Yes", " yes")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(eq=False)
class VqaScore(Reward):
    """The probability that the answer to "Does this figure show ...?" begins with yes.

    The authors' model, CLIP-FlanT5 with 11 billion parameters, is one that transformers cannot load; here it is any model of
    pictures and text that goes on with text. It reads its prompt by its own chat template if it has one. Each sample is asked
    about alone, so that no score depends on another's padding.

    Cost: one pass of that model a sample. No gradient: its processor works on whole grey levels.

    Args:
        model: a folder as ``save_pretrained`` writes it, with its processor, or an id of huggingface.co.
        question: with ``{prompt}`` in it.
        dtype: float32 | float16 | bfloat16, of the weights.
        device: where it runs; None for the accelerator if there is one.

    Raises:
        DiffsteerError: a question without ``{prompt}``; later, a model that cannot be loaded.
    """

    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    question: str = QUESTION
    dtype: str = "float32"
    device: str | None = None

    name: ClassVar[str] = "vqa_score"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    needs_prompt: ClassVar[bool] = True
    licence: ClassVar[str | None] = "that of the model"
    weights: ClassVar[str | None] = "Qwen/Qwen2.5-VL-3B-Instruct on huggingface.co, or the model that is named"
    weights_bytes: ClassVar[int] = 7_500_000_000

    def __post_init__(self) -> None:
        if "{prompt}" not in self.question:
            raise DiffsteerError(f"vqa_score: question={self.question!r} has no {{prompt}} in it")
        if self.dtype not in DTYPES:
            raise DiffsteerError(f"vqa_score: dtype={self.dtype!r} is unknown; valid: {', '.join(DTYPES)}")
        self._loaded: tuple[Any, Any, list[int]] | None = None

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        """Load the model."""
        self._load()

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,). NaN for an image with NaN."""
        found = [self._ask(image, prompt) for image, prompt in zip(samples.detach(), prompts, strict=True)]
        return torch.tensor(found, dtype=torch.float32, device=samples.device)

    @torch.no_grad()
    def _ask(self, image: Tensor, prompt: str) -> float:
        if bool(image.isnan().any()):
            return float("nan")
        model, processor, answers = self._load()
        question = self.question.replace("{prompt}", prompt)
        if getattr(processor, "chat_template", None):
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            question = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        told = processor(images=picture_of(image), text=question, return_tensors="pt").to(model.device)
        pixels = {k: v.to(model.dtype) for k, v in told.items() if v.is_floating_point()}
        last = model(**{**told, **pixels}).logits[0, -1].float()
        return float(last.softmax(0)[answers].sum())

    def _load(self) -> tuple[Any, Any, list[int]]:
        if self._loaded is None:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            processor: Any = fetched(self.name, self.model, lambda: AutoProcessor.from_pretrained(self.model))
            model: Any = fetched(self.name, self.model, lambda: AutoModelForImageTextToText.from_pretrained(self.model))
            model = model.to(usual_device(self.device), getattr(torch, self.dtype))
            first = [processor.tokenizer(answer, add_special_tokens=False).input_ids[:1] for answer in ANSWERS]
            unknown = processor.tokenizer.unk_token_id
            firsts = {ids[0] for ids in first if ids and ids[0] != unknown}
            answers = sorted(i for i in firsts if processor.tokenizer.decode([i]).strip().lower() == "yes")  # whole words
            if not answers:
                raise DiffsteerError(f"vqa_score: the tokenizer of {self.model} has no word for yes")
            self._loaded = model, processor, answers
        return self._loaded
