"""Flow models: a stochastic chain has the marginals of the ordinary differential equation as its steps grow fine."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffsteer import CallableModel, DiffsteerError, SteeredPipeline
from diffsteer.algebra import NOISES, level, log_density, noise_std, to_clean, transition, transition_mean
from diffsteer.samplers import BestOfN

MEANS, STDS, WEIGHTS = torch.tensor([-2.0, 1.5]), torch.tensor([0.5, 0.3]), torch.tensor([0.3, 0.7])


def velocity(x: Tensor, t: Tensor, conditions: list[Any]) -> Tensor:
    """Exact for a mixture of two Gaussians: E[eps - x0 | x] at time t, x = (1 - t) x0 + t eps."""
    t = t[:, None]
    mean, variance = (1 - t) * MEANS, (1 - t) ** 2 * STDS**2 + t**2
    share = (WEIGHTS.log() - 0.5 * variance.log() - 0.5 * (x - mean) ** 2 / variance).softmax(1)
    x0 = MEANS + (1 - t) * STDS**2 / variance * (x - mean)
    eps = t / variance * (x - mean)
    return (share * (eps - x0)).sum(1, keepdim=True)


def distance(steps: int, eta: float, noise: str, rows: int = 20_000) -> float:
    """Of the chain's samples to the mixture: first Wasserstein distance between quantiles."""
    stream = torch.Generator().manual_seed(0)
    x, times = torch.randn(rows, 1, generator=stream), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for t, s in zip(times[:-1], times[1:], strict=True):
        at, to = level(1 - t, t), level(1 - s, s)
        x0, eps = to_clean("velocity", x, velocity(x, t.expand(rows).float(), []), at)
        x = transition(x0, eps, at, to, eta, torch.randn(rows, 1, generator=stream), noise)
    rng = np.random.default_rng(0)
    which = rng.random(400_000) < float(WEIGHTS[0])
    exact = np.where(which, rng.normal(-2, 0.5, 400_000), rng.normal(1.5, 0.3, 400_000))
    quantiles = np.quantile(exact, (np.arange(rows) + 0.5) / rows)
    return float(np.abs(np.sort(x.flatten().double().numpy()) - quantiles).mean())


@pytest.mark.parametrize("noise", NOISES)
def test_marginals_meet_those_of_the_equation(noise: str) -> None:
    ode = distance(256, 0.0, "eta")
    coarse, fine = distance(16, 1.0, noise), distance(256, 1.0, noise)
    assert fine < 0.04 and ode < 0.04, (ode, coarse, fine)
    assert fine < coarse / 3, "finer steps come closer"


def variances(steps: int, eta: float, noise: str, spread: float = 0.5) -> float:
    """The chain's final variance for Gaussian data N(0, spread^2), where all is linear: exact, without samples."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    variance = 1.0
    for t, s in zip(times[:-1], times[1:], strict=True):
        at, to = level(1 - t, t), level(1 - s, s)
        total = (1 - t) ** 2 * spread**2 + t**2
        x0, eps = (1 - t) * spread**2 / total, t / total  # of a unit of x
        gain = transition_mean(x0.view(1, 1), eps.view(1, 1), at, to, eta, noise)
        variance = float(gain) ** 2 * variance + float(noise_std(at, to, eta, noise)) ** 2
    return variance


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_error_is_of_first_order(noise: str, eta: float) -> None:
    """Halving the step halves the error of the variance, the ODE's and the chains' alike."""
    errors = [abs(variances(n, eta, noise) - 0.25) for n in (64, 128, 256, 512)]
    orders = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert all(0.85 < order < 1.35 for order in orders), (errors, orders)


@pytest.mark.parametrize("noise", ["eta", "quadratic"])
def test_amounts_of_noise_do_not_depend_on_the_scale_of_the_states(noise: str) -> None:
    for c in (0.3, 2.0):
        at, to = level(0.4, 0.6), level(0.5, 0.5)
        own = level(0.4 * c, 0.6 * c), level(0.5 * c, 0.5 * c)
        assert float(noise_std(*own, 1.0, noise)) == pytest.approx(c * float(noise_std(at, to, 1.0, noise)))


def test_quadratic_noise_is_its_integral_and_never_too_much() -> None:
    at, to = level(0.4, 0.6), level(0.5, 0.5)
    assert float(noise_std(at, to, 1.0, "quadratic")) ** 2 == pytest.approx(9 / 5 * (0.6**5 - 0.5**5))
    assert float(noise_std(at, to, 0.5, "quadratic")) == pytest.approx(float(noise_std(at, to, 1.0, "quadratic")) / 2)
    assert float(noise_std(level(0.0, 1.0), level(0.5, 0.5), 1.0, "quadratic")) == 0.5
    x0, eps, z = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    x = transition(x0, eps, at, to, 1.0, z, "quadratic")
    nu = noise_std(at, to, 1.0, "quadratic")
    away = (x - transition_mean(x0, eps, at, to, 1.0, "quadratic")) / nu
    expected = (-0.5 * away**2 - nu.log() - 0.5 * math.log(2 * math.pi)).sum(1)
    torch.testing.assert_close(log_density(x, x0, eps, at, to, 1.0, "quadratic"), expected)


def test_an_unknown_amount_is_refused() -> None:
    model = CallableModel(velocity, prediction="velocity", path="flow", shape=(1,))
    with pytest.raises(DiffsteerError, match="noise='loud' is unknown; valid: eta, quadratic"):
        SteeredPipeline(model, BestOfN(1), lambda x, p: x[:, 0], noise="loud")
