"""Gradient guidance against closed forms: one step by hand, recurrences that keep the marginals, weights that know it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_closed_forms import ONE, STEPS, deviations, plain_law
from torch import Tensor

from diffsteer import SteeredPipeline, rng
from diffsteer.callable import CallableModel, CallableSession
from diffsteer.guidance import Guidance
from diffsteer.guided import GuidedWalk, again
from diffsteer.reward import FunctionReward, Reward
from diffsteer.samplers import DPS, LGD, MPGD, TFG, BestOfN, FeynmanKac, FreeDoM, UniversalGuidance
from diffsteer.toy import GaussianMixture
from diffsteer.types import DiffsteerError

PREDICTION = {"vp": "eps", "edm": "x0", "flow": "velocity"}
PATHS = list(PREDICTION)


def position(x: Tensor, prompts: object) -> Tensor:
    return x[:, 0]


def model(path: str, mixture: GaussianMixture = ONE) -> CallableModel:
    return mixture.model(path, PREDICTION[path])


def run(sampler: Any, path: str = "vp", groups: int = 2, reward: Any = position, steps: int = STEPS, **options: Any) -> Any:
    return SteeredPipeline(model(path), sampler, reward, **options)([""] * groups, num_inference_steps=steps, seed=0)


GUIDES = {
    "x0, a little": Guidance(clean=0.1, lowest=0.15),
    "x0, much": Guidance(clean=0.3, lowest=0.15, highest=0.95),
    "network": Guidance(clean=0.0, network=0.2, lowest=0.15),
    "both": Guidance(clean=0.1, network=0.1, iterations=2, smoothing=0.3, draws=2, schedule="decrease", lowest=0.15),
    "raw": Guidance(clean=0.1, normaliser="none", lowest=0.3, every=2),
    "adam": Guidance(clean=0.05, normaliser="adam", lowest=0.3),
}
SCALE = 1.0


def square(x: Tensor, prompts: object) -> Tensor:
    return -0.5 * (x[:, 0] - 1.0).square()


# Every guide on one path; on the others in the slow proofs.
QUICK = {"x0, a little": "vp", "x0, much": "flow", "network": "edm", "both": "vp", "raw": "flow", "adam": "edm"}
CASES = [pytest.param(n, p, marks=[] if QUICK[n] == p else pytest.mark.slow, id=f"{n}-{p}") for n in GUIDES for p in PATHS]


@pytest.mark.parametrize("name, path", CASES)
def test_weighted_particles_keep_their_target_whatever_guides_them(name: str, path: str) -> None:
    """The tilted law of the discretised chain is known: mean, variance and normaliser."""
    sampler = FeynmanKac(8, scale=SCALE, target_ess=None, events=(0.2, 0.4, 0.6, 0.8))
    groups = 400 if name == "both" else 1200
    out = run(sampler, path, groups, guide=GUIDES[name])
    assert out.ledger.reward_calls > groups * 8 * 5
    sds, _ = deviations(out, path)
    assert max(map(abs, sds)) < 4, sds
    loose = run(BestOfN(8), path, groups, guide=GUIDES[name])  # guided, and no weight that knows it
    mean, variance = plain_law(path)
    drift = (float(loose.samples.mean()) - mean) / math.sqrt(variance / (groups * 8))
    assert drift > 6


@pytest.mark.parametrize("name, path", [c for c in CASES if c.values[0] in ("x0, much", "network")])
def test_a_quadratic_reward_has_its_target_too(name: str, path: str) -> None:
    """N(m, v) tilted by exp(-(x - 1)^2 / 2) is Gaussian, with precision 1 / v + 1."""
    out = run(FeynmanKac(8, scale=1.0, target_ess=None, events=(0.3, 0.6)), path, 1500, square, guide=GUIDES[name])
    mean, variance = plain_law(path)
    tilted = (mean / variance + 1.0) / (1 / variance + 1.0)
    z = (out.log_z - out.log_z.max()).exp()
    inside = (out.log_weights.exp() * out.samples[..., 0].double()).sum(1)
    estimate = float((z * inside).sum() / z.sum())
    error = float((z * (inside - estimate)).square().sum().sqrt() / z.sum())
    assert abs(estimate - tilted) < 4 * error, (estimate, tilted, error)
    exact = math.exp(-0.5 * (mean - 1) ** 2 / (1 + variance)) / math.sqrt(1 + variance)
    found, spread = float(out.log_z.exp().mean()), float(out.log_z.exp().std() / 1500**0.5)
    assert abs(found - exact) < 4 * spread, (found, exact, spread)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [0, 5, STEPS - 1])
def test_one_step_by_hand(path: str, k: int) -> None:
    """A Gaussian's clean estimate is linear, so the gradient through it is known."""
    session = CallableSession(model(path), [""], particles=5, seed=0, num_inference_steps=STEPS)
    at, to = session.levels[k], session.levels[k + 1]
    x = torch.randn(5, 1, dtype=torch.float32) * float(at.sigma)
    alpha, sigma = float(at.alpha), float(at.sigma)
    gain = alpha * 0.64 / (alpha**2 * 0.64 + sigma**2)  # of ONE, whose standard deviation is 0.8
    plain = session.segment(x, k, k + 1)
    for guidance, moved in (
        (Guidance(clean=0.5, normaliser="none"), 0.5),
        (Guidance(clean=0.0, network=0.5, normaliser="none"), 0.5 * gain / max(alpha, 0.02)),
        (Guidance(clean=0.5, normaliser="none", iterations=3), 1.5),
        (Guidance(clean=0.5), 0.5 * sigma / math.hypot(alpha, sigma)),
    ):
        arrival, _ = GuidedWalk(session, guidance, FunctionReward(position, "latents"), [""])._step(x, k)
        torch.testing.assert_close(arrival.x0, plain.x0 + moved, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(arrival.x, plain.x + float(to.alpha) * moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [2, 6])
def test_both_paths_and_smoothing_by_hand(path: str, k: int) -> None:
    """A quadratic reward -(x0 - 1)^2 / 2 smoothed by n: log mean exp of -(x0 + s z - 1)^2 / 2, whose gradient is the mean of
    1 - x0 - s z weighted by its exponential; the gradient at x0 does not know of what went through the network."""
    session = CallableSession(model(path), [""], particles=5, seed=0, num_inference_steps=STEPS)
    at = session.levels[k]
    alpha, sigma = float(at.alpha), float(at.sigma)
    gain = alpha * 0.64 / (alpha**2 * 0.64 + sigma**2)
    x = torch.randn(5, 1) * float(at.sigma)
    x0 = session.segment(x, k, k + 1).x0
    reward = FunctionReward(square, "latents")
    rows = {"normaliser": "none", "clean": 0.3, "network": 0.2, "iterations": 2, "draws": 4, "smoothing": 0.5}
    walk = GuidedWalk(session, Guidance(**rows), reward, [""])  # type: ignore[arg-type]
    keys, size = [session.key(r) for r in range(5)], 0.5 * sigma / math.hypot(alpha, sigma)
    z = torch.stack([rng.normal(session.seed, keys, k, f"smooth {j}", session.shape) for j in range(4)])

    def gradient(clean: Tensor) -> Tensor:
        left = 1 - clean - size * z
        return ((-0.5 * left.square()).softmax(0) * left).sum(0)

    through = 0.2 * gain * gradient(x0) / max(alpha, 0.02)
    along = 0.3 * gradient(x0)
    along = along + 0.3 * gradient(x0 + along)
    torch.testing.assert_close(walk._moved(x, k)[1], through + along, rtol=1e-3, atol=1e-4)


def test_an_interval_without_a_step_is_said() -> None:
    with pytest.warns(UserWarning, match="nothing was guided: none of the 10 steps") as said:
        run(MPGD(lowest=0.501, highest=0.502), steps=10)
    assert {w.filename for w in said} == {__file__}


def test_only_each_so_many_steps() -> None:
    all_of_them, half = (run(MPGD(lowest=0.0, every=e)).ledger.reward_calls for e in (1, 2))
    assert (half - 2) * 2 == all_of_them - 2


@pytest.mark.parametrize("path", PATHS)
def test_noise_added_again_keeps_the_marginals(path: str) -> None:
    """States of N(m, s^2) at one level, taken back, are those of the level before."""
    levels = model(path).grid(STEPS)[1]
    for at, to in zip(levels[:-1], levels[1:], strict=True):
        x0, eps, z = (torch.randn(200_000, dtype=torch.float64) for _ in range(3))
        x = float(to.alpha) * (0.3 + 0.8 * x0) + float(to.sigma) * eps
        back = again(x, at, to, z)
        mean, variance = float(at.alpha) * 0.3, float(at.alpha) ** 2 * 0.64 + float(at.sigma) ** 2
        assert abs(float(back.mean()) - mean) < 5 * math.sqrt(variance / 200_000)
        assert float(back.var()) == pytest.approx(variance, rel=0.02)


def test_recurrences_draw_noise_of_their_own() -> None:
    """With a strength of next to nothing, steps that are taken again give another chain with the same law, on a fine grid."""
    next_to_nothing = TFG(4, network=0.0, clean=1e-9, smoothing=0.0, draws=1)
    once = run(next_to_nothing, groups=300, steps=60)
    twice = run(replace(next_to_nothing, recurrence=3), groups=300, steps=60)
    plain = run(BestOfN(4), groups=300, steps=60)
    torch.testing.assert_close(once.samples, plain.samples, rtol=0, atol=1e-5)
    assert not torch.allclose(twice.samples, plain.samples, atol=0.1)
    for out in (once, twice):
        assert float(out.samples.mean()) == pytest.approx(float(plain.samples.mean()), abs=0.08)
        assert float(out.samples.std()) == pytest.approx(float(plain.samples.std()), rel=0.08)


METHODS = [
    MPGD(strength=0.3),
    DPS(strength=0.5, normaliser="unit"),
    LGD(strength=0.3, draws=3),
    TFG(network=0.1, clean=0.1),
    UniversalGuidance(),
    FreeDoM(strength=0.3, normaliser="uncertainty"),
]


@pytest.mark.parametrize("sampler", METHODS, ids=lambda s: s.name)
@pytest.mark.parametrize("path", ["vp", "flow"])
def test_every_method_raises_the_reward_and_rows_do_not_meet(sampler: Any, path: str) -> None:
    two = GaussianMixture([-1.0, 0.8], [0.35, 0.5])

    def go(groups: int, chosen: Any) -> Tensor:
        pipe = SteeredPipeline(model(path, two), chosen, position)
        return pipe([""] * groups, num_inference_steps=STEPS, seed=0).samples

    guided, plain = go(200, sampler), go(200, BestOfN(1))
    assert float((guided - plain).mean()) > 0.02
    torch.testing.assert_close(go(3, sampler), guided[:3], rtol=1e-4, atol=1e-5)  # what else is in the batch changes nothing


class Flat(Reward):
    name, input = "flat", "latents"


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: run(MPGD(), reward=lambda x, p: torch.zeros(len(x))), "this one has none"),
        (lambda: run(BestOfN(2), guide="mpgd"), "guide is a Guidance"),
        (lambda: run(MPGD(), guide=MPGD()), "methods that guide stand alone"),
        (lambda: run(FeynmanKac(2), guide=UniversalGuidance()), "recurrence goes with no weighted particles"),
        (lambda: run(DPS(), reward=lambda x, p: 1 + x[:, 0].square()), "wants minus a squared distance"),
        (lambda: run(MPGD(), reward=Flat() + position), "and flat has none"),
        (lambda: run(FreeDoM()), "normaliser=cfg wants a pipeline under classifier-free guidance"),
        (lambda: MPGD(strength=-1.0), "mpgd: strength=-1; it must be at least 0"),
        (lambda: DPS(particles=0), "dps: particles=0"),
        (lambda: SteeredPipeline(model("vp"), MPGD()), "selects by a reward"),
    ],
)
def test_refusals(build: Any, said: str) -> None:
    with pytest.raises(DiffsteerError, match=said):
        build()


def test_a_skipped_update_is_said_and_counted() -> None:
    def broken(x: Tensor, prompts: list[str]) -> Tensor:
        bad = torch.tensor([p == "b" for p in prompts])
        return torch.where(bad, x[:, 0], x[:, 0] * 1.0) + torch.where(bad, (x[:, 0] * 0).sqrt(), torch.zeros(len(x)))

    pipe = SteeredPipeline(model("vp"), MPGD(2, lowest=0.0), broken)
    with pytest.warns(UserWarning, match=f"{2 * 2 * STEPS} updates were skipped"):
        out = pipe(["b", "b"], num_inference_steps=STEPS, seed=0)
    assert out.ledger.skipped == 2 * 2 * STEPS and "skipped" in str(out.ledger)
    plain = SteeredPipeline(model("vp"), BestOfN(2), position)(["b", "b"], num_inference_steps=STEPS, seed=0)
    torch.testing.assert_close(out.samples, plain.samples)
