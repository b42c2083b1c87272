"""Objects that behave as ComfyUI's do towards nodes, so that nodes are tested without it. What they imitate is held against the
real server by `make test-comfy`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.comfy.host import Host
from diffsteer.reward import Reward
from diffsteer.types import Context

SCALE = 2.0  # between what a model denoises and what its autoencoder decodes


class Interrupted(Exception):
    """The user has pressed Cancel."""


class EDM:
    """``x = x0 + sigma eps``."""

    sigma_max, sigma_min = 10.0, 0.05

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
        return noise * sigma + latent

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent


class CONST:
    """``x = (1 - sigma) x0 + sigma eps``; known by its name."""

    sigma_max, sigma_min = 1.0, 0.01

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
        return sigma * noise + (1 - sigma) * latent

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent / (1 - sigma)


class Network(nn.Module):
    """A clean estimate that depends on everything it is given: (N, ...), sigma (N,), a number -> (N, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor, sigma: Tensor, wish: float) -> Tensor:
        s = sigma.view(-1, *[1] * (x.ndim - 1))
        mixed = x + 0.3 * x.roll(1, -1)
        return torch.tanh(self.gain * mixed / (1 + s**2).sqrt() + wish)


class Base(nn.Module):
    """What a guider calls its inner model."""

    def __init__(self, path: str = "edm") -> None:
        super().__init__()
        self.model_sampling: Any = CONST() if path == "flow" else EDM()
        self.diffusion_model = Network()

    def process_latent_in(self, latent: Tensor) -> Tensor:
        return latent * SCALE

    def process_latent_out(self, latent: Tensor) -> Tensor:
        return latent / SCALE


class Patcher:
    """A MODEL."""

    def __init__(self, path: str = "edm") -> None:
        self.model = Base(path)

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)


class Guider:
    """Classifier-free guidance; a CONDITIONING is a number, or a dict with one and what it holds of each row."""

    def __init__(self, model_patcher: Patcher) -> None:
        self.model_patcher, self.cfg = model_patcher, 1.0

    def set_conds(self, positive: Any, negative: Any) -> None:
        self.given = {"positive": positive, "negative": negative}

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def __call__(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
        return self.predict_noise(x, timestep, model_options, seed)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
        wishes = [w if isinstance(w, float) else w["wish"] for w in (self.given["positive"], self.given["negative"])]
        network = self.inner_model.diffusion_model
        good, bad = network(torch.cat([x, x])[: len(x)], timestep, wishes[0]), network(x, timestep, wishes[1])
        mixed: Tensor = bad + self.cfg * (good - bad)
        return mixed

    def outer_sample(
        self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, mask: Any, callback: Any, seed: Any
    ) -> Tensor:
        self.inner_model = self.model_patcher.model
        self.conds = {k: [w] if isinstance(w, dict) else [] for k, w in self.given.items()}
        if bool(latent.any()):
            latent = self.inner_model.process_latent_in(latent)
        options = {"transformer_options": {"sample_sigmas": sigmas}}
        extra = {"model_options": options, "seed": seed, "denoise_mask": mask}
        samples = sampler.sample(self, sigmas, extra, callback, noise, latent)
        return self.inner_model.process_latent_out(samples.float())

    def sample(self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, **more: Any) -> Tensor:
        made: Tensor = self.outer_sample(
            noise, latent, sampler, sigmas, more.get("denoise_mask"), more.get("callback"), more.get("seed")
        )
        return made


class Inpainting:
    """What a sampler function calls the model: where a mask says so, the picture that is kept is put back."""

    def __init__(self, guider: Guider, noise: Tensor, latent_image: Tensor) -> None:
        self.inner_model, self.noise, self.latent_image = guider, noise, latent_image

    def __call__(
        self, x: Tensor, sigma: Tensor, denoise_mask: Any = None, model_options: Any = None, seed: Any = None
    ) -> Tensor:
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options, seed)
        kept = self.inner_model.inner_model.model_sampling.noise_scaling(sigma[0], self.noise, self.latent_image)
        x = x * denoise_mask + kept * (1 - denoise_mask)
        clean: Tensor = self.inner_model(x, sigma, model_options, seed)
        kept_too: Tensor = clean * denoise_mask + self.latent_image * (1 - denoise_mask)
        return kept_too


class Sampler:
    """A SAMPLER."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def sample(self, guider: Guider, sigmas: Tensor, extra: Any, callback: Any, noise: Tensor, latent: Tensor) -> Tensor:
        sampling = guider.inner_model.model_sampling
        x = sampling.noise_scaling(sigmas[0], noise, latent)
        told = None if callback is None else lambda d: callback(d["i"], d["denoised"], d["x"], len(sigmas) - 1)
        made = self.function(Inpainting(guider, noise, latent), x, sigmas, extra_args=extra, callback=told, disable=True)
        result: Tensor = sampling.inverse_noise_scaling(sigmas[-1], made)
        return result


class VAE:
    """Decodes (N, 4, h, w) to images (N, 2h, 2w, 3) in [0, 1], differentiably, and counts."""

    latent_dim = 2

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first_stage_model = nn.Conv2d(4, 3, 1)
        self.decoded: list[int] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(len(latents))
        pixels = nn.functional.interpolate(self.first_stage_model(latents), scale_factor=2.0)
        return torch.sigmoid(pixels).movedim(1, -1)


class FakeHost(Host):
    """Counts what nodes ask for. `stop_at`: the user presses Cancel at that question."""

    def __init__(self, folder: Path | None = None, stop_at: int | None = None) -> None:
        self.asked = self.reloads = 0
        self.folder, self.stop_at = folder, stop_at
        self.seen: list[tuple[int, Tensor]] = []  # of progress: step, clean estimates

    def stop_if_interrupted(self) -> None:
        self.asked += 1
        if self.asked == self.stop_at:
            raise Interrupted

    def keep_loaded(self, guider: Any, shape: Sequence[int]) -> None:
        self.reloads += 1

    def sampler(self, function: Callable[..., Tensor]) -> Any:
        return Sampler(function)

    def scheduler_names(self) -> Sequence[str]:
        return ["simple", "karras"]

    def sigmas(self, model: Any, scheduler: str, steps: int, denoise: float) -> Tensor:
        whole = int(steps / denoise)
        return torch.linspace(float(model.model.model_sampling.sigma_max), 0, whole + 1)[-(steps + 1) :]

    def guider_class(self) -> type[Any]:
        return Guider

    def fix_latent(self, model: Any, samples: Tensor) -> Tensor:
        return samples

    def sample(self, guider: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, mask: Any, seed: int) -> Tensor:
        def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            self.seen.append((step, x0))

        made: Tensor = guider.sample(noise, latent, sampler, sigmas, denoise_mask=mask, callback=callback, seed=seed)
        return made

    def output_folder(self, prefix: str, width: int, height: int) -> tuple[str, str, int, str]:
        assert self.folder is not None
        inside, name = prefix.rsplit("/", 1)
        (self.folder / inside).mkdir(parents=True, exist_ok=True)
        return str(self.folder / inside), name, 1, inside

    def metadata(self) -> bool:
        return True


class Red(Reward):
    """How red an image is, or, of latents, their first channel."""

    name = "red"
    differentiable = True
    range = (0.0, 1.0)

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        return samples[:, 0].flatten(1).mean(1)


class First(Red):
    name = "first"
    input = "latents"
