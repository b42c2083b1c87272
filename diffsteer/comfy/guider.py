"""Gradient guidance as a GUIDER: classifier-free guidance whose clean estimates follow the gradient of a reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.algebra import level
from diffsteer.blocks import Blocks
from diffsteer.comfy.host import HOST, Host
from diffsteer.comfy.session import path_of
from diffsteer.comfy.steering import Memory, to_samples
from diffsteer.guidance import Guidance, gradient_of, warn_skipped
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
        self.guidance, self.reward, self.prompt, self.vae, self.host = guidance, reward, prompt, vae, host
        self.cut = Blocks(chunk)
        self.run = Guided({})
        self.runs = Memory()

    def begin(self, embedded: bool, seed: Any) -> None:
        """A run begins."""
        told = {"guidance": self.reward.name, "prompt": self.prompt, "seed": seed}
        self.run = Guided(told | dataclasses.asdict(self.guidance))
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

        step, steps = _step_of(timestep, model_options or {})
        if not guidance.guides(step, steps):
            return predict(x, timestep)
        inner = self.inner_model  # type: ignore[attr-defined]
        ctx = Context(step, steps, bool(getattr(inner, "diffsteer_embedded", False)))
        sigma = timestep.flatten()[0].cpu().double()
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

            pull.host.keep_loaded(self, x.shape)
            gradient, values = gradient_of(objective, x[rows])
            return clean[0].detach(), gradient, values

        others = [getattr(patcher, "model", None) for patcher in getattr(self, "loaded_models", [])]  # of ControlNets
        networks = [inner, *others] if through else []
        networks += [pull.vae.first_stage_model] if pull.vae is not None else []
        with ordinary(*networks, getattr(inner, "latent_format", None)):
            parts = pull.cut.run(len(x), one_block)
        pull.host.keep_loaded(self, x.shape)
        moved, skipped = guidance.move(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]).to(x.device), at)
        pull.run.skipped += skipped
        pull.run.rewards[step] = torch.cat([p[2] for p in parts]).float().cpu()
        return moved


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


def _step_of(timestep: Tensor, model_options: dict[str, Any]) -> tuple[int, int]:
    """Which step of how many this is, by its sigma; a solver's half steps count with the nearest."""
    sigmas = model_options.get("transformer_options", {}).get("sample_sigmas")
    if sigmas is None or len(sigmas) < 2:
        return 0, 1
    nearest = int((sigmas[:-1].float().cpu() - timestep.flatten()[0].float().cpu()).abs().argmin())
    return nearest, len(sigmas) - 1
