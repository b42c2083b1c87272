"""The mathematical bugs of reference implementations, each with a test that they would fail; tempering."""

from __future__ import annotations

import math

import pytest
import torch
from test_samplers import fixed, play, problem

from diffsteer.samplers import FeynmanKac
from diffsteer.types import Step


def test_weights_are_carried_over_events_without_resampling() -> None:
    """Bug 1: an increment is forgotten when nothing is resampled, so the target is lost."""
    rewards = [torch.tensor([[0.1, 0.2, 0.0, 0.1]]), torch.tensor([[0.3, 0.1, 0.2, 0.2]]), torch.tensor([[0.5, 0.0, 0.3, 0.4]])]
    for potential in ("difference", "max", "sum", "immediate"):
        state, infos = play(fixed(potential, threshold=0.01), rewards)
        assert not any(bool(i.resampled.any()) for i in infos)
        torch.testing.assert_close(state.log_weights, rewards[-1].double().log_softmax(1))


@pytest.mark.parametrize("potential", ["max", "sum"])
def test_the_final_reward_decides_not_the_running_statistic(potential: str) -> None:
    """Bug 2: the final weight of `max` and `sum` must be exp(lambda r(x0)), also after resampling."""
    early, late = torch.tensor([[9.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0, 2.0]])
    state, _ = play(fixed(potential, threshold=0.01), [early, late])
    torch.testing.assert_close(state.log_weights, late.double().log_softmax(1))
    state, infos = play(fixed(potential, trigger="always"), [early, late])
    assert bool(infos[0].resampled.all())
    # after resampling: r(x0) - log G of the ancestor, whichever particle it was
    carried = early.double().gather(1, infos[0].ancestors)
    torch.testing.assert_close(state.log_weights, (late.double() - carried).log_softmax(1))


def test_large_rewards_do_not_saturate() -> None:
    """Bug 3: weights in linear space tie above exp(23)."""
    state, _ = play(fixed(threshold=0.01), [torch.tensor([[200.0, 194.0, 0.0, -500.0]])])
    assert float(state.log_weights.exp()[0, 0]) == pytest.approx(1 / (1 + math.exp(-6)), rel=1e-9)
    assert float(state.log_z) == pytest.approx(200 + math.log1p(math.exp(-6)) - math.log(4), rel=1e-9)


def test_negative_rewards_are_told_apart_by_max() -> None:
    """Bug 4: a floor of zero makes all rewards below it alike."""
    _, infos = play(fixed("max", threshold=0.01), [torch.tensor([[-3.0, -1.0, -2.0, -4.0]]), torch.zeros(1, 4)])
    torch.testing.assert_close(infos[0].log_weights, torch.tensor([[-3.0, -1.0, -2.0, -4.0]]).double().log_softmax(1))


def test_final_weights_are_kept_when_the_ess_is_high() -> None:
    """Bug 5: at a high final ESS the weights are dropped and the selection is by reward alone."""
    state, infos = play(fixed(), [torch.tensor([[0.1, 0.0, 0.05, 0.1]])])
    assert float(infos[-1].ess) > 3.9
    torch.testing.assert_close(state.log_weights, torch.tensor([[0.1, 0.0, 0.05, 0.1]]).double().log_softmax(1))


