"""A run in ComfyUI and one through `CallableModel` with the same denoiser, noise and seed are the same run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fakes import FakeHost, First, Patcher
from torch import Tensor

from diffsteer import SteeredPipeline
from diffsteer.callable import CallableModel
from diffsteer.comfy.noise import KeyedNoise
from diffsteer.comfy.sampling import sample
from diffsteer.comfy.steering import Steering
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.schedules import Karras

SHAPE, STEPS, WISHES, CFG = (4, 3, 3), 12, (0.3, -0.1), 2.5
METHODS: list[tuple[Any, dict[str, Any]]] = [
    (FeynmanKac, {"scale": 40.0, "target_ess": None, "events": (0.25, 0.5, 0.75)}),
    (FeynmanKac, {"events": "all", "resampling": "ssp", "eta": 0.7}),
    (FeynmanKac, {"potential": "max", "scale": 30.0, "target_ess": None, "trigger": "always"}),
    (BestOfN, {"eta": 0.5}),
    (BestOfN, {"eta": 0.0}),
]


def toy(path: str) -> tuple[Patcher, CallableModel, Tensor]:
    """A MODEL, the same network as a `CallableModel`, and the sigmas of its grid."""
    patcher = Patcher(path)
    network = patcher.model.diffusion_model

    def clean(x: Tensor, t: Tensor, conditions: list[Any]) -> Tensor:
        good, bad = (network(x, t, wish) for wish in WISHES)
        mixed: Tensor = bad + CFG * (good - bad)
        return mixed

    if path == "flow":
        return patcher, CallableModel(clean, "x0", "flow", SHAPE), torch.linspace(1, 0, STEPS + 1)
    ends = (10.0, 0.05)
    sigmas = torch.cat([Karras().ratios(STEPS, *ends), torch.zeros(1)]).float()
    return patcher, CallableModel(clean, "x0", "edm", SHAPE, sigmas=ends), sigmas


@pytest.mark.parametrize("path", ["edm", "flow"])
@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda v: str(v) if isinstance(v, dict) else v.name)
@pytest.mark.parametrize(("groups", "particles", "chunk"), [(1, 6, None), (2, 4, None), (2, 4, 3)])
@torch.inference_mode()
def test_same_ancestors_and_latents(
    path: str, method: Any, options: dict[str, Any], groups: int, particles: int, chunk: int | None
) -> None:
    patcher, model, sigmas = toy(path)
    steering = Steering(method, options, particles, First(), "any", chunk=chunk, host=FakeHost())
    latent = {"samples": torch.zeros(groups * particles, *SHAPE)}
    noise = KeyedNoise(7, particles).generate_noise(latent)
    latents, record = sample(FakeHost(), steering, patcher, (*WISHES, CFG), latent, noise, sigmas, 7)

    steered = SteeredPipeline(model, method(**options, particles=particles), First(), decoder="none")
    out = steered(["any"] * groups, num_inference_steps=STEPS, seed=7)
    assert len(record.trace.events) == len(out.trace.events)
    for mine, theirs in zip(record.trace.events, out.trace.events, strict=True):
        assert torch.equal(mine.ancestors, theirs.ancestors) and torch.equal(mine.resampled, theirs.resampled)
        torch.testing.assert_close(mine.rewards, theirs.rewards, rtol=1e-4, atol=1e-5)
    if method is FeynmanKac:
        assert any(bool(e.resampled.any()) for e in record.trace.events)
    torch.testing.assert_close(latents * 2, out.latents.flatten(0, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(record.log_weights, out.log_weights, rtol=1e-3, atol=1e-3)
    assert torch.equal(record.chosen, out.chosen)


@pytest.mark.parametrize("path", ["edm", "flow"])
def test_one_particle_is_the_plain_chain(path: str) -> None:
    patcher, _, sigmas = toy(path)
    latent = {"samples": torch.zeros(1, *SHAPE)}
    noise = KeyedNoise(3).generate_noise(latent)
    made = []
    for method, options in (METHODS[0], (BestOfN, {})):
        steering = Steering(method, options, 1, First(), host=FakeHost())
        made.append(sample(FakeHost(), steering, patcher, (*WISHES, CFG), latent, noise, sigmas, 3)[0])
    assert torch.equal(*made)
