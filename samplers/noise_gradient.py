"""What noise optimisation shares: noise in float32, one optimiser a noise, and what is asked for again and again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.trial import Arena, Asking, Outcome, Search, Trial
from diffsteer.types import setting


@dataclass(frozen=True)
class NoiseGradient(Search):
    """Gradient ascent on the first noise, through the whole chain.

    The best iterate by the reward alone, without the regulariser, is returned. An iteration costs T evaluations, T more where
    steps are checkpoints (`checkpoint`), and T backwards; the last one of a pass needs no gradient.

    Args:
        iterations: at most, a noise. noises: that are optimised side by side.
        clip: of each noise's gradient norm; 0 does not clip.
        regulariser: weight of the noise's minus log-density.
        through: only the last so many steps get a gradient; None is all of them. Before, clean estimates count as constants.
        checkpoint: memory of one step in the place of all, at the price of taking each step twice.
        patience: iterations without a gain of `tolerance` after which a noise has converged; 0 never stops.
    """

    iterations: int = setting(50, low=1)
    noises: int = setting(1, low=1)
    clip: float = setting(0.1, low=0)
    regulariser: float = setting(0.01, low=0)
    through: int | None = None
    checkpoint: bool = True
    patience: int = setting(15, low=0)
    tolerance: float = setting(1e-3, low=0)

    needs_grad: ClassVar[bool] = True
    cuts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            iterations=(1, None), noises=(1, None), clip=(0, None), regulariser=(0, None), through=(1, None), patience=(0, None)
        )
        self.check(tolerance=(0, None))

    @property
    def of_noise(self) -> bool:
        """Without noise on the way."""
        return self.eta == 0

    def search(self, arena: Arena) -> Asking:
        noises = arena.begin(self.noises)
        while True:
            yield from self.ascend(arena, noises)
            if not arena.purse.limited:
                return
            noises = arena.draw(self.noises)

    def ascend(self, arena: Arena, noises: Sequence[Tensor]) -> Asking:
        """One pass of the optimiser from these noises."""
        parameters = [z.float().clone() for z in noises]
        optimisers = [self.optimiser(z) for z in parameters]
        bests, waited = [-math.inf] * len(parameters), [0] * len(parameters)
        alive = list(range(len(parameters)))
        for i in range(self.iterations):
            last = i + 1 == self.iterations
            told = yield [self.trial(parameters[j].clone(), not last) for j in alive]
            for j, outcome in zip(list(alive), told, strict=False):
                gain = outcome.reward > bests[j] + self.tolerance or bests[j] == -math.inf
                waited[j] = 0 if gain else waited[j] + 1
                bests[j] = max(bests[j], outcome.reward)
                if last or (self.patience and waited[j] >= self.patience):
                    alive.remove(j)
                else:
                    self.move(parameters[j], optimisers[j], outcome)
            if not alive:
                return

    def trial(self, z: Tensor, gradient: bool) -> Trial:
        return Trial(z, fresh=True, gradient=gradient, through=self.through, checkpoint=self.checkpoint)

    def optimiser(self, z: Tensor) -> torch.optim.Optimizer:
        raise NotImplementedError

    def move(self, z: Tensor, optimiser: torch.optim.Optimizer, outcome: Outcome) -> None:
        """One step of the optimiser, in place."""
        assert outcome.gradient is not None
        z.grad = clipped(self.descent(z, outcome.gradient), self.clip)
        optimiser.step()

    def descent(self, z: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the loss: minus the reward's, and the regulariser's."""
        return -gradient + self.regulariser * self.pull(z)

    def pull(self, z: Tensor) -> Tensor:
        """The gradient of the regulariser at one noise."""
        raise NotImplementedError

    def evaluations(self, steps: int) -> int:
        """The most: nothing converges before."""
        again = min(self.through or steps, steps) if self.checkpoint else 0
        return self.noises * (self.iterations * steps + (self.iterations - 1) * again)


def clipped(gradient: Tensor, limit: float) -> Tensor:
    """One noise's gradient, no longer than the limit (0: any length); zeros where it is no number."""
    gradient = gradient.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    norm = gradient.norm()
    return gradient * (limit / norm) if limit and norm > limit else gradient
