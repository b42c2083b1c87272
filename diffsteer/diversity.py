"""How different samples are, and the best k of them that are not all alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Diversity(NamedTuple):
    """Of k samples: the mean distance (1 - cosine) of pairs, and the Vendi score, the effective number of different ones, in
    [1, k] (Friedman & Dieng, 2022, arXiv 2210.02410)."""

    distance: float
    vendi: float


def features_of(samples: Tensor, size: int = 8) -> Tensor:
    """Features for comparing samples (N, ...): of pictures their colours on a grid of size x size, from middle gray, of videos
    those of the mean frame, of anything else the values themselves. (N, D), of length one."""
    x = samples.detach().float().cpu().nan_to_num()
    x = x.mean(1) if x.ndim == 5 else x
    if x.ndim == 4:
        x = F.adaptive_avg_pool2d(x, size) - 0.5
    flat = x.flatten(1)
    return F.normalize(torch.cat([flat, torch.full((len(flat), 1), 1e-3)], 1), dim=1)  # nothing at all is like itself


def diversity(features: Tensor) -> Diversity:
    """Of features (k, D), of length one."""
    k = len(features)
    if k < 2:
        return Diversity(0.0, 1.0)
    f = features.double().nan_to_num()
    similar = (f @ f.T).clamp(-1, 1)
    similar.fill_diagonal_(1.0)
    apart = float((1 - similar).sum() / (k * (k - 1)))
    values = torch.linalg.svdvals(f / k**0.5).square()  # the eigenvalues of the similarities, divided by k
    values = values / values.sum().clamp(min=1e-12)
    entropy = -(values * values.clamp(min=1e-12).log()).sum()
    return Diversity(apart, float(entropy.exp()))


def best_diverse(values: Tensor, features: Tensor, k: int, weight: float) -> list[int]:
    """The best k by maximal marginal relevance (Carbonell & Goldstein, 1998), the best one first.

    Each next one maximises ``(1 - weight) value - weight similarity``, values being scaled to [0, 1] over all that are given
    and similarity being the largest cosine to what is chosen. With weight 0 they are the best k by value.

    Args:
        values: (N,); NaN and -inf come last. features: (N, D), of length one.
    """
    finite = values.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    known = finite[finite.isfinite()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    scaled = torch.where(finite.isfinite(), (finite - low) / (high - low) if high > low else 1.0, finite)
    similar = (features.double() @ features.double().T).nan_to_num()
    chosen: list[int] = []
    left = sorted(range(len(values)), key=lambda i: (-float(finite[i]), i))
    while left and len(chosen) < k:
        if not chosen:
            chosen.append(left.pop(0))
            continue
        near = similar[left][:, chosen].max(1).values
        merit = (1 - weight) * scaled[left] - weight * near
        best = max(range(len(left)), key=lambda i: (float(merit[i]), -i))
        chosen.append(left.pop(best))
    return chosen
