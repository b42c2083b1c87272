"""Is a noise still standard normal? Diagnostics for every result, and the regularisers of gradient methods."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 4.0  # standard deviations from what white noise has, beyond which a noise is called off the prior


@dataclass(frozen=True)
class Diagnosis:
    """How far a noise of d elements is from standard normal, each in standard deviations of what white noise has.

    Attributes:
        radius: ``(|z|^2 - d) / sqrt(2 d)``.
        autocorrelation: the largest of the lag-1 autocorrelations along the axes of the sample (channels are no axis), times
            the root of their number of pairs.
        covariance: how far the second moments of blocks of four neighbouring elements are from the identity, a chi-squared
            number as its normal score (Wilson and Hilferty, 1931).
    """

    radius: float
    autocorrelation: float
    covariance: float

    @property
    def worst(self) -> float:
        """The largest of them, without sign."""
        return max(abs(self.radius), abs(self.autocorrelation), abs(self.covariance))

    @property
    def off(self) -> bool:
        """Is any of them beyond `LIMIT`?"""
        return self.worst > LIMIT

    def __str__(self) -> str:
        return f"radius {self.radius:+.1f}, autocorrelation {self.autocorrelation:+.1f}, covariance {self.covariance:+.1f}"


def diagnose(z: Tensor) -> Diagnosis:
    """Diagnose one noise, (C, ..., H, W) or a vector."""
    z = z.detach().double().cpu()
    d = z.numel()
    radius = float((z.square().sum() - d) / math.sqrt(2 * d))
    lags = []
    for axis in range(1 if z.ndim > 2 else 0, z.ndim):
        if z.shape[axis] < 2:
            continue
        products = z.narrow(axis, 1, z.shape[axis] - 1) * z.narrow(axis, 0, z.shape[axis] - 1)
        lags.append(float(products.sum() / math.sqrt(products.numel())))
    return Diagnosis(radius, max(lags, key=abs, default=0.0), _blocks(z))


def _blocks(z: Tensor, size: int = 4) -> float:
    """The squared distance between the second moments of blocks and the identity, for white noise a chi-squared number: with m
    blocks the entries off the diagonal have variance 1/m, those on it 2/m."""
    rows = z.flatten()[: z.numel() // size * size].view(-1, size)
    m = len(rows)
    if m < 2 * size:
        return 0.0
    error = (rows.T @ rows / m - torch.eye(size, dtype=rows.dtype)) * math.sqrt(m)
    upper = torch.triu_indices(size, size)
    scaled = error[upper[0], upper[1]] / torch.where(upper[0] == upper[1], math.sqrt(2.0), 1.0)
    count = scaled.numel()
    spread = 2 / (9 * count)
    root = math.pow(float(scaled.square().sum()) / count, 1 / 3)
    return (root - (1 - spread)) / math.sqrt(spread)


def chi(z: Tensor) -> Tensor:
    """Minus the log-density of the radius of each noise, up to a constant: ``r^2 / 2 - (d - 1) ln r``, least at
    ``r = sqrt(d - 1)`` (Eyring et al., 2024, arXiv 2406.04312). (N, ...) -> (N,), in float32 or wider."""
    flat = z.flatten(1) if z.dtype == torch.float64 else z.flatten(1).float()
    square = flat.square().sum(1)
    return 0.5 * square - 0.5 * (flat.shape[1] - 1) * square.clamp(min=1e-12).log()


def whiteness(z: Tensor, generator: torch.Generator, draws: int = 16, size: int = 4) -> Tensor:
    """Minus an upper bound of the log-probability that white noise looks so: of the mean and of the second moments of blocks of
    coordinates, as they stand and in random orders (Tang et al., 2024, arXiv 2405.18881, eq. 8 to 11). (N, ...) -> (N,).

    In an order in which the noise looks typical the value is 2 ln 2 without a gradient, so that white noise, which looks
    untypical in few orders, is hardly moved: it is a bound that is felt outside.

    Args:
        draws: random orders, the paper's 100; each costs O(d).
        size: k, of a block.
    """
    flat = z.flatten(1).float()
    usable = flat.shape[1] // size * size
    if usable < 2 * size:  # too few numbers to look like anything
        return 0.0 * flat.sum(1)
    total = torch.zeros(len(flat), device=flat.device)
    for j in range(draws + 1):
        order = torch.arange(flat.shape[1]) if j == 0 else torch.randperm(flat.shape[1], generator=generator)
        rows = flat[:, order[:usable].to(flat.device)].view(len(flat), -1, size)
        m = rows.shape[1]
        mean = rows.mean(1).norm(dim=1)
        second = rows.transpose(1, 2) @ rows / m - torch.eye(size, device=flat.device)
        spectral = torch.linalg.matrix_norm(second, ord=2)
        l1 = -m * mean.square() / (2 * size)
        l2 = -(m / 2) * ((1 + spectral).sqrt() - 1 - math.sqrt(size / m)).clamp(min=0).square()
        total = total - l1.clamp(max=-math.log(2)) - l2.clamp(max=-math.log(2))
    return total / (draws + 1)
