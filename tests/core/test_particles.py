"""Resampling schemes, weights, tempering, reindexing and keyed randomness."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsteer import rng
from diffsteer.particles import PER_ROW, decisive_exponent, effective_sample_size, largest_exponent, normalize, reindex
from diffsteer.resampling import SCHEMES

WEIGHTS = [
    torch.tensor([0.5, 0.25, 0.125, 0.125]),
    torch.tensor([0.01, 0.02, 0.9, 0.07]),
    torch.tensor([0.3, 0.3, 0.2, 0.1, 0.06, 0.04, 0.0]),
    torch.tensor([0.0, 1.0, 0.0]),
]


def offspring(name: str, weights: Tensor, seed: int) -> Tensor:
    ancestors = SCHEMES[name](weights.double().log(), torch.Generator().manual_seed(seed))
    return torch.bincount(ancestors, minlength=len(weights))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_unbiased(name: str, weights: Tensor) -> None:
    draws = torch.stack([offspring(name, weights, s) for s in range(1500)]).double()
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - len(weights) * weights).abs() <= 4.5 * error + 1e-9).all()
    assert (draws[:, weights == 0] == 0).all(), "a particle of weight zero has no children"


@pytest.mark.parametrize("name", ["systematic", "ssp"])
@given(st.lists(st.floats(0, 1), min_size=2, max_size=12).filter(lambda w: sum(w) > 1e-3), st.integers(0, 2**31))
@settings(max_examples=60)
def test_offspring_are_floor_or_ceil(name: str, values: list[float], seed: int) -> None:
    weights = torch.tensor(values, dtype=torch.float64)
    weights /= weights.sum()
    counts, expected = offspring(name, weights, seed), len(weights) * weights
    assert int(counts.sum()) == len(weights)
    assert (counts >= (expected - 1e-6).floor()).all() and (counts <= (expected + 1e-6).ceil()).all()


@pytest.mark.parametrize("name", SCHEMES)
@given(st.lists(st.floats(-800, 5), min_size=1, max_size=9), st.integers(0, 2**31))
@settings(max_examples=40)
def test_ancestors_are_valid_and_survivors_stay(name: str, logs: list[float], seed: int) -> None:
    ancestors = SCHEMES[name](torch.tensor(logs), torch.Generator().manual_seed(seed))
    assert len(ancestors) == len(logs) and int(ancestors.min()) >= 0 and int(ancestors.max()) < len(logs)
    for parent in set(ancestors.tolist()):
        assert int(ancestors[parent]) == parent


@pytest.mark.parametrize("name", SCHEMES)
def test_uniform_weights_give_the_identity(name: str) -> None:
    for seed in range(20):
        assert SCHEMES[name](torch.full((7,), -3.2), torch.Generator().manual_seed(seed)).tolist() == list(range(7))


@pytest.mark.parametrize("name", SCHEMES)
def test_dead_particles_stay_dead(name: str) -> None:
    logs = torch.tensor([0.0, float("-inf"), 0.1, float("-inf")])
    for seed in range(50):
        assert set(SCHEMES[name](logs, torch.Generator().manual_seed(seed)).tolist()) <= {0, 2}


def test_systematic_does_not_depend_on_the_order() -> None:
    """The plain scheme never gives both neighbours of a large weight a child here; the shuffled one does."""
    weights = torch.tensor([0.25, 0.25, 0.25, 0.25]) + torch.tensor([0.125, -0.125, 0.125, -0.125])
    pairs = {tuple((offspring("systematic", weights, s)[[1, 3]] > 0).tolist()) for s in range(300)}
    assert pairs == {(True, False), (False, True), (True, True), (False, False)}


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=8))
@settings(max_examples=50)
def test_ess_by_its_definition(logs: list[float]) -> None:
    lw = torch.tensor([logs], dtype=torch.float64)
    w = lw.softmax(1)
    assert float(effective_sample_size(lw)) == pytest.approx(float(1 / (w**2).sum()), rel=1e-9)
    normal, total = normalize(lw)
    assert float(normal.exp().sum()) == pytest.approx(1) and float(total) == pytest.approx(float(lw.logsumexp(1)))


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.floats(0.3, 0.9))
@settings(max_examples=50)
def test_tempering_stops_at_the_target(rewards: list[float], target: float) -> None:
    r = torch.tensor([rewards], dtype=torch.float64)
    low = torch.zeros(1, dtype=torch.float64)
    exponent = largest_exponent(lambda e: e[:, None] * r, low, low + 50, target * 4)
    ess = float(effective_sample_size(exponent[:, None] * r))
    assert ess >= target * 4 * (1 - 1e-6)
    assert float(exponent) == 50.0 or ess == pytest.approx(target * 4, rel=1e-3)


def test_tempering_finds_the_last_crossing() -> None:
    """With carried weights the ESS may fall and rise again: the largest exponent of all, up to thin islands."""
    rng_ = torch.Generator().manual_seed(0)
    carried, r, old = (torch.randn(1000, 8, generator=rng_, dtype=torch.float64) for _ in range(3))
    low = torch.full((1000,), 0.5, dtype=torch.float64)
    high = low + decisive_exponent(r, torch.ones_like(r, dtype=torch.bool))

    def ess_at(exponent: Tensor) -> Tensor:
        return effective_sample_size(2 * carried + exponent[:, None] * r - old)

    found = largest_exponent(lambda e: 2 * carried + e[:, None] * r - old, low, high, 4.0)
    assert (ess_at(found)[found > low] >= 4 - 1e-6).all()
    best = low.clone()
    for share in torch.linspace(0, 1, 1001):
        best = torch.where(ess_at(low + (high - low) * share) >= 4, low + (high - low) * share, best)
    missed = best > found + 1e-9
    assert int((best > low).sum()) > 100, "there was something to find"
    assert int(missed.sum()) <= 2


@pytest.mark.parametrize(
    ("rewards", "further"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0.0),
        ([1.0, 1.0, 1.0, 1.0 + 1e-7], 0.0),
        ([1.0, 1.0, 1.0, 0.0], math.log(4000)),
        ([5.0, 5.0, 3.0, -100.0], math.log(4000) / 2),
        ([0.0, 9.0, 9.0, 9.0], math.log(4000) / 9),
    ],
)
def test_ties_and_rounding_bound_the_exponent(rewards: list[float], further: float) -> None:
    r = torch.tensor([rewards], dtype=torch.float64)
    assert float(decisive_exponent(r, torch.ones(1, 4, dtype=torch.bool))) == pytest.approx(further)


def test_the_dead_do_not_count() -> None:
    r = torch.tensor([[1.0, 0.0, 7.0, 0.0]], dtype=torch.float64)
    assert float(decisive_exponent(r, torch.tensor([[True, True, False, True]]))) == pytest.approx(math.log(4000))
    assert float(decisive_exponent(r, torch.zeros(1, 4, dtype=torch.bool))) == 0


@dataclass(frozen=True)
class Some:
    name: str
    x: Tensor = field(metadata=PER_ROW)
    y: Tensor = field(metadata=PER_ROW)


def test_reindex_follows_everything_registered_and_nothing_else() -> None:
    ancestors = torch.tensor([[2, 1, 2], [0, 0, 1]])
    x = torch.arange(6).view(2, 3)
    moved = reindex(Some("s", x, x[..., None].float()), ancestors)
    assert (
        moved.name == "s" and moved.x.tolist() == [[2, 1, 2], [3, 3, 4]] and moved.y[..., 0].tolist() == [[2, 1, 2], [3, 3, 4]]
    )
    again: Any = reindex({"a": [x, (x,)]}, ancestors)
    assert again["a"][1][0].tolist() == moved.x.tolist()
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]], "the argument is not changed"
    with pytest.raises(ValueError, match="shape"):
        reindex(x[:1], ancestors)
    with pytest.raises(TypeError, match="str"):
        reindex("x", ancestors)


def test_noise_is_keyed_by_all_of_its_key() -> None:
    base = rng.normal(0, [("a", 0)], 1, "step", (3,))
    for other in [
        (1, [("a", 0)], 1, "step"),
        (0, [("b", 0)], 1, "step"),
        (0, [("a", 1)], 1, "step"),
        (0, [("a", 0)], 2, "step"),
        (0, [("a", 0)], 1, "start"),
    ]:
        assert not torch.equal(rng.normal(*other, (3,)), base)
    assert torch.equal(rng.normal(0, [("b", 3), ("a", 0)], 1, "step", (3,))[1:], base)
    assert not torch.equal(rng.normal(0, [(1, 0)], 1, "step", (3,)), rng.normal(0, [("1", 0)], 1, "step", (3,)))


def test_noise_is_standard_normal() -> None:
    x = rng.normal(0, [(p, k) for p in range(200) for k in range(10)], 0, "step", (20,))
    n = x.numel()
    assert abs(float(x.mean())) < 4 / n**0.5 and abs(float(x.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((x[1:] * x[:-1]).mean())) < 4 / n**0.5
