"""What noise optimisation shares: noise in float32, one optimiser a noise, and what is asked for again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffsteer.trial import Arena, Asking, Outcome, Search, Trial, along_ways
from diffsteer.types import setting


@dataclass(frozen=True)
class NoiseGradient(Search):
    """Gradient ascent on the first noise, through the whole chain.

    The best iterate by the reward alone, without the regulariser, is returned. An iteration costs T evaluations, T more where
    steps are checkpoints (`checkpoint`), and T backwards; the last one of a pass needs no gradient.

    Args:
        iterations: at most, a noise. noises: that are optimised, one after another or, by `ReNO`, side by side.
        regulariser: weight of the noise's minus log-density.
        through: only the last so many steps get a gradient; None is all of them. Before, clean estimates count as constants.
        checkpoint: memory of one step in the place of all, at the price of taking each step twice.
        tolerance: a gain in the reward that is none; where iterations gain no more, a noise has converged.
    """

    iterations: int = setting(50, low=1)
    noises: int = setting(1, low=1)
    regulariser: float = setting(0.01, low=0)
    through: int | None = None
    checkpoint: bool = True
    tolerance: float = setting(1e-3, low=0)

    needs_grad: ClassVar[bool] = True
    cuts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(iterations=(1, None), noises=(1, None), regulariser=(0, None), through=(1, None), tolerance=(0, None))

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
        raise NotImplementedError

    def finalists(self, drafts: Sequence[Outcome], number: int) -> list[Outcome]:
        """The best one, the best of other noises, and others on the first one's way back to its start."""
        return along_ways(drafts, number)

    def trial(self, z: Tensor, gradient: bool) -> Trial:
        return Trial(z, fresh=True, gradient=gradient, through=self.through, checkpoint=self.checkpoint)

    def evaluations(self, steps: int) -> int:
        """The most: nothing converges before."""
        again = min(self.through or steps, steps) if self.checkpoint else 0
        return self.noises * (self.iterations * steps + (self.iterations - 1) * again)


def clipped(gradient: Tensor, limit: float) -> Tensor:
    """One noise's gradient, no longer than the limit (0: any length); zeros where it is no number."""
    gradient = gradient.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    norm = gradient.norm()
    return gradient * (limit / norm) if limit and norm > limit else gradient


def pull(z: Tensor) -> Tensor:
    """The gradient of `diffsteer.prior.chi` at one noise: ``z (1 - (d - 1) / r^2)``."""
    return z * (1 - (z.numel() - 1) / z.square().sum().clamp(min=1e-12))
