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
from diffsteer.guidance import Guidance, gradient_of
from diffsteer.lineage import HIGH, LOST, LOW, MARGIN, TALL, WIDE, draw
from diffsteer.schedules import FlowTime, Karras, LogSNR
from diffsteer.types import DiffsteerError, Info, Trace


@given(st.floats(0.01, 5), st.floats(0.01, 0.99), st.floats(1e-3, 1e3))
def test_an_update_is_a_share_of_the_uncertainty_whatever_the_scale_of_the_reward(
    strength: float, time: float, scale: float
) -> None:
    x0, g = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    moved, skipped = Guidance(strength=strength).move(x0, scale * g, level(1 - time, time))
    rms = (moved - x0).flatten(1).square().mean(1).sqrt()
    wanted = strength * time / math.hypot(1 - time, time)
    torch.testing.assert_close(rms, torch.full((3,), wanted), rtol=1e-3, atol=1e-6)
    assert skipped == 0 and bool(((moved - x0) * g > -1e-6).all())


def test_a_flat_reward_and_no_number_move_nothing() -> None:
    x0 = torch.randn(3, 4)
    gradient = torch.stack([torch.zeros(4), torch.full((4,), math.nan), torch.ones(4)])
    moved, skipped = Guidance(strength=1.0).move(x0, gradient, level(1.0, 2.0))
    assert torch.equal(moved[:2], x0[:2]) and skipped == 1 and not torch.equal(moved[2], x0[2])


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.integers(1, 7))
def test_guided_steps_lie_in_the_interval(steps: int, a: float, b: float, every: int) -> None:
    start, stop = min(a, b), max(a, b)
    guided = [k for k in range(steps) if Guidance(1.0, "x0", start, stop, every).guides(k, steps)]
    assert all(start * steps <= k < stop * steps for k in guided)
    assert all(y - x == every for x, y in zip(guided, guided[1:], strict=False))
    assert not any(Guidance(0.0, "x0", start, stop, every).guides(k, steps) for k in range(steps))


def test_gradient_of_leaves_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.arange(6.0).view(2, 3)
        gradient, values = gradient_of(lambda y: y.square().sum(1), x)
    assert torch.equal(gradient, 2 * x) and torch.equal(values, x.square().sum(1)) and not values.requires_grad


@pytest.mark.parametrize(
    "wrong",
    [
        {"strength": -1.0},
        {"strength": math.inf},
        {"strength": "x"},
        {"through": "vae"},
        {"start": 0.9, "stop": 0.1},
        {"every": 0},
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
