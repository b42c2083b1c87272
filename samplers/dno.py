"""Direct Noise Optimization: all the noise of a stochastic chain (Tang et al., 2024, arXiv 2405.18881)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.prior import whiteness
from diffsteer.samplers.noise_gradient import NoiseGradient, clipped
from diffsteer.trial import Arena, Asking, Outcome, Trial
from diffsteer.types import setting


@dataclass(frozen=True)
class DNO(NoiseGradient):
    """AdamW on the first noise and on that of every transition, held to look like white noise.

    After a stage of particles it begins with the very noise of the best particle's chain (after a stage without noise on the
    way only with its first noise: the first iterate is another sample then). Rewards without a gradient go by the
    hybrid gradient (`black_box`): differences of rewards of perturbed samples tell a direction in sample space, which goes back
    through the chain exactly.

    A heuristic. With one iteration it is the plain stochastic chain. An iteration costs what `NoiseGradient` says, the hybrid
    gradient ``1 + perturbations`` chains more.

    Args:
        clip: of the gradient's norm, over all noise together; 0 does not clip.
        patience: iterations that gain less than `tolerance` together, after which it has converged; 0 never stops.
        rate: of AdamW. eta: amount of noise in the transition; 0 leaves the first noise alone.
        regulariser: gamma, the weight of the whiteness bound.
        orders: random orders of the coordinates that the bound is averaged over, an iteration.
        black_box: the hybrid gradient. perturbations: q. spread: mu, their size.
    """

    iterations: int = setting(100, low=1)
    clip: float = setting(1.0, low=0)
    regulariser: float = setting(1.0, low=0)
    patience: int = setting(15, low=0)
    rate: float = setting(0.01, low=0)
    eta: float = setting(1.0, low=0, high=1)
    orders: int = setting(16, low=0)
    black_box: bool = False
    perturbations: int = setting(4, low=1)
    spread: float = setting(0.01, low=0)

    name: ClassVar[str] = "dno"
    source: ClassVar[str] = "Tang et al., 2024, arXiv 2405.18881"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            clip=(0, None),
            patience=(0, None),
            rate=(0, None),
            eta=(0, 1),
            orders=(0, None),
            perturbations=(1, None),
            spread=(1e-9, None),
        )

    @property
    def needs_grad(self) -> bool:  # type: ignore[override]
        """Of black boxes it asks for none."""
        return not self.black_box

    @property
    def numbers(self) -> bool:  # type: ignore[override]
        return True

    def search(self, arena: Arena) -> Asking:
        starts = [(s.root, arena.injected(s)) for s in arena.starts[: self.noises] if s.root is not None]
        starts += [(z, self._injected(arena)) for z in arena.draw(self.noises - len(starts))]
        while True:
            for z, injected in starts:
                yield from self._ascend(arena, z, injected)
            if not arena.purse.limited:
                return
            starts = [(z, self._injected(arena)) for z in arena.draw(self.noises)]

    def _injected(self, arena: Arena) -> Tensor:
        return torch.stack(arena.draw(arena.steps))

    def _ascend(self, arena: Arena, z: Tensor, injected: Tensor) -> Asking:
        both = [z.float().clone(), injected.float().clone()] if self.eta else [z.float().clone()]
        optimiser = torch.optim.AdamW(both, lr=self.rate, weight_decay=0.0)  # whose decay would shrink the noise
        reached, waited = float("-inf"), 0
        for i in range(self.iterations):
            last = i + 1 == self.iterations
            outcome, gradients = yield from self._look(arena, both, last)
            gain = outcome.reward > reached + self.tolerance
            reached, waited = (outcome.reward, 0) if gain else (reached, waited + 1)
            if last or (self.patience and waited >= self.patience):
                return
            pulls = self._pulls(arena, both)
            for parameter, gradient, pull in zip(both, gradients, pulls, strict=True):
                parameter.grad = -gradient.nan_to_num(nan=0.0) + self.regulariser * pull
            whole = clipped(torch.cat([p.grad.flatten() for p in both if p.grad is not None]), self.clip)
            at = 0
            for parameter in both:
                parameter.grad = whole[at : at + parameter.numel()].view_as(parameter)
                at += parameter.numel()
            optimiser.step()

    def _look(self, arena: Arena, both: list[Tensor], last: bool):  # type: ignore[no-untyped-def]
        """The reward of the noise at hand, and its gradients."""
        if not self.black_box or last:
            outcome = (yield [self._trial(both, not last)])[0]
            return outcome, self._gradients(outcome, both)
        near = [[p + self.spread * self._like(arena, p) for p in both] for _ in range(self.perturbations)]
        told = yield [self._trial(noise, False) for noise in [both, *near]]
        here = told[0]
        differences = [(o.reward - here.reward) * (o.sample - here.sample) for o in told[1:]]
        if not differences:
            return here, [torch.zeros_like(p) for p in both]
        direction = torch.stack(differences).mean(0)
        direction = direction / direction.norm().clamp(min=1e-12)
        back = yield [self._trial(both, direction, scored=False)]
        return here, self._gradients(back[0], both)

    def _like(self, arena: Arena, p: Tensor) -> Tensor:
        return self._injected(arena) if p.ndim > len(arena.shape) else arena.draw(1)[0]

    def _trial(self, both: list[Tensor], gradient: bool | Tensor, scored: bool = True) -> Trial:
        injected = both[1].clone() if self.eta else None
        z = both[0].clone()
        return Trial(
            z.view(z.shape),
            fresh=True,
            eta=self.eta,
            gradient=gradient,
            scored=scored,
            through=self.through,
            checkpoint=self.checkpoint,
            injected=injected,
        )

    def _gradients(self, outcome: Outcome, both: list[Tensor]) -> list[Tensor]:
        found = [outcome.gradient, outcome.injected_gradient]
        return [torch.zeros_like(p) if g is None else g for p, g in zip(both, found, strict=False)]

    def _pulls(self, arena: Arena, both: list[Tensor]) -> list[Tensor]:
        """Of the whiteness bound, over all noise together."""
        if not self.regulariser:
            return [torch.zeros_like(p) for p in both]
        with torch.enable_grad():
            leaves = [p.detach().clone().requires_grad_(True) for p in both]
            flat = torch.cat([leaf.flatten() for leaf in leaves])[None]
            return list(torch.autograd.grad(whiteness(flat, arena.chance, self.orders).sum(), leaves))

    def evaluations(self, steps: int) -> int:
        again = min(self.through or steps, steps) if self.checkpoint else 0
        between = (1 + self.perturbations) * steps + steps + again if self.black_box else steps + again
        return self.noises * ((self.iterations - 1) * between + steps)
