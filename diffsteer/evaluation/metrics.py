"""Two sets of features compared: how real what was made is, and how much of what is real it covers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffsteer.types import DiffsteerError

ROWS = 1024  # of a matrix of distances, at a time


class Manifolds(NamedTuple):
    """Of what was made against what is real: `precision` and `recall` (Kynkäänniemi et al., 2019, arXiv 1904.06991),
    `density` and `coverage` (Naeem et al., 2020, arXiv 2002.09797). All but density lie in [0, 1]."""

    precision: float
    recall: float
    density: float
    coverage: float


class Against:
    """Real samples that others are compared with: features (M, D), and what of them is wanted more than once.

    Args:
        neighbours: k of `manifolds`.
    """

    def __init__(self, real: Tensor, neighbours: int = 3) -> None:
        self.features, self.neighbours = real.double().cpu(), neighbours

    def frechet_distance(self, made: Tensor) -> float:
        """See the function."""
        _check(made, self.features)
        metric = self._frechet
        metric.update(made.double().cpu(), real=False)
        found = float(metric.compute())
        metric.reset()  # the made ones alone
        return found

    def kernel_distance(self, made: Tensor) -> float:
        """See the function."""
        _check(made, self.features)
        x = made.double().cpu()
        return _within(x) + self._within - 2 * _kernel_sum(x, self.features) / (len(x) * len(self.features))

    def manifolds(self, made: Tensor) -> Manifolds:
        """See the function."""
        k = self.neighbours
        _check(made, self.features, k + 1)
        x, y, of_real = made.double().cpu(), self.features, self._radii
        of_made = _radii(x, k)
        inside = []  # of each made sample, in how many balls of real ones it lies
        nearest = torch.full((len(y),), torch.inf, dtype=torch.float64)
        recalled = torch.zeros(len(y), dtype=torch.bool)
        for rows, radii in zip(torch.split(x, ROWS), torch.split(of_made, ROWS), strict=True):
            d = torch.cdist(rows, y)
            inside.append((d <= of_real).sum(1))
            nearest = torch.minimum(nearest, d.amin(0))
            recalled |= (d <= radii[:, None]).any(0)
        balls, covered = torch.cat(inside).double(), nearest <= of_real
        shares = ((balls > 0).double().mean(), recalled.double().mean(), balls.mean() / k, covered.double().mean())
        return Manifolds(*map(float, shares))

    @functools.cached_property
    def _frechet(self) -> Any:
        from torchmetrics.image.fid import FrechetInceptionDistance

        given = _Given(self.features.shape[1])
        metric = FrechetInceptionDistance(feature=given, reset_real_features=False).set_dtype(torch.float64)
        metric.update(self.features, real=True)
        return metric

    @functools.cached_property
    def _within(self) -> float:
        return _within(self.features)

    @functools.cached_property
    def _radii(self) -> Tensor:
        return _radii(self.features, self.neighbours)


def frechet_distance(made: Tensor, real: Tensor) -> float:
    """FID (Heusel et al., 2017, arXiv 1706.08500) of features (N, D) and (M, D), by torchmetrics, in float64. With fewer
    samples than tens of D it is far too large: compare at equal numbers only.

    Raises:
        DiffsteerError: fewer than two samples on a side.
    """
    return Against(real).frechet_distance(made)


def kernel_distance(made: Tensor, real: Tensor) -> float:
    """KID (Bińkowski et al., 2018, arXiv 1801.01401): the squared maximum mean discrepancy under the kernel (x y / D + 1)^3, of
    all samples at once. Unbiased: around 0 for two sets of one kind, below it half of the time. Some rows of the kernel at
    a time are in memory.

    Raises:
        DiffsteerError: fewer than two samples on a side.
    """
    return Against(real).kernel_distance(made)


def manifolds(made: Tensor, real: Tensor, neighbours: int = 3) -> Manifolds:
    """Balls around the samples (N, D) and (M, D) of a set, each as far as its k-th nearest neighbour there, stand for where
    that set lies. Exact; some rows of distances at a time are in memory.

    Args:
        neighbours: k, less than N and M.

    Raises:
        DiffsteerError: too few samples on a side.
    """
    return Against(real, neighbours).manifolds(made)


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    from torchmetrics.image.kid import poly_kernel

    return float(sum(poly_kernel(rows, y).sum() for rows in torch.split(x, ROWS)))


def _within(x: Tensor) -> float:
    """The mean kernel of pairs of different samples."""
    own = (x.square().sum(1) / x.shape[1] + 1) ** 3
    return (_kernel_sum(x, x) - float(own.sum())) / (len(x) * (len(x) - 1))


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """The distance of each sample to its k-th nearest one, itself left out."""
    each = [torch.cdist(rows, x).kthvalue(neighbours + 1, dim=1).values for rows in torch.split(x, ROWS)]
    return torch.cat(each)


def _check(made: Tensor, real: Tensor, least: int = 2) -> None:
    for what, features in (("made", made), ("real", real)):
        if features.ndim != 2 or len(features) < least:
            raise DiffsteerError(f"{len(features)} {what} samples; at least {least} are needed, as features (N, D)")
    if made.shape[1] != real.shape[1]:
        raise DiffsteerError(f"made samples have {made.shape[1]} features and real ones {real.shape[1]}")


class _Given(nn.Module):
    """Features as they are, in the place of a network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x
