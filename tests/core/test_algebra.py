"""The interpolant, the transition and its density against independent formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsteer.algebra import Level, level, log_density, noise_std, to_clean, transition, transition_mean

PATHS = {
    "vp": lambda t: level(math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)),
    "edm": lambda t: level(1.0, 20 * t),
    "flow": lambda t: level(1 - t, t),
}
times = st.tuples(st.floats(0.02, 0.98), st.floats(0.02, 0.98)).filter(lambda p: p[0] > p[1] + 1e-3)


@given(st.sampled_from(sorted(PATHS)), st.sampled_from(["eps", "x0", "v", "velocity"]), st.floats(0.02, 0.98))
@settings(max_examples=60)
def test_every_prediction_finds_the_clean_sample(path: str, prediction: str, t: float) -> None:
    at = PATHS[path](t)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).unbind(0)
    x = at.alpha * x0 + at.sigma * eps
    length = (at.alpha**2 + at.sigma**2).sqrt()
    output = {"eps": eps, "x0": x0, "v": (at.alpha * eps - at.sigma * x0) / length, "velocity": eps - x0}[prediction]
    clean, noise = to_clean(prediction, x, output, at)
    torch.testing.assert_close(clean, x0)
    torch.testing.assert_close(noise, eps)


@given(st.sampled_from(sorted(PATHS)), times, st.floats(0, 1))
@settings(max_examples=60)
def test_marginals_are_kept(path: str, pair: tuple[float, float], eta: float) -> None:
    """With the true x0 and eps the next state has exactly the next level's noise: along^2 + nu^2 = sigma'^2."""
    at, to = PATHS[path](pair[0]), PATHS[path](pair[1])
    nu = noise_std(at, to, eta)
    ones = torch.ones(1, 1, dtype=torch.float64)
    along = transition_mean(0 * ones, ones, at, to, eta)
    torch.testing.assert_close((along**2 + nu**2).squeeze(), to.sigma**2)
    assert 0 <= float(nu) <= float(to.sigma) * (1 + 1e-12)


def test_eta_one_is_the_ddpm_posterior() -> None:
    """For VP: the variance of Ho et al. (2020), beta_t (1 - abar') / (1 - abar), and its mean."""
    bar, bar_next = 0.3, 0.5
    at, to = level(bar**0.5, (1 - bar) ** 0.5), level(bar_next**0.5, (1 - bar_next) ** 0.5)
    ratio = bar / bar_next
    variance = (1 - bar_next) / (1 - bar) * (1 - ratio)
    assert float(noise_std(at, to, 1.0)) ** 2 == pytest.approx(variance, rel=1e-12)
    x0, x = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[-0.4]], dtype=torch.float64)
    eps = (x - at.alpha * x0) / at.sigma
    posterior = bar_next**0.5 * (1 - ratio) / (1 - bar) * x0 + ratio**0.5 * (1 - bar_next) / (1 - bar) * x
    torch.testing.assert_close(transition_mean(x0, eps, at, to, 1.0), posterior)


def test_eta_zero_is_eulers_step_of_a_flow() -> None:
    x0, eps = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[1.2]], dtype=torch.float64)
    at, to = level(0.2, 0.8), level(0.3, 0.7)
    x = at.alpha * x0 + at.sigma * eps
    torch.testing.assert_close(transition(x0, eps, at, to, 0.0, torch.ones_like(x)), x + (0.7 - 0.8) * (eps - x0))


def test_finite_where_a_flow_starts_and_where_it_ends() -> None:
    x = torch.randn(5, 2)
    assert transition(x, x, level(0.0, 1.0), level(0.1, 0.9), 1.0, x).isfinite().all()
    torch.testing.assert_close(transition(x, 3 * x, level(0.1, 0.9), level(1.0, 0.0), 1.0, 5 * x), x)


@given(st.sampled_from(sorted(PATHS)), times, st.floats(0.05, 1))
@settings(max_examples=40)
def test_density_is_the_normal_density(path: str, pair: tuple[float, float], eta: float) -> None:
    at, to = PATHS[path](pair[0]), PATHS[path](pair[1])
    x0, eps, z = torch.randn(3, 4, 6, dtype=torch.float64).unbind(0)
    x = transition(x0, eps, at, to, eta, z)
    normal = torch.distributions.Normal(transition_mean(x0, eps, at, to, eta), noise_std(at, to, eta))
    expected = normal.log_prob(x).sum(1)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(log_density(x, x0, eps, at, to, eta), expected, rtol=1e-8, atol=1e-6)


def test_density_of_a_deterministic_step_is_refused() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="no density"):
        log_density(x, x, x, level(0.5, 0.5), level(0.6, 0.4), 0.0)


def test_levels_may_differ_by_row() -> None:
    at = Level(torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6]))
    to = Level(torch.tensor([0.8, 0.9]), torch.tensor([0.6, 0.4359]))
    x0, eps, z = torch.randn(3, 2, 3, 4).unbind(0)
    both = transition(x0, eps, at, to, 1.0, z)
    for i in range(2):
        one = transition(
            x0[i : i + 1], eps[i : i + 1], Level(at.alpha[i], at.sigma[i]), Level(to.alpha[i], to.sigma[i]), 1.0, z[i : i + 1]
        )
        torch.testing.assert_close(both[i : i + 1], one)


def test_unknown_prediction_is_named() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="'noise'.*eps"):
        to_clean("noise", x, x, level(0.5, 0.5))
