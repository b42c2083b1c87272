"""Gradient guidance as a GUIDER: classifier-free guidance whose clean estimates follow the gradient of a reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.blocks import Blocks
from diffsteer.comfy.host import HOST, Host
from diffsteer.comfy.session import levels_of, path_of
from diffsteer.comfy.steering import Memory, to_samples
from diffsteer.guidance import Guidance, Moments, Scale, gradient_of, update, warn_skipped
from diffsteer.reward import Reward, prepare
from diffsteer.types import Context, DiffsteerError


@dataclass
class Guided:
    """What guidance did in a run.

    Attributes:
        settings: what was set, in plain values.
        rewards: of the clean estimates at each guided step, (N,) by the step's number.
        skipped: updates that were left out, since their gradients were no numbers.
    """

    settings: dict[str, Any]
    rewards: dict[int, Tensor] = field(default_factory=dict)
    skipped: int = 0

    def __str__(self) -> str:
        said = [f"{key}: {value}" for key, value in self.settings.items()]
        steps = [f"step {k}: reward {', '.join(f'{float(r):.4g}' for r in row)}" for k, row in self.rewards.items()]
        return "\n".join([*said, "", *steps, f"{len(steps)} guided steps, {self.skipped} updates skipped"])


class Pull:
    """What a guider is pulled by, and what it did in its runs.

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
        if guidance.measures_pulls:
            raise DiffsteerError("ComfyUI mixes classifier-free guidance out of sight: take another normaliser than cfg")
        self.guidance, self.reward, self.prompt, self.vae, self.host = guidance, reward, prompt, vae, host
        self.cut = Blocks(chunk)
        self.run = Guided({})
        self.runs = Memory()
        self.moments: dict[str, Moments] = {}

    def begin(self, embedded: bool, seed: Any) -> None:
        """A run begins."""
        told = {"guidance": self.reward.name, "prompt": self.prompt, "seed": seed}
        self.run = Guided(told | dataclasses.asdict(self.guidance))
        self.moments = self.guidance.moments()
        prepare(self.reward, [self.prompt], Context(embedded=embedded))

    def rate(self, guider: Any, x0: Tensor, ctx: Context) -> Tensor:
        """Rewards (N,) of clean estimates, differentiable.

        Raises:
            DiffsteerError: the decoder had too little memory, and went on in a way that no gradient passes.
        """
        samples = x0
        if self.reward.input == "pixels":
            samples = to_samples(self.vae.decode(guider.inner_model.process_latent_out(x0.float())))
            if samples.is_inference() or not samples.requires_grad:
                raise DiffsteerError("the VAE went on in tiles for want of memory, and no gradient passes them: lower chunk")
        return self.reward.rate(samples, [self.prompt] * len(x0), ctx).float()


