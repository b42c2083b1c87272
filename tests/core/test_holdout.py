"""Rewards that look on: what selection did to them, in numbers known beforehand, and that they change nothing."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsteer import CallableModel, SteeredPipeline, load_pipeline
from diffsteer.algebra import level
from diffsteer.calibration import calibrated, is_unscaled, settled_scales
from diffsteer.holdout import DriftWarning, Selected, holdouts_of, nothing, selected, warn_of_drift
from diffsteer.reward import FunctionReward, Reward, WeightedSum, ZScore
from diffsteer.rewards import Brightness, ClipScore, Compressibility, RankEnsemble, SecondClip, Sharpness
from diffsteer.samplers import BestOfN, FeynmanKac, RandomSearch
from diffsteer.toy import GaussianMixture
from diffsteer.types import DiffsteerError

CAPTIONS = ["a red circle", "a triangle and a ring"]


def first(x: Tensor, p: Any) -> Tensor:
    return x[:, 0]


def against(x: Tensor, p: Any) -> Tensor:
    return -x[:, 0]


def other(x: Tensor, p: Any) -> Tensor:
    return x[:, 1]


@pytest.fixture
def model() -> CallableModel:
    axis = GaussianMixture([0.0], [1.0])

    def fn(x: Tensor, t: Tensor, conditions: list[Any]) -> Tensor:
        each = [axis.clean(x[:, d : d + 1], level(1 - t.double(), t.double())) for d in range(2)]
        x0 = torch.cat(each, 1)
        return ((x.double() - (1 - t.double())[:, None] * x0) / t.double()[:, None] - x0).to(x.dtype)

    return CallableModel(fn, "velocity", "flow", (2,))


# --------------------------------------------------------------------------------------------------- in numbers


def test_the_differential_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0, 3.0]])
    one = selected(scores, torch.tensor([[2, 2, 3, 1]]))
    assert float(one.gains) == pytest.approx((6 + 6 + 3 + 2) / 4 - 3)
    # of 4 scores with variance s^2, blind copies in numbers (2, 1, 1, 0) scatter by s^2 (sum of shares squared - 1/4)
    assert float(one.variances) == pytest.approx(float(scores.var()) * ((4 + 1 + 1) / 16 - 1 / 4))
    best = selected(scores, torch.tensor([[2]]))
    assert float(best.gains) == pytest.approx(3) and float(best.variances) == pytest.approx(float(scores.var()) * 3 / 4)
    both = one.plus(best)
    assert both.score == pytest.approx(float(both.gains) / math.sqrt(float(both.variances)))
    assert nothing(3).score == 0 and nothing(3).mean == 0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.data())
def test_the_variance_is_that_of_every_blind_relabelling(values: list[float], data: st.DataObject) -> None:
    import itertools

    k = len(values)
    ancestors = torch.tensor([data.draw(st.lists(st.integers(0, k - 1), min_size=1, max_size=5))])
    scores = torch.tensor([values], dtype=torch.float64)
    every = torch.stack([selected(scores[:, list(p)], ancestors).gains for p in itertools.permutations(range(k))])
    assert float(every.mean()) == pytest.approx(0, abs=1e-9)
    wanted = float(every.square().mean())
    assert float(selected(scores, ancestors).variances) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_what_is_no_number_is_left_out() -> None:
    scores = torch.tensor([[1.0, math.nan], [0.0, 1.0]])
    one = selected(scores, torch.tensor([[0], [1]]))
    assert one.gains.tolist() == [0.0, 0.5] and one.variances[0] == 0 and one.score == pytest.approx(0.5 / math.sqrt(0.5 / 2))


def test_it_warns_of_a_fall_beyond_blind_choice_and_of_nothing_else() -> None:
    def by(gain: float, variance: float = 1.0) -> Selected:
        return Selected(torch.tensor([gain], dtype=torch.float64), torch.tensor([variance], dtype=torch.float64))

    with pytest.warns(DriftWarning, match="1 higher by the reward that steers, and 3 lower by the held-out judge"):
        warn_of_drift(by(1.0), {"judge": by(-3.0)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_drift(by(1.0), {"judge": by(-1.5)})  # may be chance
        warn_of_drift(by(1.0), {"judge": by(3.0)})
        warn_of_drift(by(-1.0), {"judge": by(-3.0)})


# --------------------------------------------------------------------------------------------------- in runs


def scores_of(out: Any, reward: Any) -> Tensor:
    return torch.stack([reward(x, None) for x in out.samples]).double()


@pytest.mark.parametrize(
    "sampler", [BestOfN(6), FeynmanKac(6, events=(0.3, 0.6), threshold=1.0), RandomSearch(6)], ids=lambda s: s.name
)
def test_they_are_told_of_every_particle_and_change_nothing(model: CallableModel, sampler: Any) -> None:
    options: dict[str, Any] = {"draft": False} if isinstance(sampler, RandomSearch) else {}
    alone = SteeredPipeline(model, sampler, first, **options)(["a", "b"], num_inference_steps=8, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        steered = SteeredPipeline(model, sampler, first, holdout={"up": other, "down": against}, **options)
        out = steered(["a", "b"], num_inference_steps=8, seed=1)
    assert torch.equal(out.samples, alone.samples) and torch.equal(out.rewards, alone.rewards)
    assert alone.held_out == {} and alone.selected is None and set(out.held_out) == {"up", "down"}
    kept = out.held_out["up"].scores.isfinite()
    torch.testing.assert_close(out.held_out["up"].scores[kept], scores_of(out, other)[kept])
    torch.testing.assert_close(out.held_out["down"].scores[kept], -out.rewards[kept])
    # what is lost by the opposite is what is gained
    assert out.selected is not None and out.selected.mean > 0
    torch.testing.assert_close(out.held_out["down"].selected.gains, -out.selected.gains)
    counted = {k: v for k, v in out.ledger.counts.items() if k != "held_out_calls"}
    assert counted == {k: v for k, v in alone.ledger.counts.items() if k != "held_out_calls"}
    said = steered.estimate(2, 8).held_out_calls
    assert out.ledger.held_out_calls == said > 0


def test_gains_of_particles_are_those_of_each_resampling_and_of_the_choice(model: CallableModel) -> None:
    sampler = FeynmanKac(8, events=(0.3, 0.6), threshold=1.0)
    out = SteeredPipeline(model, sampler, first, holdout=other)(["a"], num_inference_steps=8, seed=1)
    total = 0.0
    for info in out.trace.events:
        if bool(info.resampled.any()):
            total += float(info.rewards.gather(1, info.ancestors).mean() - info.rewards.mean())
    total += float(out.rewards[0, out.chosen[0]] - out.rewards.mean())
    assert out.selected is not None and float(out.selected.gains) == pytest.approx(total)


def test_a_run_warns_when_the_steered_reward_rises_and_the_held_out_falls(model: CallableModel) -> None:
    prompts = [str(i) for i in range(8)]
    with pytest.warns(DriftWarning, match="lower by the held-out against"):
        SteeredPipeline(model, BestOfN(4), first, holdout=against)(prompts, num_inference_steps=4, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        SteeredPipeline(model, BestOfN(4), first, holdout=first)(prompts, num_inference_steps=4, seed=1)
    told = [
        SteeredPipeline(model, BestOfN(4), first, holdout=other)(prompts, num_inference_steps=4, seed=s).held_out["other"]
        for s in range(60)
    ]
    blind = torch.tensor([t.selected.score for t in told])
    assert abs(float(blind.mean())) < 0.4 and 0.75 < float(blind.std()) < 1.3  # independent of the reward: a standard normal


def test_what_cannot_look_on_is_refused() -> None:
    with pytest.raises(DiffsteerError, match="two rewards are called first: give them names"):
        holdouts_of([first, first], "pixels")
    with pytest.raises(DiffsteerError, match="rank_ensemble only ranks"):
        holdouts_of(RankEnsemble([Brightness(), Sharpness()]), "pixels")
    assert list(holdouts_of({"a": first, "b": first}, "latents")) == ["a", "b"]
    pipe = load_pipeline("shapes")
    with pytest.raises(DiffsteerError, match="looks at latents"):
        SteeredPipeline(pipe, BestOfN(1), holdout=FunctionReward(first, "latents"))(CAPTIONS[:1], num_inference_steps=2, seed=0)


def test_pictures_are_decoded_once_for_all_and_plain_runs_look_on_too(tmp_path: Path) -> None:
    pipe = load_pipeline("shapes")
    sampler = FeynmanKac(2, events=(0.5,))
    alone = SteeredPipeline(pipe, sampler, ClipScore())(CAPTIONS, num_inference_steps=4, seed=0)
    steered = SteeredPipeline(pipe, sampler, ClipScore(), holdout=[SecondClip(), Compressibility()], chunk=3)
    out = steered(CAPTIONS, num_inference_steps=4, seed=0)
    assert out.ledger.decodes == alone.ledger.decodes and out.ledger.held_out_calls == 2 * alone.ledger.reward_calls
    assert steered.estimate(2, 4).held_out_calls == out.ledger.held_out_calls
    record = json.loads((out.save(tmp_path) / "run.json").read_text())
    assert set(record["held_out"]) == {"clip2", "compressibility"} and len(record["held_out"]["clip2"]["scores"]) == 2
    plain = SteeredPipeline(pipe, None, ClipScore(), holdout=SecondClip())(CAPTIONS, num_inference_steps=4, seed=0)
    assert plain.held_out["clip2"].scores.shape == (2, 1) and plain.ledger.held_out_calls == 2


# ----------------------------------------------------------------------------------------------- scales of z-scores


def test_scales_are_those_of_unguided_samples() -> None:
    pipe = load_pipeline("shapes")
    reward = ClipScore() + 0.5 * ZScore(Brightness()) + ZScore(2 * Sharpness() + ZScore(Brightness(), 0.1, 2.0))
    assert is_unscaled(reward) and not is_unscaled(ClipScore())
    made = calibrated(reward, pipe, CAPTIONS * 2, samples=3, seed=5, num_inference_steps=3)
    ids = ["calibration 0", "calibration 1"]
    steered = SteeredPipeline(pipe, BestOfN(3), Brightness())
    each = [steered([c], seed=5, ids=[i], num_inference_steps=3).rewards for c, i in zip(CAPTIONS, ids, strict=True)]
    plain = torch.cat(each)
    assert isinstance(made, WeightedSum) and is_unscaled(reward) and not is_unscaled(made)
    light = made.terms[1][1]
    assert isinstance(light, ZScore) and made.terms[1][0] == 0.5
    assert light.mean == pytest.approx(float(plain.mean()), rel=1e-5)
    assert light.std == pytest.approx(float(plain.var(1).mean().sqrt()), rel=1e-5)
    both = made.terms[2][1]
    assert isinstance(both, ZScore) and isinstance(both.reward, WeightedSum) and both.reward.terms[1][1].std == 2.0  # type: ignore[attr-defined]
    out = SteeredPipeline(pipe, BestOfN(3), made)(CAPTIONS, seed=5, ids=ids, num_inference_steps=3)
    assert out.rewards.isfinite().all()
    alone = SteeredPipeline(pipe, BestOfN(3), light)(CAPTIONS, seed=5, ids=ids, num_inference_steps=3)
    assert float(alone.rewards.mean()) == pytest.approx(0, abs=1e-4)
    assert float(alone.rewards.var(1).mean()) == pytest.approx(1, rel=1e-4)


def test_a_scale_that_was_not_measured_or_is_none(model: CallableModel) -> None:
    pipe = load_pipeline("shapes")
    with pytest.raises(DiffsteerError, match=r"z\(brightness\) has no scale yet"):
        SteeredPipeline(pipe, BestOfN(1), ZScore(Brightness()))(CAPTIONS[:1], num_inference_steps=2, seed=0)
    with pytest.raises(DiffsteerError, match="the same for all samples"):
        calibrated(ZScore(FunctionReward(lambda x, p: torch.zeros(len(x)))), model, ["a"], num_inference_steps=2)
    with pytest.raises(DiffsteerError, match="no number"):
        calibrated(ZScore(FunctionReward(lambda x, p: first(x, p) * math.nan)), model, ["a"], num_inference_steps=2)
    with pytest.raises(DiffsteerError, match="samples=1"):
        calibrated(ZScore(Brightness()), model, ["a"], samples=1)
    for wrong in ((1.0, None), (None, 1.0), (0.0, 0.0), (0.0, math.nan)):
        with pytest.raises(DiffsteerError, match="wanted both, std above 0"):
            ZScore(Brightness(), *wrong)
    with pytest.raises(DiffsteerError, match="ranks have one scale"):
        ZScore(RankEnsemble([Brightness(), Sharpness()]))


def test_scales_are_kept_for_the_same_settings(tmp_path: Path) -> None:
    calls = []

    def measure() -> Reward:
        calls.append(1)
        return Brightness() + ZScore(Sharpness(), 1.0, 2.0) + ZScore(Brightness(), 3.0, 4.0)

    asked = Brightness() + ZScore(Sharpness()) + ZScore(Brightness(), 3.0, 4.0)
    path = tmp_path / "scales.json"
    for hashed in ("a", "a", "b"):
        made = settled_scales(asked, path, hashed, measure)
        assert isinstance(made, WeightedSum) and [(r.mean, r.std) for _, r in made.terms if isinstance(r, ZScore)] == [
            (1, 2),
            (3, 4),
        ]
    assert len(calls) == 2
    path.write_text("[]")
    with pytest.raises(DiffsteerError, match="delete it to measure anew"):
        settled_scales(asked, path, "b", measure)
    assert settled_scales(Brightness(), tmp_path / "none.json", "a", measure).name == "brightness"
