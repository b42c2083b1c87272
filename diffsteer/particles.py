"""Weighted particles in groups: (P, K) tensors, P prompts with K particles each. Weights are log-weights in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffsteer.types import Problem
from diffsteer.warn import warn

T = TypeVar("T")


# Declares a dataclass field as one value a particle, (P, K, ...): `reindex` permutes these fields and no others.
PER_ROW: dict[str, Any] = {"per_row": True}


def reindex(tree: T, ancestors: Tensor) -> T:
    """The one function that follows ancestors.

    Args:
        tree: a tensor (P, K, ...), a dataclass (its `PER_ROW` fields are followed, the others kept), or a list, tuple or dict.
        ancestors: (P, K) long; particle k of group p becomes a copy of particle ``ancestors[p, k]`` of the same group.

    Raises:
        ValueError: a tensor does not start with (P, K).
        TypeError: a tree of something else.
    """
    if isinstance(tree, Tensor):
        if tree.shape[:2] != ancestors.shape:
            raise ValueError(f"cannot follow ancestors {tuple(ancestors.shape)} in a tensor of shape {tuple(tree.shape)}")
        groups = torch.arange(len(ancestors), device=tree.device)[:, None]
        return tree[groups, ancestors.to(tree.device)]  # type: ignore[return-value]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        moved = {
            f.name: reindex(getattr(tree, f.name), ancestors) for f in dataclasses.fields(tree) if f.metadata.get("per_row")
        }
        return dataclasses.replace(tree, **moved)
    if isinstance(tree, dict):
        return type(tree)((k, reindex(v, ancestors)) for k, v in tree.items())
    if isinstance(tree, (list, tuple)):
        return type(tree)(reindex(v, ancestors) for v in tree)
    raise TypeError(f"cannot follow ancestors in a {type(tree).__name__}")


def warn_blind(who: str, problem: Problem, done: int, blind: Tensor, then: str) -> None:
    """Say that nothing tells the particles of some groups apart: (P,) bool, by their ids, and what becomes of them."""
    names = ", ".join(str(problem.ids[i]) for i in blind.nonzero()[:, 0].tolist())
    warn(f"{who}: no finite reward in group {names} after step {done}: {then}")


def normalize(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log-weights (P, K) that sum to one in each group, and the log of what they summed to, (P,)."""
    total = log_weights.logsumexp(1)
    return log_weights - total[:, None], total


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """ESS = (sum W)^2 / sum W^2 of each group, (P, K) -> (P,), between 1 and K; log-weights need not be normalised."""
    return (2 * log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)).exp()


def largest_exponent(
    log_weights_at: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, target: float, iterations: int = 40
) -> Tensor:
    """For each group the largest lambda in [low, high] at which the ESS is still at least `target`.

    With weights carried from before, the ESS may fall and rise again as lambda grows: a grid of some 550 values, even ones and
    geometric ones, brackets the last crossing, which is then bisected. A rise between two neighbours of the grid is missed.

    Args:
        log_weights_at: from exponents (P,) to log-weights (P, K).
        low: exponents (P,) to stay above; returned where the ESS is too small already.
        high: exponents (P,) not to exceed; returned where the ESS is large enough even there.
        target: wanted ESS, in particles.
    """

    def enough(exponent: Tensor) -> Tensor:
        return effective_sample_size(log_weights_at(exponent)) >= target * (1 - 1e-9)

    upper = high.maximum(low)
    reached = enough(upper)
    if bool(reached.all()):
        return upper
    shares = torch.cat([torch.linspace(0, 1, 513), torch.logspace(-8, 0, 33)]).double().sort().values
    grid = low + (upper - low) * shares[:, None]
    good = torch.vmap(enough)(grid)
    last = (good * torch.arange(len(grid))[:, None]).max(0).values  # 0 where none is good: there lambda stays at `low`
    inside, outside = grid.gather(0, last[None])[0], grid.gather(0, (last + 1).clamp(max=len(grid) - 1)[None])[0]
    for _ in range(iterations):
        middle = (inside + outside) / 2
        good = enough(middle)
        inside, outside = torch.where(good, middle, inside), torch.where(good, outside, middle)
    return torch.where(reached, upper, inside)


def decisive_exponent(rewards: Tensor, alive: Tensor, ratio: float = 1e3) -> Tensor:
    """How much a further exponent makes the best particles of each group outweigh the next best `ratio` K times, (P,).

    More than that tells nobody anything and only amplifies rounding, so it bounds a tempering without a cap of its own: with
    ties the ESS cannot fall below their number. 0 where all rewards (P, K) of the living are equal to rounding.
    """
    r = rewards.masked_fill(~alive, -torch.inf)
    best = r.max(1, keepdim=True).values
    rounding = 1e-6 * rewards.masked_fill(~alive, 0.0).abs().max(1, keepdim=True).values
    below = r.masked_fill(r >= best - rounding, -torch.inf).max(1).values
    gap = best[:, 0] - below
    further = math.log(ratio * rewards.shape[1]) / gap
    return torch.where(torch.isfinite(gap) & (gap > 0), further, torch.zeros_like(gap))
