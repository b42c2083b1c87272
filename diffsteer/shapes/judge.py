"""The checker of the shapes world as a reward that looks on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.reward import Reward
from diffsteer.types import Context, PromptError


class Checker(Reward):
    """1 for a picture that shows exactly what its caption says, 0 for any other (`diffsteer.shapes.check`). It is no option of
    ``reward=``: what judges here is never steered on."""

    name: ClassVar[str] = "checker"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    needs_prompt: ClassVar[bool] = True

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        """Refuse prompts that are no captions of the shapes world."""
        from diffsteer.shapes.grammar import parse

        for prompt in prompts:
            try:
                parse(prompt)
            except ValueError as error:
                raise PromptError(f"checker: it cannot read the prompt {prompt!r}: {error}") from error

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,); NaN for an image with NaN."""
        from diffsteer.shapes.check import check

        found = [
            float("nan") if bool(x.isnan().any()) else float(check(x, p).correct) for x, p in zip(samples, prompts, strict=True)
        ]
        return torch.tensor(found, device=samples.device)
