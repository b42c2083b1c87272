"""D-Flow: L-BFGS with a line search on the noise that a flow starts from (Ben-Hamu et al., 2024, arXiv 2402.14017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffsteer.prior import chi
from diffsteer.samplers.noise_gradient import NoiseGradient, pull
from diffsteer.trial import Arena, Asking
from diffsteer.types import setting


@dataclass(frozen=True)
class DFlow(NoiseGradient):
    """Quasi-Newton ascent on the first noise of a deterministic chain of few steps.

    Directions come of the last `history` pairs (L-BFGS); each is shortened by half until the loss falls enough (Armijo's rule),
    every try costing one chain with its gradient, so that it counts as an iteration. The radius is held by the chi log-density
    of `ReNO`. A noise has converged where no step is accepted, or where `history` steps gain less than `tolerance` together.

    A heuristic: a local optimum. With one iteration it is the plain chain.

    Args:
        history: pairs that are remembered.
        length: of the first step, in units of the noise's elements' deviation times the root of their number.
    """

    iterations: int = setting(20, low=1)
    history: int = setting(6, low=1)
    length: float = setting(0.05, low=0)

    name: ClassVar[str] = "d_flow"
    source: ClassVar[str] = "Ben-Hamu et al., 2024, arXiv 2402.14017"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(history=(1, None), length=(1e-9, None))

    def loss(self, z: Tensor, reward: float) -> float:
        return float(-reward + self.regulariser * chi(z.double()[None])[0])

    def ascend(self, arena: Arena, noises: Sequence[Tensor]) -> Asking:
        for z in noises:
            yield from self._one(z.float().clone())

    def _one(self, z: Tensor) -> Asking:
        tried = 0
        outcome = (yield [self.trial(z.clone(), self.iterations > 1)])[0]
        reached, waited = outcome.reward, 0
        pairs: list[tuple[Tensor, Tensor]] = []
        while tried + 1 < self.iterations:
            assert outcome.gradient is not None
            here, g = self.loss(z, outcome.reward), -outcome.gradient + self.regulariser * pull(z)
            direction = -two_loop(g, pairs)
            slope = float((direction * g).sum())
            if not slope < 0:
                pairs, direction = [], -g
                slope = -float(g.square().sum())
            size = 1.0 if pairs else self.length * z.numel() ** 0.5 / max(float(direction.norm()), 1e-12)
            moved = None
            for _ in range(6):
                if tried + 1 >= self.iterations:
                    return
                tried += 1
                there = z + size * direction
                following = (yield [self.trial(there.clone(), True)])[0]
                if self.loss(there, following.reward) <= here + 1e-4 * size * slope:
                    moved = there
                    break
                size /= 2
            if moved is None:
                return
            assert following.gradient is not None
            change, turned = moved - z, -following.gradient + self.regulariser * pull(moved) - g
            if float((change * turned).sum()) > 1e-10:
                pairs = [*pairs, (change, turned)][-self.history :]
            if following.reward > reached + self.tolerance:
                reached, waited = following.reward, 0
            elif (waited := waited + 1) >= self.history:
                return
            z, outcome = moved, following

    def evaluations(self, steps: int) -> int:
        """The most; every iteration has a gradient."""
        again = min(self.through or steps, steps) if self.checkpoint else 0
        return self.noises * self.iterations * (steps + (again if self.iterations > 1 else 0))


def two_loop(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The inverse Hessian of L-BFGS times a gradient (Nocedal, 1980), from pairs (change of point, change of gradient)."""
    q, kept = gradient.double().flatten(), []
    for s, y in reversed(pairs):
        s, y = s.double().flatten(), y.double().flatten()
        a = (s @ q) / (s @ y)
        q = q - a * y
        kept.append((a, s, y))
    if pairs:
        s, y = (v.double().flatten() for v in pairs[-1])
        q = q * (s @ y) / (y @ y)
    for a, s, y in reversed(kept):
        q = q + s * (a - (y @ q) / (s @ y))
    found: Tensor = q.view_as(gradient).to(gradient.dtype)
    return found
