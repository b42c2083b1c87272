"""Numbers of sets against closed forms, definitions written out, invariances and counted coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsteer.evaluation import (
    Against,
    frechet_distance,
    hypervolume,
    jackknife,
    kernel_distance,
    manifolds,
    mean_interval,
    pareto_front,
)
from diffsteer.types import DiffsteerError


def draws(seed: int, n: int, d: int = 3, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return shift + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_frechet_distance_of_gaussians() -> None:
    """Of two normal laws with means and deviations it is |m - n|^2 + D (s - t)^2; of a set to itself nothing."""
    found = frechet_distance(draws(0, 40_000, shift=0.5, scale=2.0), draws(1, 40_000))
    assert found == pytest.approx(3 * 0.25 + 3 * 1.0, rel=0.03)
    same = draws(2, 50)
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_of_correlated_features() -> None:
    """tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of sample covariances, the roots taken by eigenvalues here."""
    x, y = draws(0, 60) @ draws(3, 3), draws(1, 50, shift=0.3) @ draws(4, 3)

    def root(m: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(m)
        made: Tensor = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
        return made

    a, b = torch.cov(x.T), torch.cov(y.T)
    by_hand = (x.mean(0) - y.mean(0)).square().sum() + (a + b - 2 * root(root(a) @ b @ root(a))).trace()
    assert frechet_distance(x, y) == pytest.approx(float(by_hand), rel=1e-9)


def test_the_kernel_distance_is_the_sum_over_pairs_and_unbiased() -> None:
    x, y = draws(0, 7), draws(1, 5, shift=1.0)

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within_x = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    between = np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-9)
    nothing = [kernel_distance(draws(2 * n, 40), draws(2 * n + 1, 40)) for n in range(200)]
    assert abs(np.mean(nothing)) < 3 * np.std(nothing) / math.sqrt(200)


def by_definition(made: Tensor, real: Tensor, k: int) -> tuple[float, float, float, float]:
    def d(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm())

    def radius(of: Tensor, i: int) -> float:
        return sorted(d(of[i], x) for j, x in enumerate(of) if j != i)[k - 1]

    real_radii, made_radii = [radius(real, i) for i in range(len(real))], [radius(made, i) for i in range(len(made))]
    inside = [[d(x, y) <= r for y, r in zip(real, real_radii, strict=True)] for x in made]
    precision = np.mean([any(row) for row in inside])
    density = sum(map(sum, inside)) / (k * len(made))
    coverage = np.mean([any(row[j] for row in inside) for j in range(len(real))])
    recall = np.mean([any(d(x, y) <= r for x, r in zip(made, made_radii, strict=True)) for y in real])
    return float(precision), float(recall), density, float(coverage)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 14), st.integers(5, 14), st.integers(1, 4))
def test_manifolds_are_what_their_papers_define(seed: int, n: int, m: int, k: int) -> None:
    made, real = draws(seed, n, 2, 0.5), draws(seed + 1, m, 2)
    found = manifolds(made, real, k)
    assert found == pytest.approx(by_definition(made, real, k), abs=1e-12)
    turned = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64) * 3  # a rotation and a scale change nothing
    assert manifolds(made @ turned + 1, real @ turned + 1, k) == pytest.approx(found, abs=1e-12)


def test_manifolds_of_many_are_those_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = draws(0, 90, 4, 0.3), draws(1, 70, 4)
    whole, kernels = manifolds(made, real), kernel_distance(made, real)
    monkeypatch.setattr("diffsteer.evaluation.metrics.ROWS", 16)
    assert manifolds(made, real) == whole
    assert kernel_distance(made, real) == pytest.approx(kernels, rel=1e-12)


def test_what_is_known_of_the_real_ones_is_not_changed_by_others() -> None:
    """Asked twice, in any order, of any set."""
    real, one, other = draws(0, 40), draws(1, 30, shift=1.0), draws(2, 20)
    against = Against(real, 2)
    for made in (one, other, one):
        assert against.frechet_distance(made) == pytest.approx(frechet_distance(made, real), rel=1e-9)
        assert against.kernel_distance(made) == pytest.approx(kernel_distance(made, real), rel=1e-9)
        assert against.manifolds(made) == manifolds(made, real, 2)


def test_what_was_never_made_lowers_recall_and_coverage_and_what_is_not_real_precision_and_density() -> None:
    two = torch.cat([draws(0, 60, 2), draws(1, 60, 2, 20.0)])
    half = manifolds(draws(2, 60, 2), two)
    assert half.precision > 0.9 and half.recall < 0.6 and half.coverage < 0.6
    more = manifolds(two, draws(3, 60, 2))
    assert more.precision < 0.6 and more.density < 0.7 and more.recall > 0.9 and more.coverage > 0.8


@pytest.mark.parametrize("made, real", [(1, 5), (5, 3)])
def test_too_few_samples_are_refused(made: int, real: int) -> None:
    with pytest.raises(DiffsteerError, match="at least 4 are needed"):
        manifolds(draws(0, made), draws(1, real), 3)
    with pytest.raises(DiffsteerError, match="3 features and real ones 2"):
        kernel_distance(draws(0, 5), draws(0, 5, 2))


# ----------------------------------------------------------------------------------------------------------- fronts

points = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(points)
def test_the_front_is_what_no_other_beats(cloud: list[tuple[int, int, int]]) -> None:
    front = pareto_front(cloud)
    for i, p in enumerate(cloud):
        beaten = any(all(a >= b for a, b in zip(q, p, strict=True)) and q != p for q in cloud)
        assert (i in front) == (not beaten)
    assert front and pareto_front([*cloud, (math.nan, 9, 9)]) == front


@settings(max_examples=200, deadline=None)
@given(points)
def test_the_hypervolume_counts_the_cells_of_a_grid(cloud: list[tuple[int, int, int]]) -> None:
    cells = sum(
        any(all(x < v for x, v in zip(cell, p, strict=True)) for p in cloud) for cell in itertools.product(range(4), repeat=3)
    )
    assert hypervolume(cloud, (0, 0, 0)) == pytest.approx(cells)
    front = [cloud[i] for i in pareto_front(cloud)]
    assert hypervolume(front, (0, 0, 0)) == pytest.approx(cells)  # what is beaten adds nothing
    assert hypervolume(cloud, (-1.0, 0, 0)) >= cells


def test_a_point_below_the_reference_adds_nothing() -> None:
    assert hypervolume([(2.0, 3.0), (5.0, -1.0)], (0.0, 0.0)) == pytest.approx(6.0)
    assert hypervolume([(-1.0, 3.0)], (0.0, 0.0)) == 0


# -------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("prompts", [2, 6, 40])
def test_intervals_hold_the_truth_as_often_as_they_say(prompts: int) -> None:
    """Of the mean of normal draws, 95 of 100 times, however few prompts there are; and they are no wider than that."""
    rng, held, tries = np.random.default_rng(prompts), np.zeros(2), 400
    for _ in range(tries):
        x = rng.normal(size=prompts)
        for n, interval in enumerate((mean_interval(x), jackknife(lambda p, x=x: [x[list(p)].mean()], prompts)[0])):  # type: ignore[misc]
            assert interval.value == pytest.approx(x.mean())
            held[n] += interval.low <= 0 <= interval.high
    assert np.all(held / tries > 0.92) and np.all(held / tries < 0.98)


def test_the_intervals_of_a_mean_are_the_textbook_ones() -> None:
    """Ten prompts are ten groups of one: the standard error of the mean, times the quantile of Student's t with 9 degrees."""
    x = np.random.default_rng(1).normal(size=10)
    reach = 2.2621571628 * x.std(ddof=1) / math.sqrt(10)
    for found in (jackknife(lambda p: [x[list(p)].mean()], 10)[0], mean_interval(x)):
        assert found.high - found.value == pytest.approx(reach) and found.value - found.low == pytest.approx(reach)


def test_where_nothing_varied_at_a_bound_the_interval_is_that_of_a_share() -> None:
    """Six of six right: Clopper and Pearson say 0.54 to 1; of a value without bounds nothing more is known."""
    from scipy import stats

    found = mean_interval([1.0] * 6, (0, 1))
    assert found == pytest.approx((1, stats.binomtest(6, 6).proportion_ci().low, 1))
    assert mean_interval([0.0] * 6, (0, 1)) == pytest.approx((0, 0, stats.binomtest(0, 6).proportion_ci().high))
    assert mean_interval([3.0] * 6) == (3, 3, 3) and mean_interval([0.5] * 6, (0, 1)) == (0.5, 0.5, 0.5)
    assert mean_interval([1.0, 1.0, 0.0], (0, 1)).high == 1


def test_intervals_of_nothing() -> None:
    one = mean_interval([2.0])
    assert one.value == 2 and math.isnan(one.low)
    assert math.isnan(mean_interval([1.0, math.nan]).value) and math.isnan(mean_interval([]).value)
    assert math.isnan(jackknife(lambda p: [1.0], 1)[0].high)
