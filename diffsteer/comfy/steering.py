"""The particle sampler: a method of the core as a sampler function of ComfyUI, and the records of its runs."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffsteer.blocks import Size
from diffsteer.comfy import fields
from diffsteer.comfy.host import HOST, Host
from diffsteer.comfy.session import ComfySession
from diffsteer.ledger import Ledger
from diffsteer.reward import Reward
from diffsteer.run import run
from diffsteer.selection import choose
from diffsteer.types import DiffsteerError, Sampler, Trace

KEPT = 1024  # runs that a sampler remembers


@dataclass(frozen=True)
class Record:
    """What a run leaves beside its latents.

    Attributes:
        settings: what made it, in plain values.
        rewards, log_weights: (P, K). chosen: (P,), the best. seed, ids: see `choose`.
        origin: (N,), which row of the latent batch each particle descends from.
    """

    settings: dict[str, Any]
    rewards: Tensor
    log_weights: Tensor
    chosen: Tensor
    origin: Tensor
    seed: int
    ids: tuple[int | str, ...]
    trace: Trace
    ledger: Ledger

    def rows(self, output: str) -> list[int]:
        """The rows of the batch that are chosen: "best" or "draw", one an image; "all", from the best to the worst of each."""
        particles = self.rewards.shape[1]
        first = [p * particles for p in range(len(self.rewards))]
        if output == "all":
            order = self.rewards.nan_to_num(nan=float("-inf")).argsort(dim=1, descending=True, stable=True)
            return [f + k for f, row in zip(first, order.tolist(), strict=True) for k in row]
        picked = self.chosen if output == "best" else choose(output, self.rewards, self.log_weights, self.seed, self.ids)
        return [f + k for f, k in zip(first, picked.tolist(), strict=True)]


@dataclass(frozen=True)
class Steering:
    """A method with everything that it steers by, as a sampler function.

    Attributes:
        method: a class of the registry. options: its fields, but for `particles`.
        particles: an image; 0 for the whole latent batch.
        prompt: what the reward is told.
        vae: what decodes for rewards that look at pixels.
        noise, chunk: as for `SteeredPipeline`.
        records: of the last runs, by their latents.
    """

    method: type[Any]
    options: dict[str, Any]
    particles: int = 0
    reward: Reward | None = None
    prompt: str = ""
    vae: Any = None
    noise: str = "eta"
    chunk: Size = None
    host: Host = HOST
    records: Memory = field(default_factory=lambda: Memory())

    def make(self, particles: int | None) -> Sampler:
        """The method with so many particles.

        Raises:
            DiffsteerError: a value out of its range, or no reward where the method selects by one.
        """
        sampler: Sampler = build(self.method, self.options, particles)
        if sampler.needs_reward and self.reward is None:
            raise DiffsteerError(f"the sampler {sampler.name} selects by a reward: connect one")
        return sampler

    def __call__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: Any = None,
    ) -> Tensor:
        """What ComfyUI calls: states (N, ...) at ``sigmas[0]`` -> states at ``sigmas[-1]``, all of them, in their places."""
        if len(sigmas) < 2:
            return x
        extra_args = extra_args or {}
        sampler = self.make(self.particles or len(x))
        session = ComfySession(
            model,
            x,
            sigmas,
            extra_args,
            callback,
            prompt=self.prompt,
            particles=sampler.particles,
            eta=sampler.eta,
            noise=self.noise,
            chunk=self.chunk,
            decoder=self._decoder(model.inner_model, x.shape),
            stop_if_interrupted=self.host.stop_if_interrupted,
        )
        session.makes = "sound" if getattr(self.vae, "latent_dim", 2) == 1 else ""
        out = run(session, sampler, self.reward)
        record = Record(
            settings=self.settings(sampler) | {"seed": session.seed, "steps": session.steps},
            rewards=out.rewards,
            log_weights=out.log_weights,
            chosen=out.chosen,
            origin=session.origin,
            seed=session.seed,
            ids=session.ids,
            trace=out.trace,
            ledger=out.ledger,
        )
        states = out.latents.flatten(0, 1)
        scaled = session.inner.model_sampling.inverse_noise_scaling(sigmas[-1], states)
        for handed_on in (scaled, session.clean):  # the two outputs of SamplerCustomAdvanced
            self.records.keep(session.inner.process_latent_out(handed_on.float()), record)
        return states

    def record_of(self, latents: Tensor) -> Record:
        """The record of the run that made these latents (N, ...), either output of SamplerCustomAdvanced.

        Raises:
            DiffsteerError: they are of no run of this sampler that is remembered.
        """
        record: Record | None = self.records.find(latents)
        if record is not None:
            return record
        raise DiffsteerError(
            "these latents are not what this steering's sampler made: connect the LATENT of the sampling node that its SAMPLER "
            "runs in, unchanged, and the steering of the same node"
        )

    def settings(self, sampler: Sampler) -> dict[str, Any]:
        """Everything that was set, in plain values."""
        return {
            "sampler": sampler.name,
            **self.options,
            "particles": sampler.particles,
            "noise": self.noise,
            "reward": None if self.reward is None else self.reward.name,
            "prompt": self.prompt,
        }

    def _decoder(self, guider: Any, shape: Sequence[int]) -> Callable[[Tensor], Tensor] | None:
        if self.reward is None or self.reward.input == "latents":
            return None
        if self.vae is None:
            raise DiffsteerError(f"the reward {self.reward.name} looks at {self.reward.input}: connect a VAE")

        def decode(states: Tensor) -> Tensor:
            self.host.stop_if_interrupted()
            samples = self.vae.decode(guider.inner_model.process_latent_out(states.float()))
            self.host.keep_loaded(guider, shape)
            return to_samples(samples)

        return decode


def build(method: type[Any], options: dict[str, Any], particles: int | None) -> Any:
    """A method with so many particles, where it can have any number (None: as many as it has by itself).

    Raises:
        DiffsteerError: it has another number, or a value is out of its range.
    """
    asked = {"particles": particles} if particles is not None and "particles" in fields.names(method) else {}
    made = method(**options, **asked)
    if particles not in (None, made.particles):
        raise DiffsteerError(f"the sampler {made.name} has {made.particles} particles, not {particles}")
    return made


def to_samples(decoded: Tensor) -> Tensor:
    """What a VAE of ComfyUI decodes, channels last, as the core has it: (N, 3, H, W), (N, F, 3, H, W) or (N, channels, T)."""
    return decoded.movedim(-1, 1 if decoded.ndim == 3 else -3)


def indexed(latent: dict[str, Any], rows: Sequence[int], origin: Sequence[int] | None = None) -> dict[str, Any]:
    """Some rows of a LATENT, with what it holds of each (masks, batch indices).

    Args:
        origin: which row of what it holds belongs to each row of its samples, where these have moved.
    """
    count = len(latent["samples"])
    held = list(rows) if origin is None else [int(origin[r]) for r in rows]
    kept = dict(latent)
    for key, value in latent.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            kept[key] = value[list(rows) if key == "samples" else held]
        elif isinstance(value, list) and len(value) == count:
            kept[key] = [value[r] for r in held]
    return kept


class Memory:
    """What runs left, found again by the latents that they made, in whichever number format these are handed on."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def keep(self, latents: Tensor, left: Any) -> None:
        """Keep what a run left beside its latents, in float32; the oldest is forgotten after `KEPT` others."""
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            self._kept[_digest(latents.to(dtype))] = left
            self._kept.move_to_end(_digest(latents.to(dtype)))
        while len(self._kept) > 3 * 2 * KEPT:
            self._kept.popitem(last=False)

    def find(self, latents: Tensor) -> Any:
        """What was kept beside these latents, or None."""
        return self._kept.get(_digest(latents))

    def __len__(self) -> int:
        return len(self._kept)


def _digest(latents: Tensor) -> str:
    plain = (latents.detach().cpu() + 0.0).contiguous()  # -0.0 is 0.0
    told = f"{plain.dtype} {tuple(plain.shape)}".encode()
    return hashlib.sha256(told + plain.view(torch.uint8).numpy().tobytes()).hexdigest()
