"""Resampling schemes: from the weights of one group to the ancestors of its next generation.

Every scheme is a decorated function ``(weights (K,), generator) -> offspring counts (K,)``, unbiased: particle i has K W_i
children on average. The decorator turns counts into ancestors in which every survivor stays in its own slot and copies fill the
slots of the dead, gives the identity for uniform weights, and registers the function under its name.

    systematic   one uniform, particles shuffled first; floor or ceil of K W_i children. The default.
    ssp          floor or ceil, negatively associated, consistent in any order (Gerber et al., 2019, arXiv 1708.04221).
    stratified   one uniform a stratum.
    residual     floor(K W_i) children each, the rest multinomial.
    killing      each survives in place with probability W_i / max W, the dead are replaced by multinomial draws: fewest copies.
    multinomial  K independent draws. The most variance; for comparison.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Scheme = Callable[[Tensor, torch.Generator], Tensor]
SCHEMES: dict[str, Scheme] = {}


def scheme(counts_of: Scheme) -> Scheme:
    """Register a function from weights to offspring counts as a scheme from log-weights to ancestors."""

    def resample(log_weights: Tensor, generator: torch.Generator) -> Tensor:
        log_weights = log_weights.double()
        if float(log_weights.max() - log_weights.min()) < 1e-12:
            return torch.arange(len(log_weights))
        return in_place(counts_of(log_weights.softmax(0), generator))

    resample.__name__, resample.__doc__ = counts_of.__name__, counts_of.__doc__
    SCHEMES[counts_of.__name__] = resample
    return resample


def in_place(counts: Tensor) -> Tensor:
    """Ancestors (K,) for offspring counts (K,) that sum to K: survivors keep their slots, copies fill the others in order."""
    ancestors = torch.arange(len(counts))
    copies = torch.repeat_interleave(ancestors, (counts - 1).clamp(min=0))
    ancestors[counts == 0] = copies
    return ancestors


def _count(weights: Tensor, points: Tensor) -> Tensor:
    """How many of the points in [0, 1) fall on each particle's share of the unit interval."""
    cdf = weights.cumsum(0)
    owner = torch.searchsorted(cdf / cdf[-1], points, right=True).clamp(max=int(weights.nonzero().max()))
    return torch.bincount(owner, minlength=len(weights))


@scheme
def multinomial(weights: Tensor, generator: torch.Generator) -> Tensor:
    """K independent draws."""
    return _count(weights, torch.rand(len(weights), generator=generator, dtype=torch.float64))


@scheme
def residual(weights: Tensor, generator: torch.Generator) -> Tensor:
    """floor(K W_i) children for sure, the rest drawn from the remainders."""
    expected = len(weights) * weights
    counts = _floor(expected)
    rest = len(weights) - int(counts.sum())
    if rest == 0:
        return counts
    return counts + _count((expected - counts).clamp(min=0), torch.rand(rest, generator=generator, dtype=torch.float64))


@scheme
def stratified(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One uniform in each of K equal strata."""
    k = len(weights)
    return _count(weights, (torch.arange(k) + torch.rand(k, generator=generator, dtype=torch.float64)) / k)


@scheme
def systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One uniform for all strata; the particles are shuffled first, since the plain scheme depends on their order."""
    k = len(weights)
    order = torch.randperm(k, generator=generator)
    shuffled = _count(weights[order], (torch.arange(k) + torch.rand(1, generator=generator, dtype=torch.float64)) / k)
    return torch.empty_like(shuffled).index_copy_(0, order, shuffled)


@scheme
def ssp(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Srinivasan's sampling process: two fractional parts at a time trade mass, fairly, until one of them is whole."""
    expected = (len(weights) * weights).tolist()
    counts = _floor(len(weights) * weights).tolist()
    held, part = -1, 0.0  # the particle whose fractional part is still open
    coins = torch.rand(len(weights), generator=generator, dtype=torch.float64).tolist()
    for i, coin in enumerate(coins):
        fraction = max(expected[i] - counts[i], 0.0)
        if fraction < 1e-12:
            continue
        if held < 0:
            held, part = i, fraction
            continue
        up, down = min(1 - part, fraction), min(part, 1 - fraction)
        gain = up if coin * (up + down) < down else -down  # a martingale: up with probability down / (up + down)
        part, fraction = part + gain, fraction - gain
        for j, value in ((held, part), (i, fraction)):
            counts[j] += value > 1 - 1e-12
        open_parts = [(j, v) for j, v in ((held, part), (i, fraction)) if 1e-12 <= v <= 1 - 1e-12]
        held, part = open_parts[0] if open_parts else (-1, 0.0)
    if held >= 0:
        counts[held] += part > 0.5  # only rounding is left: the parts sum to a whole number
    return torch.tensor(counts)


@scheme
def killing(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Each particle survives with probability W_i / max W; every dead one is replaced by a multinomial draw."""
    k = len(weights)
    alive = torch.rand(k, generator=generator, dtype=torch.float64) * weights.max() < weights
    return alive.long() + _count(weights, torch.rand(k - int(alive.sum()), generator=generator, dtype=torch.float64))


def _floor(expected: Tensor) -> Tensor:
    """floor, forgiving a rounding error below a whole number."""
    return (expected + 1e-9).floor().long()