class PulledGuider:
    """What is added to ComfyUI's guider, see `pulled`."""

    pull: Pull

    def outer_sample(self, *args: Any, **kwargs: Any) -> Any:
        """A run: prepared before, reported after."""
        pull, patcher = self.pull, self.model_patcher  # type: ignore[attr-defined]
        pull.begin(bool(getattr(patcher.model, "diffsteer_embedded", False)), kwargs.get("seed", args[-1] if args else None))
        result = super().outer_sample(*args, **kwargs)  # type: ignore[misc]
        warn_skipped(pull.run.skipped)
        pull.runs.keep(result.float(), pull.run)
        return result

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
        """Clean estimates (N, ...), moved at the guided steps."""
        plain, pull, guidance = super().predict_noise, self.pull, self.pull.guidance  # type: ignore[misc]

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            found: Tensor = plain(x, timestep, model_options=model_options or {}, seed=seed)
            return found

        inner = self.inner_model  # type: ignore[attr-defined]
        step, sigmas = _step_of(timestep, model_options or {})
        levels = levels_of(path_of(inner.model_sampling), sigmas)
        at = levels[step]
        if not guidance.guides(step, at):
            return predict(x, timestep)
        ctx = Context(step, len(sigmas) - 1, bool(getattr(inner, "diffsteer_embedded", False)))
        share = guidance.shares(levels)[step]

        def from_clean(rows: list[int], x0: Tensor) -> tuple[Tensor, Tensor]:
            return gradient_of(lambda leaf: pull.rate(self, leaf, ctx), x0[rows])

        def through_network(rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
            clean: list[Tensor] = []
            with torch.inference_mode(False):
                at_rows = timestep[rows].clone()

            def objective(leaf: Tensor) -> Tensor:
                clean.append(predict(leaf, at_rows))
                return pull.rate(self, clean[0], ctx)

            pull.host.keep_loaded(self, x.shape)
            gradient, values = gradient_of(objective, x[rows])
            return clean[0].detach(), gradient, values

        def update_of(gradients: list[Tensor], rewards: list[Tensor], strength: float, network: bool) -> Tensor:
            values, gradient = torch.cat(rewards).float().to(x.device), torch.cat(gradients).to(x.device)
            alpha, sigma = at.like(x)
            noise = ((x - alpha * x0) / sigma).float().flatten(1).square().mean(1).sqrt()
            moments = pull.moments.get("network" if network else "clean")
            moved, skipped = update(
                guidance, gradient, Scale(at, noise, values, pull.reward.range[1]), share * strength, network, moments
            )
            pull.run.skipped += skipped
            pull.run.rewards[step] = values.cpu()
            return moved

        others = [getattr(patcher, "model", None) for patcher in getattr(self, "loaded_models", [])]  # of ControlNets
        networks = [inner, *others] if guidance.network > 0 else []
        networks += [pull.vae.first_stage_model] if pull.vae is not None else []
        with ordinary(*networks, getattr(inner, "latent_format", None)):
            moved = torch.zeros_like(x, dtype=torch.float32)
            if guidance.network > 0:
                found = pull.cut.run(len(x), through_network)
                x0 = torch.cat([f[0] for f in found])
                moved = moved + update_of([f[1] for f in found], [f[2] for f in found], guidance.network, True)
            else:
                x0 = predict(x, timestep)
            along = torch.zeros_like(moved)  # without what went through the network, as in the core
            for _ in range(guidance.iterations if guidance.clean > 0 else 0):
                parts = pull.cut.run(len(x), partial(from_clean, x0=x0 + along.to(x0)))
                along = along + update_of([p[0] for p in parts], [p[1] for p in parts], guidance.clean, False)
        pull.host.keep_loaded(self, x.shape)
        return x0 + (moved + along).to(x0)


def pulled(base: type[Any], model: Any, pull: Pull) -> Any:
    """A guider of ComfyUI's class for a MODEL, pulled by a reward."""
    guider = type("PulledGuider", (PulledGuider, base), {})(model)
    guider.pull = pull
    return guider


@contextmanager
def ordinary(*owners: Any) -> Iterator[None]:
    """Inside, the weights of modules, and the tensors that other objects hold, are ordinary tensors that share the memory of
    their own.

    ComfyUI loads everything in inference mode, and what is made there cannot be saved for a gradient, even by those who want
    none for it. Where weights are moved to another device in the meantime, the moved ones stay.
    """
    swapped: list[tuple[dict[str, Any], str, Any, int]] = []
    try:
        with torch.inference_mode(False):
            for held in (store for owner in owners for store in _stores(owner)):
                for name, tensor in held.items():
                    if type(tensor) in (Tensor, nn.Parameter) and (tensor.is_inference() or tensor.requires_grad):
                        held[name] = _alias(tensor)
                        swapped.append((held, name, tensor, tensor.data_ptr()))
        yield
    finally:
        for held, name, tensor, place in swapped:
            if held[name].data_ptr() == place and held[name].dtype == tensor.dtype:
                held[name] = tensor


def _stores(owner: Any) -> Iterator[dict[str, Any]]:
    """Where an object keeps its tensors."""
    if isinstance(owner, nn.Module):
        for module in owner.modules():
            yield module._parameters
            yield module._buffers
    elif owner is not None:
        yield vars(owner)


def _alias(tensor: Tensor) -> Tensor:
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias = empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias


def _step_of(timestep: Tensor, model_options: dict[str, Any]) -> tuple[int, Tensor]:
    """Which step this is, by its sigma, and the sigmas of the run; a solver's half steps count with the nearest."""
    now = timestep.flatten()[:1].float().cpu()
    sigmas = model_options.get("transformer_options", {}).get("sample_sigmas")
    if sigmas is None or len(sigmas) < 2:
        return 0, torch.cat([now, torch.zeros(1)])
    sigmas = sigmas.float().cpu()
    return int((sigmas[:-1] - now).abs().argmin()), sigmas
