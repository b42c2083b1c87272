"""Weighted particles against exact laws of the discretised chain, and planted bugs that must be seen."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from cases import EARLY
from torch import Tensor

from diffsteer import SteeredPipeline
from diffsteer.callable import CallableSession
from diffsteer.resampling import SCHEMES
from diffsteer.run import SteeredOutput
from diffsteer.samplers import FeynmanKac
from diffsteer.samplers.feynman_kac import POTENTIALS, State
from diffsteer.toy import GaussianMixture, chain_law
from diffsteer.types import Info, Step

SCALE, STEPS = 1.0, 12
ONE = GaussianMixture([0.3], [0.8])
TWO = GaussianMixture([-1.0, 0.8], [0.35, 0.5], [0.6, 0.4])


def position(x: Tensor, prompts: object) -> Tensor:
    return x[:, 0]


def run(sampler: FeynmanKac, groups: int, mixture: GaussianMixture = ONE, path: str = "vp", seed: int = 0) -> SteeredOutput:
    prediction = {"vp": "eps", "edm": "x0", "flow": "velocity"}[path]
    return SteeredPipeline(mixture.model(path, prediction), sampler, position)(
        [""] * groups, num_inference_steps=STEPS, seed=seed
    )


def plain_law(path: str = "vp", eta: float = 1.0) -> tuple[float, float]:
    session = CallableSession(ONE.model(path, "x0"), [""], num_inference_steps=STEPS, particles=1, seed=0)
    return chain_law(ONE, session.levels, eta, float(session.levels[0].sigma))


def ratio(out: SteeredOutput, values: Tensor) -> tuple[float, float]:
    """sum_g Z_g f_g / sum_g Z_g with f_g the weighted mean of `values` (P, K) in a group, and its standard error."""
    z = (out.log_z - out.log_z.max()).exp()
    f = (out.log_weights.exp() * values).sum(1)
    estimate = (z * f).sum() / z.sum()
    return float(estimate), float((z * (f - estimate)).square().sum().sqrt() / z.sum())


def deviations(out: SteeredOutput, path: str = "vp", eta: float = 1.0, scale: float = SCALE) -> tuple[list[float], list[float]]:
    """Deviations from the exact law, in standard errors, of mean, second moment and E[Z]; and their relative errors."""
    mean, variance = plain_law(path, eta)
    tilted, x = mean + scale * variance, out.samples[..., 0].double()
    first, first_error = ratio(out, x)
    second, second_error = ratio(out, (x - tilted) ** 2)
    z, exact_z = out.log_z.exp(), math.exp(scale * mean + scale**2 * variance / 2)
    z_error = float(z.std() / len(z) ** 0.5)
    sds = [(first - tilted) / first_error, (second - variance) / second_error, (float(z.mean()) - exact_z) / z_error]
    return sds, [first_error / variance**0.5, second_error / variance, z_error / exact_z]


def fixed(potential: str = "difference", **options: object) -> FeynmanKac:
    return FeynmanKac(4, potential, **{"scale": gentle(potential), "target_ess": None, "events": EARLY, **options})  # type: ignore[arg-type]


def gentle(potential: str) -> float:
    """`sum` multiplies five rewards: a smaller lambda keeps its weights as even as the others'."""
    return 0.3 if potential == "sum" else SCALE


@pytest.mark.parametrize(
    ("potential", "resampling"), [("difference", "systematic"), ("max", "ssp"), ("sum", "residual"), ("immediate", "killing")]
)
def test_tilted_law_short(potential: str, resampling: str) -> None:
    sds, _ = deviations(run(fixed(potential, resampling=resampling), 1500), scale=gentle(potential))
    assert max(map(abs, sds)) < 4, sds


@pytest.mark.slow
@pytest.mark.parametrize("resampling", SCHEMES)
@pytest.mark.parametrize("potential", POTENTIALS)
def test_tilted_law(potential: str, resampling: str) -> None:
    sds, errors = deviations(run(fixed(potential, resampling=resampling), 18_000), scale=gentle(potential))
    assert max(map(abs, sds)) < 4, sds
    assert max(errors) < 0.01, errors


