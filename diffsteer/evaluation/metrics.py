"""Two sets of features compared: how real what was made is, and how much of what is real it covers."""

from __future__ import annotations

from typing import NamedTuple

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


def frechet_distance(made: Tensor, real: Tensor) -> float:
    """FID (Heusel et al., 2017, arXiv 1706.08500) of features (N, D) and (M, D), by torchmetrics, in float64. With fewer
    samples than tens of D it is far too large: compare at equal numbers only.

    Raises:
        DiffsteerError: fewer than two samples on a side.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _check(made, real)
    metric = FrechetInceptionDistance(feature=_Given(made.shape[1])).set_dtype(torch.float64)
    metric.update(real.double().cpu(), real=True)
    metric.update(made.double().cpu(), real=False)
    return float(metric.compute())


def kernel_distance(made: Tensor, real: Tensor) -> float:
    """KID (Bińkowski et al., 2018, arXiv 1801.01401): the squared maximum mean discrepancy under the kernel (x y / D + 1)^3,
    of all samples at once. Unbiased: around 0 for two sets of one kind, below it half of the time.

    Raises:
        DiffsteerError: fewer than two samples on a side.
    """
    from torchmetrics.image.kid import poly_kernel

    _check(made, real)
    x, y = made.double().cpu(), real.double().cpu()

    def within(a: Tensor) -> Tensor:
        k = poly_kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * poly_kernel(x, y).mean())


def manifolds(made: Tensor, real: Tensor, neighbours: int = 3) -> Manifolds:
    """Balls around the samples (N, D) and (M, D) of a set, each as far as its k-th nearest neighbour there, stand for where
    that set lies. Exact; memory for some rows of distances at a time.

    Args:
        neighbours: k, less than N and M.

    Raises:
        DiffsteerError: too few samples on a side.
    """
    _check(made, real, neighbours + 1)
    x, y = made.double().cpu(), real.double().cpu()
    of_real, of_made = _radii(y, neighbours), _radii(x, neighbours)
    inside = []  # of each made sample, in how many balls of real ones it lies
    nearest = torch.full((len(y),), torch.inf, dtype=torch.float64)
    recalled = torch.zeros(len(y), dtype=torch.bool)
    for rows, radii in zip(torch.split(x, ROWS), torch.split(of_made, ROWS), strict=True):
        d = torch.cdist(rows, y)
        inside.append((d <= of_real).sum(1))
        nearest = torch.minimum(nearest, d.amin(0))
        recalled |= (d <= radii[:, None]).any(0)
    balls = torch.cat(inside).double()
    covered = nearest <= of_real
    return Manifolds(
        float((balls > 0).double().mean()),
        float(recalled.double().mean()),
        float(balls.mean() / neighbours),
        float(covered.double().mean()),
    )


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
