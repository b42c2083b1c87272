"""Gradient guidance: closed forms, and out of ComfyUI's inference mode with weights that were made in it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fakes import VAE, FakeHost, First, Guider, Patcher, Red
from torch import Tensor, nn

from diffsteer.comfy.guider import Pull, ordinary, pulled
from diffsteer.guidance import Guidance
from diffsteer.reward import Reward
from diffsteer.rewards import Compressibility
from diffsteer.types import Context, DiffsteerError

SHAPE, STEPS = (4, 4, 4), 8


class Near(Reward):
    """Minus half the squared distance of the latents to a point."""

    name, input, differentiable = "near", "latents", True

    def __init__(self, point: float) -> None:
        self.point = point

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        return -0.5 * (samples - self.point).square().flatten(1).sum(1)


def strengths(path: str) -> Guidance:
    return Guidance(clean=0.5) if path == "clean" else Guidance(clean=0.0, network=0.5)


def guider_of(guidance: Guidance, reward: Any, path: str = "edm", vae: Any = None, chunk: int | None = None) -> Any:
    with torch.inference_mode():  # as a node runs
        guider = pulled(Guider, Patcher(path), Pull(guidance, reward, "any", vae, chunk, FakeHost()))
        guider.set_conds(0.4, -0.2)
        guider.set_cfg(3.0)
    return guider


def predict(guider: Any, x: Tensor, step: int) -> Tensor:
    """The moved clean estimates of one call at a step of the grid."""
    sigmas = torch.linspace(float(guider.model_patcher.model.model_sampling.sigma_max), 0, STEPS + 1)
    guider.inner_model = guider.model_patcher.model
    options = {"transformer_options": {"sample_sigmas": sigmas}}
    with torch.inference_mode():
        made: Tensor = guider.predict_noise(x.clone(), sigmas[step] * torch.ones(len(x)), options)
    return made


@pytest.mark.parametrize("path", ["edm", "flow"])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_quadratic_reward_pulls_straight_at_its_point(path: str, step: int) -> None:
    x = 3 * torch.randn(3, *SHAPE)
    plain = predict(guider_of(Guidance(clean=0.0), Near(2.0), path), x, step)
    moved = predict(guider_of(Guidance(clean=0.5), Near(2.0), path), x, step)
    sigma = (1 - step / STEPS) * (1.0 if path == "flow" else 10.0)
    alpha = 1 - sigma if path == "flow" else 1.0
    pull = 2.0 - plain  # the gradient at x0
    size = 0.5 * sigma / (alpha**2 + sigma**2) ** 0.5
    rms = pull.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(moved, plain + size * pull / rms, rtol=1e-5, atol=1e-5)


def test_through_the_network_the_gradient_is_autograd_s_own() -> None:
    x, step = 3 * torch.randn(2, *SHAPE), 4
    guider = guider_of(Guidance(clean=0.0, network=0.5), Red(), vae=VAE())
    moved = predict(guider, x, step)
    plain = predict(guider_of(Guidance(clean=0.0), Red(), vae=VAE()), x, step)

    network, vae = Patcher().model.diffusion_model, VAE()
    leaf, sigma = x.clone().requires_grad_(), torch.full((2,), 5.0)
    good, bad = (network(leaf, sigma, wish) for wish in (0.4, -0.2))
    reward = vae.decode((bad + 3.0 * (good - bad)) / 2)[..., 0].flatten(1).mean(1)
    (g,) = torch.autograd.grad(reward.sum(), leaf)
    size = 0.5 * 5.0 / (1 + 25.0) ** 0.5
    rms = g.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(moved, plain + size * g / rms, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guider.pull.run.rewards[step], reward.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("through", ["clean", "network"])
def test_rows_do_not_meet_and_blocks_change_nothing(through: str) -> None:
    x = 3 * torch.randn(5, *SHAPE)
    guidance = strengths(through)
    whole = predict(guider_of(guidance, Red(), vae=VAE()), x, 3)
    parts = predict(guider_of(guidance, Red(), vae=VAE(), chunk=2), x, 3)
    alone = torch.cat([predict(guider_of(guidance, Red(), vae=VAE()), row[None], 3) for row in x])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-6)


def test_only_guided_steps_decode_and_guidance_helps() -> None:
    rewards = {}
    for strength in (0.0, 0.4):
        vae, host = VAE(), FakeHost()
        guidance = Guidance(clean=strength, highest=0.89, every=2)
        guider = guider_of(guidance, Red(), vae=vae)
        guider.set_cfg(1.0)
        sigmas, noise = host.sigmas(guider.model_patcher, "simple", STEPS, 1.0), torch.randn(4, *SHAPE)

        def euler(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any) -> Tensor:
            for at, to in zip(sigmas[:-1], sigmas[1:], strict=True):
                clean = model(x, at * x.new_ones(len(x)), **extra_args)
                x = clean + to / at * (x - clean)
            return x

        with torch.inference_mode():
            torch.manual_seed(0)
            made = host.sample(guider, torch.randn_like(noise), torch.zeros(4, *SHAPE), host.sampler(euler), sigmas, None, 0)
        assert len(vae.decoded) == len(guider.pull.run.rewards) == (3 if strength else 0)  # steps 2, 4, 6 of 8
        with torch.no_grad():
            rewards[strength] = Red().score(vae.decode(made).movedim(-1, 1), [], Context())
    assert bool((rewards[0.4] > rewards[0.0]).all())


def test_gradients_that_are_no_numbers_are_skipped_counted_and_told() -> None:
    class Half(First):
        def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
            flat = samples.flatten(1).mean(1)
            return torch.cat([flat[:1], (flat[1:2] - flat[1:2]).sqrt(), flat[2:]])

    x = torch.randn(3, *SHAPE)
    plain = predict(guider_of(Guidance(clean=0.0), Half()), x, 3)
    guider = guider_of(Guidance(clean=0.5), Half())
    moved = predict(guider, x, 3)
    assert torch.equal(moved[1], plain[1]) and not torch.allclose(moved[0], plain[0])
    assert guider.pull.run.skipped == 1
    host = FakeHost()
    sigmas = torch.linspace(10, 0, 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with torch.inference_mode():
            one_step = host.sampler(lambda model, x, s, extra_args, **more: model(x, s[0] * x.new_ones(len(x)), **extra_args))
            guider.pull.guidance = Guidance(clean=0.5)
            host.sample(guider, torch.randn(3, *SHAPE), torch.zeros(3, *SHAPE), one_step, sigmas, None, 0)
    assert any("1 updates were skipped" in str(w.message) for w in said)


def test_the_report_is_of_the_run_that_made_the_latents() -> None:
    from diffsteer.comfy.parts import guidance_text

    host, guider = FakeHost(), guider_of(Guidance(clean=0.5), Red(), vae=VAE())
    one_step = host.sampler(lambda model, x, s, extra_args, **more: model(x, s[0] * x.new_ones(len(x)), **extra_args))
    made = []
    with torch.inference_mode():
        for seed in (3, 4):
            noise = torch.randn(2, *SHAPE)
            made.append(host.sample(guider, noise, torch.zeros(2, *SHAPE), one_step, torch.linspace(10, 0, 3), None, seed))
    first, second = (guidance_text({"samples": latents}, guider)[0] for latents in made)
    assert "seed: 3" in first and "seed: 4" in second and "clean: 0.5" in first and "1 guided steps, 0 updates" in first
    assert f"{float(guider.pull.run.rewards[0][0]):.4g}" in second
    for latents, other in ((made[0] + 1, guider), (made[0], Guider(Patcher()))):
        with pytest.raises(DiffsteerError, match="of no run of this guider"):
            guidance_text({"samples": latents}, other)


def test_rewards_are_prepared_outside_inference_mode_and_told_of_embedded_models() -> None:
    told = []

    class Told(Red):
        def prepare(self, prompts: Any, ctx: Context) -> None:
            told.append((torch.is_inference_mode_enabled(), ctx.embedded, list(prompts)))

    guider, host = guider_of(Guidance(), Told(), vae=VAE()), FakeHost()
    one_step = host.sampler(lambda model, x, s, extra_args, **more: x)
    for embedded in (False, True):
        guider.model_patcher.model.diffsteer_embedded = embedded
        with torch.inference_mode():
            host.sample(guider, torch.randn(1, *SHAPE), torch.zeros(1, *SHAPE), one_step, torch.linspace(10, 0, 3), None, 0)
    assert told == [(False, False, ["any"]), (False, True, ["any"])]


def test_a_decoder_that_lets_no_gradient_through_is_named() -> None:
    class Tiled(VAE):
        @torch.inference_mode()
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents)

    with pytest.raises(DiffsteerError, match="lower chunk"):
        predict(guider_of(Guidance(), Red(), vae=Tiled()), torch.randn(1, *SHAPE), 3)


def test_the_model_is_brought_back_after_each_decode() -> None:
    for through, wanted in (("clean", 1), ("network", 3)):  # through the network also before each block
        guider = guider_of(strengths(through), Red(), vae=VAE(), chunk=2)
        predict(guider, torch.randn(4, *SHAPE), 3)
        assert guider.pull.host.reloads == wanted


def test_weights_are_lent_not_copied_and_given_back() -> None:
    with torch.inference_mode():
        network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    before = [*network.parameters(), *network.buffers()]
    with pytest.raises(RuntimeError, match="Inference tensors"):
        gradient(network)
    with ordinary(network, None):
        inside = [*network.parameters(), *network.buffers()]
        assert not any(t.is_inference() or t.requires_grad for t in inside)
        assert [t.data_ptr() for t in inside] == [t.data_ptr() for t in before]
        assert gradient(network).shape == (2, 3)
    assert all(a is b for a, b in zip(before, [*network.parameters(), *network.buffers()], strict=True))
    with pytest.raises(ZeroDivisionError), ordinary(network):
        1 / 0  # noqa: B018
    assert network[0].weight is before[0]


def test_weights_that_were_moved_in_the_meantime_stay_where_they_are() -> None:
    """Decoding loads an autoencoder where it computes, with the aliases in place."""
    with torch.inference_mode():
        network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    with ordinary(network):
        network.to(torch.float64)  # as .to(device) would
    assert all(t.dtype == torch.float64 for t in network.parameters())
    assert network(torch.randn(2, 3).double()).dtype == torch.float64


def test_tensors_beside_modules_are_lent_too() -> None:
    class Format:
        def __init__(self) -> None:
            self.mean, self.name = torch.ones(4, 1, 1), "wan"

    with torch.inference_mode():
        kind = Format()
    before = kind.mean
    with ordinary(kind), torch.enable_grad():
        x = torch.randn(1, 4, 2, 2, requires_grad=True)
        assert torch.equal(torch.autograd.grad((x * kind.mean).sum(), x)[0], torch.ones_like(x))
    assert kind.mean is before


def gradient(network: nn.Module) -> Tensor:
    x = torch.randn(2, 3, requires_grad=True)
    return torch.autograd.grad(network(x).sum(), x)[0]


def test_refusals() -> None:
    with pytest.raises(DiffsteerError, match="the reward compressibility has no gradient"):
        Pull(Guidance(), Compressibility(), "any", VAE())
    with pytest.raises(DiffsteerError, match="connect a VAE"):
        Pull(Guidance(), Red(), "any")
    with pytest.raises(DiffsteerError, match="another normaliser than cfg"):
        Pull(Guidance(normaliser="cfg"), Red(), "any", VAE())
