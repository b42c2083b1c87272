"""Closed forms: Gaussian mixtures with the exact denoiser, on every path. The ground truth of the tests, and of a first look.

>>> from diffsteer.toy import GaussianMixture
>>> from diffsteer import SteeredPipeline
>>> from diffsteer.samplers import FeynmanKac
>>> model = GaussianMixture([0.0], [1.0]).model("vp")
>>> steered = SteeredPipeline(model, FeynmanKac(4, scale=1.0, target_ess=None), lambda x, prompts: x[:, 0])
>>> steered(["any"] * 3, num_inference_steps=10, seed=0).samples.shape
torch.Size([3, 4, 1])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffsteer.algebra import Level, level, noise_std
from diffsteer.callable import CallableModel


class GaussianMixture:
    """sum_j w_j N(m_j, s_j^2) in one dimension, with its exact clean estimate E[x0 | x_t]."""

    def __init__(self, means: Sequence[float], stds: Sequence[float], weights: Sequence[float] | None = None) -> None:
        self.means = torch.tensor(means, dtype=torch.float64)
        self.stds = torch.tensor(stds, dtype=torch.float64)
        given = torch.ones_like(self.means) if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.weights = given / given.sum()

    def clean(self, x: Tensor, at: Level) -> Tensor:
        """E[x0 | x] for x (N, 1) at a level."""
        alpha, sigma = at.like(x.double())
        variance = alpha**2 * self.stds**2 + sigma**2
        residual = x.double() - alpha * self.means
        share = (self.weights.log() - 0.5 * variance.log() - 0.5 * residual**2 / variance).softmax(1)
        posterior = self.means + alpha * self.stds**2 / variance * residual
        return (share * posterior).sum(1, keepdim=True)

    def model(self, path: str = "vp", prediction: str = "eps", steps: int = 1000) -> CallableModel:
        """The mixture as a model: `path` and `prediction` as for `CallableModel`."""
        bars = torch.linspace(0.9999, 0.0001, steps, dtype=torch.float64) if path == "vp" else None

        def level_at(t: Tensor) -> Level:
            if bars is not None:
                bar = bars[t.long()]
                return Level(bar.sqrt(), (1 - bar).sqrt())
            return level(1.0, t) if path == "edm" else level(1 - t.double(), t.double())

        def fn(x: Tensor, t: Tensor, conditions: list[Any]) -> Tensor:
            at = level_at(t)
            alpha, sigma = at.like(x.double())
            x0 = self.clean(x, at)
            eps = (x.double() - alpha * x0) / sigma
            out = {"eps": eps, "x0": x0, "velocity": eps - x0, "v": (alpha * eps - sigma * x0) / (alpha**2 + sigma**2).sqrt()}
            return out[prediction].to(x.dtype)

        return CallableModel(fn, prediction, path, (1,), bars)


def chain_law(mixture: GaussianMixture, levels: Sequence[Level], eta: float, first_std: float) -> tuple[float, float]:
    """Mean and variance of the end of the DISCRETISED chain for a mixture of one component, by exact recursion.

    Args:
        levels: T + 1 of them. first_std: of the first state, whose mean is 0.
    """
    if len(mixture.means) != 1:
        raise ValueError("the chain is linear, and its law Gaussian, only for one component")
    m, s2 = float(mixture.means[0]), float(mixture.stds[0]) ** 2
    mean, variance = 0.0, first_std**2
    for at, to in zip(levels[:-1], levels[1:], strict=True):
        alpha, sigma = float(at.alpha), float(at.sigma)
        gain = alpha * s2 / (alpha**2 * s2 + sigma**2)  # x0 = m + gain (x - alpha m)
        nu = float(noise_std(at, to, eta))
        along = max(float(to.sigma) ** 2 - nu**2, 0.0) ** 0.5
        slope = float(to.alpha) * gain + along * (1 - alpha * gain) / sigma
        offset = (float(to.alpha) - along * alpha / sigma) * m * (1 - alpha * gain)
        mean, variance = slope * mean + offset, slope**2 * variance + nu**2
    return mean, variance
