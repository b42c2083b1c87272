"""Gradient guidance as a GUIDER: classifier-free guidance whose clean estimates follow the gradient of a reward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.algebra import level
from diffsteer.blocks import Blocks
from diffsteer.comfy.host import HOST, Host
from diffsteer.comfy.session import path_of
from diffsteer.comfy.steering import to_samples
from diffsteer.guidance import Guidance, gradient_of, warn_skipped
from diffsteer.reward import Reward
from diffsteer.types import Context, DiffsteerError


class Pull:
    """What a guider is pulled by, and what it did in its last run.

    Args:
        vae, reward, prompt: as for the particle sampler; the reward must be differentiable.
        chunk: rows at a time in decoder, reward and, through the network, the network; None for all.

    Raises:
        DiffsteerError: a reward without a gradient.
    """

    def __init__(
        self, guidance: Guidance, reward: Reward, prompt: str, vae: Any = None, chunk: int | None = None, host: Host = HOST
    ) -> None:
        if not reward.differentiable:
            raise DiffsteerError(f"the reward {reward.name} has no gradient: use it with particles, or in the noise search")
        if reward.input == "pixels" and vae is None:
            raise DiffsteerError(f"the reward {reward.name} looks at {reward.input}: connect a VAE")
        self.guidance, self.reward, self.prompt, self.vae, self.host = guidance, reward, prompt, vae, host
        self.cut = Blocks(chunk)
        self.guided = self.skipped = 0
        self.rewards: list[Tensor] = []  # at every guided step, (N,)

    def begin(self, embedded: bool) -> None:
        """A run begins."""
        self.guided = self.skipped = 0
        self.rewards = []
        with torch.inference_mode(False):  # what is loaded here is to let gradients pass
            self.reward.prepare([self.prompt], Context(embedded=embedded))

    def rate(self, guider: Any, x0: Tensor, ctx: Context) -> Tensor:
        """Rewards (N,) of clean estimates, differentiable."""
        samples = x0
        if self.reward.input == "pixels":
            samples = to_samples(self.vae.decode(guider.inner_model.process_latent_out(x0.float())))
        return self.reward.rate(samples, [self.prompt] * len(x0), ctx).float()


class PulledGuider:
    """What is added to ComfyUI's guider, see `pulled`."""

    pull: Pull

    def outer_sample(self, *args: Any, **kwargs: Any) -> Any:
        """A run: prepared before, reported after."""
        pull = self.pull
        pull.begin(bool(getattr(self.model_patcher.model, "diffsteer_embedded", False)))  # type: ignore[attr-defined]
        result = super().outer_sample(*args, **kwargs)  # type: ignore[misc]
        warn_skipped(pull.skipped)
        return result

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
        """Clean estimates (N, ...), moved at the guided steps."""
        plain, pull, guidance = super().predict_noise, self.pull, self.pull.guidance  # type: ignore[misc]

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            found: Tensor = plain(x, timestep, model_options=model_options or {}, seed=seed)
            return found

        step, steps = _step_of(timestep, model_options or {})
        if not guidance.guides(step, steps):
            return predict(x, timestep)
        inner = self.inner_model  # type: ignore[attr-defined]
        ctx = Context(step, steps, bool(getattr(inner, "diffsteer_embedded", False)))
        sigma = timestep.flatten()[0].double().cpu()
        at = level(1 - sigma, sigma) if path_of(inner.model_sampling) == "flow" else level(1.0, sigma)
        through = guidance.through == "network"
        x0 = None if through else predict(x, timestep)

        def one_block(rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
            if x0 is not None:
                gradient, values = gradient_of(lambda leaf: pull.rate(self, leaf, ctx), x0[rows])
                return x0[rows], gradient, values
            clean: list[Tensor] = []
            with torch.inference_mode(False):
                at_rows = timestep[rows].clone()

            def objective(leaf: Tensor) -> Tensor:
                clean.append(predict(leaf, at_rows))
                return pull.rate(self, clean[0], ctx)

            gradient, values = gradient_of(objective, x[rows])
            return clean[0].detach(), gradient, values

        others = [getattr(patcher, "model", None) for patcher in getattr(self, "loaded_models", [])]  # of ControlNets
        networks = [inner, *others] if through else []
        networks += [pull.vae.first_stage_model] if pull.vae is not None else []
        with ordinary(*networks):
            parts = pull.cut.run(len(x), one_block)
        pull.host.keep_loaded(self)
        moved, skipped = guidance.move(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]).to(x.device), at)
        pull.guided += 1
        pull.skipped += skipped
        pull.rewards.append(torch.cat([p[2] for p in parts]).float().cpu())
        return moved


def pulled(base: type[Any], model: Any, pull: Pull) -> Any:
    """A guider of ComfyUI's class for a MODEL, pulled by a reward."""
    guider = type("PulledGuider", (PulledGuider, base), {})(model)
    guider.pull = pull
    return guider


@contextmanager
def ordinary(*modules: Any) -> Iterator[None]:
    """Inside, the weights of the modules are ordinary tensors that share the memory of their own.

    ComfyUI loads everything in inference mode, and what is made there cannot be saved for a gradient, even by those who want
    none for it.
    """
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    try:
        with torch.inference_mode(False):
            for sub in (s for module in modules if isinstance(module, nn.Module) for s in module.modules()):
                stores: list[dict[str, Any]] = [sub._parameters, sub._buffers]
                for held in stores:
                    for name, tensor in held.items():
                        if type(tensor) in (Tensor, nn.Parameter) and (tensor.is_inference() or tensor.requires_grad):
                            swapped.append((held, name, tensor))
                            held[name] = _alias(tensor)
        yield
    finally:
        for held_by, name, tensor in swapped:
            held_by[name] = tensor


def _alias(tensor: Tensor) -> Tensor:
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias = empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias


def _step_of(timestep: Tensor, model_options: dict[str, Any]) -> tuple[int, int]:
    """Which step of how many this is, by its sigma; a solver's half steps count with the nearest."""
    sigmas = model_options.get("transformer_options", {}).get("sample_sigmas")
    if sigmas is None or len(sigmas) < 2:
        return 0, 1
    nearest = int((sigmas[:-1].float().cpu() - timestep.flatten()[0].float().cpu()).abs().argmin())
    return nearest, len(sigmas) - 1
