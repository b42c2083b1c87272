"""The update of gradient guidance, schedules, and the picture of a lineage."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsteer import schedules
from diffsteer.algebra import level
from diffsteer.guidance import NORMALISERS, Guidance, Moments, Scale, gradient_of, update
from diffsteer.lineage import HIGH, LOST, LOW, MARGIN, TALL, WIDE, draw
from diffsteer.schedules import FlowTime, Karras, LogSNR
from diffsteer.toy import GaussianMixture
from diffsteer.types import DiffsteerError, Info, Trace


def scale_of(time: float, rows: int = 3, reward: float = -2.0, ceiling: float = math.inf) -> Scale:
    pulls = torch.linspace(0.1, 0.5, rows)
    return Scale(level(1 - time, time), torch.full((rows,), 0.8), torch.full((rows,), reward), ceiling, pulls)


@given(st.floats(0.01, 5), st.floats(0.01, 0.99), st.floats(1e-3, 1e3))
def test_an_update_is_a_share_of_the_uncertainty_whatever_the_scale_of_the_reward(
    strength: float, time: float, scale: float
) -> None:
    g = torch.randn(3, 2, 5)
    for through in (False, True):
        moved, skipped = update(Guidance(), scale * g, scale_of(time), strength, through)
        rms = moved.flatten(1).square().mean(1).sqrt()
        wanted = strength * time / math.hypot(1 - time, time)
        torch.testing.assert_close(rms, torch.full((3,), wanted), rtol=1e-3, atol=1e-6)
        assert skipped == 0 and bool((moved * g >= 0).all())


def test_normalisers_by_hand() -> None:
    g = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    rms = (torch.tensor([25.0, 0.25]) / 2).sqrt()

    def moved(kind: str, through: bool = False, **changed: float) -> torch.Tensor:
        return update(Guidance(normaliser=kind), g, scale_of(0.25, 2, **changed), 2.0, through)[0]

    torch.testing.assert_close(moved("none"), 2 * g)
    torch.testing.assert_close(moved("none", through=True), 2 * g / 0.75)  # divided by alpha
    torch.testing.assert_close(moved("unit"), 2 * g / torch.tensor([[5.0], [0.5]]))
    torch.testing.assert_close(moved("step"), 2 * g * (0.8 * 0.25 / 0.75 / rms)[:, None])
    torch.testing.assert_close(moved("cfg"), 2 * g * (torch.tensor([0.1, 0.5]) / rms)[:, None])
    torch.testing.assert_close(moved("clip"), 2 * torch.stack([g[0] / rms[0], g[1]]))
    torch.testing.assert_close(moved("residual"), 2 * g / (2 * 2**0.5))  # the loss is 2
    torch.testing.assert_close(moved("residual", reward=1.0, ceiling=10.0), 2 * g / (2 * 3.0))
    with pytest.raises(DiffsteerError, match="wants minus a squared distance"):
        moved("residual", reward=1.0)


@pytest.mark.parametrize("normaliser", ["uncertainty", "unit", "clip", "cfg", "step"])
def test_gradients_of_any_size_count_as_what_they_are(normaliser: str) -> None:
    for size in (1e-20, 1.0, 1e25):
        g = size * torch.tensor([[3.0, 4.0], [3.0, -4.0]])
        moved, skipped = update(Guidance(normaliser=normaliser), g, scale_of(0.5, 2), 1.0)
        assert skipped == 0 and (normaliser == "clip" or bool((moved.abs() > 1e-3).all())) and bool(moved.isfinite().all())
        assert bool((moved * g.sign() >= 0).all())
    moved, skipped = update(Guidance(normaliser="none", clean=1.0), torch.full((2, 2), 3e38), scale_of(0.5, 2), 10.0)
    assert skipped == 2 and bool((moved == 0).all())
    unknown = scale_of(0.5, 2)._replace(pulls=torch.tensor([0.1, math.nan]))
    moved, skipped = update(Guidance(normaliser="cfg"), torch.ones(2, 2), unknown, 1.0)
    assert skipped == 1 and bool((moved[0] != 0).all()) and bool((moved[1] == 0).all())


def test_dps_s_norm_is_the_gradient_of_the_distance() -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    g, rewards = gradient_of(lambda z: -(z - y).square().sum(1), x)
    scale = Scale(level(0.6, 0.8), torch.ones(4), rewards, math.inf)
    moved, _ = update(Guidance(normaliser="residual"), g, scale, 1.0)
    torch.testing.assert_close(moved, (y - x) / (y - x).norm(dim=1, keepdim=True))


def test_a_flat_reward_and_no_number_move_nothing() -> None:
    gradient = torch.stack([torch.zeros(4), torch.full((4,), math.nan), torch.ones(4)])
    for kind in NORMALISERS:
        moments = Moments() if kind == "adam" else None
        moved, skipped = update(Guidance(normaliser=kind), gradient, scale_of(0.5), 1.0, moments=moments)
        assert not moved[:2].any() and skipped == 1 and bool(moved[2].all()), kind


def test_moments_are_adam_s_and_follow_their_rows() -> None:
    moments, parameter = Moments(0.9, 0.99), torch.nn.Parameter(torch.zeros(4, 3))
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.99), eps=1e-8, maximize=True)
    for _ in range(4):
        g, before = torch.randn(4, 3), parameter.detach().clone()
        parameter.grad = g
        adam.step()
        torch.testing.assert_close(moments(g), parameter.detach() - before, rtol=1e-4, atol=1e-5)
    first = moments.first.clone()
    moments.follow(torch.tensor([[1, 1], [0, 1]]))
    assert torch.equal(moments.first, first[[1, 1, 2, 3]])
    asked = Guidance(normaliser="adam", beta1=0.034, beta2=0.0).moments()
    assert list(asked) == ["clean", "network"] and (asked["clean"].beta1, asked["clean"].beta2) == (0.034, 0.0)
    torch.testing.assert_close(asked["network"](g), g.sign())  # nothing stays: signs
    assert Guidance().moments() == {}


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.integers(1, 7))
def test_guided_steps_lie_in_the_interval(steps: int, a: float, b: float, every: int) -> None:
    lowest, highest = min(a, b), max(a, b)
    guidance = Guidance(1.0, lowest=lowest, highest=highest, every=every)
    levels = [level(k / steps, 1 - k / steps) for k in range(steps)]
    guided = [k for k in range(steps) if guidance.guides(k, levels[k])]
    assert guided == [k for k in range(0, steps, every) if lowest <= float(levels[k].sigma) <= highest]
    assert not any(Guidance(0.0).guides(k, levels[k]) for k in range(steps))


@pytest.mark.parametrize("path", ["vp", "edm", "flow"])
@pytest.mark.parametrize("schedule", ["constant", "increase", "decrease"])
def test_shares_of_a_strength_have_a_mean_of_one(path: str, schedule: str) -> None:
    model = GaussianMixture([0.0], [1.0]).model(path, "x0")
    shares = Guidance(schedule=schedule).shares(model.grid(12)[1])
    assert len(shares) == 12 and sum(shares) / 12 == pytest.approx(1.0) and min(shares) >= 0
    if schedule != "constant":
        rising = shares[-2] > shares[0] if schedule == "increase" else shares[-2] < shares[0]
        assert rising


def test_gradient_of_leaves_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.arange(6.0).view(2, 3)
        gradient, values = gradient_of(lambda y: y.square().sum(1), x)
    assert torch.equal(gradient, 2 * x) and torch.equal(values, x.square().sum(1)) and not values.requires_grad


@pytest.mark.parametrize(
    "wrong",
    [
        {"clean": -1.0},
        {"network": math.inf},
        {"clean": "x"},
        {"normaliser": "l1"},
        {"schedule": "cosine"},
        {"lowest": 0.9, "highest": 0.1},
        {"every": 0},
        {"recurrence": 1.5},
        {"beta1": 1.0, "normaliser": "adam"},
        {"beta2": 0.9},
    ],
)
def test_guidance_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(DiffsteerError, match=next(iter(wrong))):
        Guidance(**wrong)


@given(st.integers(2, 100), st.floats(1, 1000), st.floats(1e-3, 0.5), st.floats(1, 12), st.floats(0.1, 10))
def test_schedules_fall_from_end_to_end(steps: int, high: float, low: float, rho: float, shift: float) -> None:
    for schedule in (Karras(rho), LogSNR(), FlowTime(shift)):
        ratios = schedule.ratios(steps, high, low)
        assert ratios.dtype == torch.float64 and len(ratios) == steps
        assert float(ratios[0]) == pytest.approx(high, rel=1e-6) and float(ratios[-1]) == pytest.approx(low, rel=1e-6)
        assert bool((ratios[1:] < ratios[:-1]).all())


def test_schedules_are_their_papers() -> None:
    sigmas = Karras(7.0).ratios(3, 80.0, 0.002)  # eq. 5 by hand
    assert float(sigmas[1]) == pytest.approx(((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7)
    assert float(LogSNR().ratios(3, 100.0, 0.01)[1]) == pytest.approx(1.0)
    torch.testing.assert_close(Karras(1e5).ratios(9, 80.0, 0.002), LogSNR().ratios(9, 80.0, 0.002), rtol=1e-3, atol=0)
    t = FlowTime(3.0).ratios(5, 1e3, 1e-3)
    t = t / (1 + t)
    back = t / (3 - 2 * t)  # the inverse of the shift
    torch.testing.assert_close(back.diff(), back.diff()[:1].expand(4))
    for wrong in (lambda: Karras(0.5), lambda: FlowTime(0.0), lambda: FlowTime("x")):  # type: ignore[arg-type]
        with pytest.raises(DiffsteerError):
            wrong()
    assert {dataclasses.is_dataclass(getattr(schedules, name)) for name in schedules.__all__} == {True}


def test_the_lineage_shows_rewards_and_ancestors() -> None:
    def info(done: int, rewards: list[float], ancestors: list[int]) -> Info:
        zeros = torch.zeros(1, 3, dtype=torch.float64)
        ones = torch.ones(1)
        return Info(done, torch.tensor([rewards]), zeros, ones, torch.tensor([ancestors]), ones.bool(), ones)

    trace = Trace((info(2, [0.0, math.nan, 1.0], [2, 2, 2]), info(5, [0.5, 0.5, 1.0], [0, 1, 2])))
    picture = np.asarray(draw(trace, torch.tensor([0]), ["a caption"]))

    def dot(column: int, k: int) -> tuple[int, ...]:
        return tuple(int(v) for v in picture[MARGIN + k * TALL, MARGIN + column * WIDE])

    assert dot(0, 0) == LOW and dot(0, 1) == LOST and dot(0, 2) == HIGH == dot(1, 2)
    x, y = MARGIN + WIDE // 2, MARGIN + TALL  # halfway from particle 2 to particle 0 stands the thick line of the chosen
    assert int(picture[y - 1 : y + 2, x - 1 : x + 2].min()) < 60
    assert picture.shape[0] == MARGIN + 3 * TALL + 14
    with pytest.raises(DiffsteerError, match="without events"):
        draw(Trace(), torch.tensor([0]))
