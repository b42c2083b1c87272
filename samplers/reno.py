"""ReNO: reward-based noise optimisation of one- and few-step models (Eyring et al., 2024, arXiv 2406.04312)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.samplers.noise_gradient import NoiseGradient
from diffsteer.types import setting


@dataclass(frozen=True)
class ReNO(NoiseGradient):
    """SGD with Nesterov's momentum on the first noise, its radius held by a chi log-density.

    The norm, the clipping and the regulariser are a noise's own and in float32 (the authors' code takes them over the batch, in
    half precision). It is meant for models of one to four steps: optimise there and render on the full model by
    ``draft=Draft(model=...)``, as DITTO-2 does (Novack et al., 2024, arXiv 2405.20289).

    A heuristic: a local optimum of reward and prior. With one iteration it is the plain chain.

    Args:
        rate: of SGD, 5 for most models of the paper. momentum: in [0, 1).
    """

    rate: float = setting(5.0, low=0)
    momentum: float = setting(0.9, low=0, high=1)

    name: ClassVar[str] = "reno"
    source: ClassVar[str] = "Eyring et al., 2024, arXiv 2406.04312"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(rate=(0, None), momentum=(0, 0.9999))

    def optimiser(self, z: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD([z], lr=self.rate, momentum=self.momentum, nesterov=self.momentum > 0)

    def pull(self, z: Tensor) -> Tensor:
        """Of chi: ``z (1 - (d - 1) / r^2)``."""
        return z * (1 - (z.numel() - 1) / z.square().sum().clamp(min=1e-12))
