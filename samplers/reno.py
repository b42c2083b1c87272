"""ReNO: reward-based noise optimisation of one- and few-step models (Eyring et al., 2024, arXiv 2406.04312)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.samplers.noise_gradient import NoiseGradient, clipped, pull
from diffsteer.trial import Arena, Asking, Outcome
from diffsteer.types import setting


@dataclass(frozen=True)
class ReNO(NoiseGradient):
    """SGD with Nesterov's momentum on the first noise, its radius held by a chi log-density.

    The norm, the clipping and the regulariser are a noise's own and in float32 (the authors' code takes them over the batch, in
    half precision). It is meant for models of one to four steps: optimise there and render on the full model by
    ``draft=Draft(model=...)``, as DITTO-2 does (Novack et al., 2024, arXiv 2405.20289).

    A heuristic: a local optimum of reward and prior. With one iteration it is the plain chain.

    Args:
        clip: of each noise's gradient norm; 0 does not clip.
        rate: of SGD, 5 for most models of the paper. momentum: in [0, 1).
        patience: iterations that gain less than `tolerance` together, after which a noise has converged; 0 never stops.
    """

    clip: float = setting(0.1, low=0)
    rate: float = setting(5.0, low=0)
    momentum: float = setting(0.9, low=0, high=1)
    patience: int = setting(15, low=0)

    name: ClassVar[str] = "reno"
    source: ClassVar[str] = "Eyring et al., 2024, arXiv 2406.04312"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(clip=(0, None), rate=(0, None), momentum=(0, 0.9999), patience=(0, None))

    def ascend(self, arena: Arena, noises: Sequence[Tensor]) -> Asking:
        """SGD on noises side by side, each with an optimiser of its own."""
        parameters = [z.float().clone() for z in noises]
        optimisers = [self.optimiser(z) for z in parameters]
        reached, waited = [-math.inf] * len(parameters), [0] * len(parameters)
        alive = list(range(len(parameters)))
        for i in range(self.iterations):
            last = i + 1 == self.iterations
            told = yield [self.trial(parameters[j].clone(), not last) for j in alive]
            for j, outcome in zip(list(alive), told, strict=False):
                if outcome.reward > reached[j] + self.tolerance:
                    reached[j], waited[j] = outcome.reward, 0
                else:
                    waited[j] += 1
                if last or (self.patience and waited[j] >= self.patience):
                    alive.remove(j)
                else:
                    self.move(parameters[j], optimisers[j], outcome)
            if not alive:
                return

    def optimiser(self, z: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD([z], lr=self.rate, momentum=self.momentum, nesterov=self.momentum > 0)

    def move(self, z: Tensor, optimiser: torch.optim.Optimizer, outcome: Outcome) -> None:
        """One step of the optimiser, in place."""
        assert outcome.gradient is not None
        z.grad = clipped(-outcome.gradient + self.regulariser * pull(z), self.clip)
        optimiser.step()