@pytest.mark.parametrize("path", ["edm", "flow"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_other_paths(path: str, eta: float) -> None:
    sds, _ = deviations(run(fixed(eta=eta), 1500, path=path), path, eta)
    assert max(map(abs, sds)) < 4, sds


@pytest.mark.parametrize("trigger", ["ess", "always"])
def test_normaliser_is_unbiased(trigger: str) -> None:
    sds, errors = deviations(run(fixed(trigger=trigger, events="all"), 2000, seed=1))
    assert abs(sds[2]) < 4 and errors[2] < 0.01, (sds, errors)


@functools.cache
def reference_chains(chains: int) -> Tensor:
    return run(FeynmanKac(1, scale=0.0, target_ess=None), chains, TWO, seed=5).samples[:, 0, 0].double()


def mixture_deviation(potential: str, resampling: str, groups: int, chains: int) -> tuple[float, float]:
    """On a mixture the chain is not linear: many independent chains, weighted at the end, are the reference.

    Returns the deviation of the tilted mean in standard errors, and the standard error relative to the tilted spread.
    """
    scale, reference = gentle(potential), reference_chains(chains)
    weights = (scale * reference).softmax(0)
    exact = float((weights * reference).sum())
    spread = float((weights * (reference - exact) ** 2).sum() ** 0.5)
    exact_error = float((weights * (reference - exact)).square().sum().sqrt())
    estimate, error = ratio(
        out := run(fixed(potential, resampling=resampling), groups, TWO, seed=6), out.samples[..., 0].double()
    )
    both = math.hypot(error, exact_error)
    return (estimate - exact) / both, both / spread


@pytest.mark.parametrize(
    ("potential", "resampling"), list(zip(POTENTIALS, ["ssp", "stratified", "systematic", "residual"], strict=True))
)
def test_mixture_agrees_with_importance_weights_short(potential: str, resampling: str) -> None:
    assert abs(mixture_deviation(potential, resampling, 1000, 10_000)[0]) < 4


@pytest.mark.slow
@pytest.mark.parametrize("resampling", SCHEMES)
@pytest.mark.parametrize("potential", POTENTIALS)
def test_mixture_agrees_with_importance_weights(potential: str, resampling: str) -> None:
    groups = 24_000 if potential == "immediate" else 12_000  # the noisiest, since its weights are corrected only at the end
    deviation, error = mixture_deviation(potential, resampling, groups, 40_000)
    assert abs(deviation) < 4 and error < 0.01, (deviation, error)


def test_many_particles_need_no_averaging() -> None:
    mean, variance = plain_law()
    out = run(FeynmanKac(4000, scale=SCALE, target_ess=None, events=EARLY), 1)
    estimate = float((out.log_weights.exp() * out.samples[..., 0]).sum())
    assert abs(estimate - mean - SCALE * variance) < 0.1
    assert abs(float(out.log_z) - SCALE * mean - SCALE**2 * variance / 2) < 0.1


# ------------------------------------------------------------------------------------------------- planted bugs


class DroppedWeights(FeynmanKac):
    """Weights forgotten at events without resampling, the reference implementation's adaptive mode."""

    def apply(self, state: State, step: Step) -> tuple[State, Info]:
        return super().apply(replace(state, log_weights=torch.zeros_like(state.log_weights) - math.log(self.particles)), step)


class WrongFinalCorrection(FeynmanKac):
    """The last potential is that of the running statistic instead of the final reward."""

    def apply(self, state: State, step: Step) -> tuple[State, Info]:
        update = POTENTIALS[self.potential]
        assert update is not None
        shown = replace(step, rewards=update(state.statistic, step.rewards)) if step.final else step
        return super().apply(state, shown)


class WeightsNotPermuted(FeynmanKac):
    """Accumulated potentials that do not follow the ancestors."""

    def apply(self, state: State, step: Step) -> tuple[State, Info]:
        after, info = super().apply(state, step)
        assert self.potential == "difference" and self.scale is not None
        return replace(after, log_potential=self.scale * info.rewards), info


@pytest.mark.parametrize(
    ("bug", "options"),
    [
        (DroppedWeights, {"events": "all", "threshold": 0.6}),
        (WrongFinalCorrection, {"potential": "max"}),
        (WrongFinalCorrection, {"potential": "sum"}),
        (WeightsNotPermuted, {"trigger": "always"}),
    ],
)
def test_planted_bugs_are_seen(bug: type[FeynmanKac], options: dict[str, object]) -> None:
    sds, _ = deviations(run(bug(4, scale=SCALE, target_ess=None, **options), 3000))  # type: ignore[arg-type]
    assert max(map(abs, sds)) > 8, sds
