"""The particle sampler: a method of the core as a sampler function of ComfyUI, and the records of its runs."""

from __future__ import annotations

from collections import deque
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
from diffsteer.run import SteeredOutput, run
from diffsteer.selection import choose
from diffsteer.types import DiffsteerError, Sampler, Trace

KEPT = 16  # runs that a sampler remembers
_POINTS = 256  # values of a row by which latents are known again


@dataclass(frozen=True)
class Record:
    """What a run leaves beside its latents.

    Attributes:
        settings: what made it, in plain values.
        rewards, log_weights: (P, K). chosen: (P,), the best. seed, ids: see `choose`.
    """

    settings: dict[str, Any]
    rewards: Tensor
    log_weights: Tensor
    chosen: Tensor
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
        records: of the last runs, each with points of its latents.
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
    records: deque[tuple[Tensor, Record]] = field(default_factory=lambda: deque(maxlen=KEPT))

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
        states, _ = self.run(model, x, sigmas, extra_args or {}, callback)
        return states

    def run(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[[dict[str, Any]], None] | None,
        watch: Callable[[SteeredOutput], None] | None = None,
    ) -> tuple[Tensor, Record]:
        """The states at the end, and the record."""
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
            decoder=self._decoder(model.inner_model),
            stop_if_interrupted=self.host.stop_if_interrupted,
        )
        session.makes = "sound" if getattr(self.vae, "latent_dim", 2) == 1 else ""
        out = run(session, sampler, self.reward)
        record = Record(
            settings=self.settings(sampler) | {"seed": session.seed, "steps": session.steps},
            rewards=out.rewards,
            log_weights=out.log_weights,
            chosen=out.chosen,
            seed=session.seed,
            ids=session.ids,
            trace=out.trace,
            ledger=out.ledger,
        )
        states = out.latents.flatten(0, 1)
        scaled = session.inner.model_sampling.inverse_noise_scaling(sigmas[-1], states)
        self.records.append((_points(session.inner.process_latent_out(scaled.float())), record))
        if watch is not None:
            watch(out)
        return states, record

    def record_of(self, latents: Tensor) -> Record:
        """The record of the run that made these latents (N, ...), as SamplerCustomAdvanced hands them on.

        Raises:
            DiffsteerError: they are of no run of this sampler that is remembered.
        """
        points = _points(latents)
        for known, record in reversed(self.records):
            if known.shape == points.shape and torch.allclose(known, points, rtol=1e-2, atol=1e-2, equal_nan=True):
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

    def _decoder(self, guider: Any) -> Callable[[Tensor], Tensor] | None:
        if self.reward is None or self.reward.input == "latents":
            return None
        if self.vae is None:
            raise DiffsteerError(f"the reward {self.reward.name} looks at {self.reward.input}: connect a VAE")

        def decode(states: Tensor) -> Tensor:
            self.host.stop_if_interrupted()
            samples = self.vae.decode(guider.inner_model.process_latent_out(states.float()))
            self.host.keep_loaded(guider)
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


def indexed(latent: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of a LATENT, with what it holds of each (masks, batch indices)."""
    count = len(latent["samples"])
    kept = dict(latent)
    for key, value in latent.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            kept[key] = value[list(rows)]
        elif isinstance(value, list) and len(value) == count:
            kept[key] = [value[r] for r in rows]
    return kept


def _points(latents: Tensor) -> Tensor:
    """Some values of each row, (N, n)."""
    flat = latents.flatten(1).detach().float().cpu()
    return flat[:, :: max(1, flat.shape[1] // _POINTS)].clone()