def test_groups_are_resampled_apart() -> None:
    """Bug 6: a batch of prompts is one population; and bug 22: ESS averaged over groups."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0], [90.0, 0.0, 0.0, 0.0]])
    _, infos = play(fixed(), [rewards, rewards])
    assert infos[0].resampled.tolist() == [False, True]
    assert infos[0].ancestors.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]


def test_potentials_do_not_see_a_constant() -> None:
    rewards = [torch.randn(3, 4, dtype=torch.float64) for _ in range(3)]
    for potential in ("difference", "max", "sum", "immediate"):
        plain, _ = play(fixed(potential), rewards)
        shifted, _ = play(fixed(potential), [r + 5 for r in rewards])
        torch.testing.assert_close(plain.log_weights, shifted.log_weights)


@pytest.mark.parametrize("potential", ["difference", "max", "sum", "immediate"])
def test_reindexed_state_belongs_to_the_ancestors(potential: str) -> None:
    """What is carried equals what is recomputed from the ancestors' rewards, at every event."""
    sampler = fixed(potential, trigger="always")
    state, path = sampler.init(problem(5)), torch.zeros(5, 4, 0, dtype=torch.float64)
    for done in (1, 2, 3):
        rewards = torch.randn(5, 4, dtype=torch.float64)
        state, info = sampler.apply(state, Step(done, False, rewards))
        path = torch.cat([path, rewards[:, :, None]], 2)
        path = path.gather(1, info.ancestors[:, :, None].expand_as(path))
        statistic = {"max": path.amax(2), "sum": path.sum(2)}.get(potential, path[:, :, -1])
        torch.testing.assert_close(state.statistic, statistic)
        total = path.cummax(2).values.sum(2) if potential == "max" else path.cumsum(2).sum(2) if potential == "sum" else None
        accumulated = {"difference": path[:, :, -1], "immediate": path.sum(2)}.get(potential, total)
        torch.testing.assert_close(state.log_potential, accumulated)


def test_every_event_draws_anew() -> None:
    """Equal weights at two events, yet other ancestors."""
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]]).repeat(6, 1)
    _, infos = play(fixed("immediate", k=8, trigger="always", resampling="multinomial"), [rewards, rewards, rewards])
    assert bool((infos[0].ancestors != infos[1].ancestors).any(1).all())


def test_the_dead_stay_dead() -> None:
    """A particle that lost its weight, at an event without resampling, has none later, whatever its reward."""
    first, later = torch.tensor([[math.nan, 0.0, 0.0, 0.1]]), torch.tensor([[9.0, 0.0, 0.1, 0.0]])
    for sampler in (fixed(threshold=0.01), FeynmanKac(4, scale=0.01, threshold=0.51)):
        state, infos = play(sampler, [first, later, later])
        assert not any(bool(i.resampled.any()) for i in infos)
        assert float(state.log_weights[0, 0]) == -math.inf and bool(state.log_z.isfinite().all())
        assert float(infos[-1].ess) == pytest.approx(3, abs=0.05)
    ties = [torch.tensor([[r, 0.0, 0.0, 0.0]]) for r in (math.nan, 9.0, 9.0)]
    state, infos = play(FeynmanKac(4), ties)
    assert not any(bool(i.resampled.any()) for i in infos) and float(state.exponent) == 0, "only the dead stands out"


# ------------------------------------------------------------------------------------------------------ tempering


def test_tempering_keeps_the_ess_and_never_cools_down() -> None:
    rewards = [torch.randn(6, 8) * s for s in (1.0, 3.0, 0.2, 2.0)]
    state, infos = play(FeynmanKac(8, target_ess=0.5), rewards)
    exponents = torch.stack([i.exponent for i in infos])
    assert (exponents[1:] >= exponents[:-1]).all()
    for before, now in zip(infos[:-1], infos[1:], strict=True):  # below the target only where lambda could not help
        assert ((now.ess >= 4 - 1e-3) | (now.exponent == before.exponent)).all()
    assert (exponents[-1] > exponents[0]).any()
    assert float(infos[0].ess.max()) == pytest.approx(4, rel=1e-3)
    capped, infos = play(FeynmanKac(8, target_ess=0.5, scale=0.3), rewards)
    assert float(capped.exponent.max()) <= 0.3


def test_tempered_weights_are_those_of_the_final_exponent() -> None:
    rewards = [torch.tensor([[1.0, 0.0, 2.0, 0.5]]), torch.tensor([[0.0, 1.0, 0.5, 0.2]])]
    state, infos = play(FeynmanKac(4, trigger="ess", threshold=0.501, target_ess=0.5, scale=0.2), rewards)
    assert not bool(infos[0].resampled.any())
    torch.testing.assert_close(state.log_weights, (0.2 * rewards[-1].double()).log_softmax(1))
