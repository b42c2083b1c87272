"""How evenly a clip moves, after FlowMo: Shaulov et al. (2025), arXiv 2506.01144."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from diffsteer.reward import Reward
from diffsteer.types import Context, DiffsteerError, setting


@dataclass(eq=False)
class MotionCoherence(Reward):
    """Minus the variance, over time, of the change from frame to frame, where that is greatest: 0 is an even motion, or none.

    Of a clip z: d_k = |z_{k+1} - z_k|, its variance over k, the mean over channels, the maximum over places. The paper takes
    it of the network's predicted velocity; here it is taken of finished clips and of clean estimates, decoded. A clip in
    which nothing moves scores best: take it beside a reward that wants something.

    Args:
        side: pictures are averaged to at most side x side places first.

    Raises:
        DiffsteerError: pictures, or clips of fewer than three frames.
    """

    side: int = setting(16, low=1)

    name: ClassVar[str] = "motion_coherence"
    modality: ClassVar[str] = "video"
    range: ClassVar[tuple[float, float]] = (-math.inf, 0.0)
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.side < 1:
            raise DiffsteerError(f"motion_coherence: side={self.side}; at least 1 is needed")

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Clips (N, F, 3, H, W) in [0, 1] -> (N,)."""
        if samples.ndim != 5 or samples.shape[1] < 3:
            raise DiffsteerError(
                f"motion_coherence scores clips (N, F, 3, H, W) of 3 frames or more, not {tuple(samples.shape)}"
            )
        n, frames = samples.shape[:2]
        small = adaptive_avg_pool2d(samples.flatten(0, 1).float(), min(self.side, *samples.shape[-2:]))
        small = small.view(n, frames, *small.shape[1:])
        changes = (small[:, 1:] - small[:, :-1]).abs()
        return -changes.var(1).mean(1).flatten(1).amax(1)
