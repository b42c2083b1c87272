"""Weighted particles in groups: (P, K) tensors, P prompts with K particles each. Weights are log-weights in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

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


def normalize(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log-weights (P, K) that sum to one in each group, and the log of what they summed to, (P,)."""
    total = log_weights.logsumexp(1)
    return log_weights - total[:, None], total


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """ESS = (sum W)^2 / sum W^2 of each group, (P, K) -> (P,), between 1 and K; log-weights need not be normalised."""
    return (2 * log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)).exp()


def largest_exponent(
    log_weights_at: Callable[[Tensor], Tensor], low: Tensor, high: float | None, target: float, iterations: int = 60
) -> Tensor:
    """For each group the largest lambda in [low, high] at which the ESS is still at least `target`, by bisection.

    Args:
        log_weights_at: from exponents (P,) to log-weights (P, K).
        low: exponents (P,) to stay above; returned where the ESS is too small already.
        high: the cap; None for no cap: then rewards that cannot lower the ESS, all being equal, leave the exponent at `low`.
        target: wanted ESS, in particles.
    """

    def enough(exponent: Tensor) -> Tensor:
        return effective_sample_size(log_weights_at(exponent)) >= target * (1 - 1e-9)

    if high is None:
        step = torch.ones_like(low)
        for _ in range(40):
            step = torch.where(enough(low + step), 2 * step, step)
        upper = torch.where(enough(low + step), low, low + step)
    else:
        upper = torch.full_like(low, high).maximum(low)
    reached = enough(upper)
    inside, outside = low.clone(), upper.clone()
    for _ in range(iterations):
        middle = (inside + outside) / 2
        good = enough(middle)
        inside, outside = torch.where(good, middle, inside), torch.where(good, outside, middle)
    return torch.where(reached, upper, inside)
