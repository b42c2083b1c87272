"""Noises as NOISE objects: keyed ones, and the best ones of a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffsteer import rng
from diffsteer.comfy.steering import Record
from diffsteer.types import DiffsteerError


@dataclass(frozen=True)
class KeyedNoise:
    """Noise of which a row's does not depend on how many others there are: the same as in every other face of diffsteer.

    Args:
        particles: an image; 0 for the whole batch.
    """

    seed: int
    particles: int = 0

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Standard normal noise shaped as the latent (N, ...)."""
        samples = latent["samples"]
        numbers = latent.get("batch_index") or range(len(samples))  # of rows that were taken out of a batch
        keys: list[tuple[rng.Id, int]] = [divmod(n, self.particles) if self.particles else (0, n) for n in numbers]
        return rng.normal(self.seed, keys, 0, "start", samples.shape[1:])


@dataclass(frozen=True)
class FoundNoise:
    """The best noises of a search, the best first."""

    seed: int
    noises: Tensor
    record: Record

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """As many of them as the latent has rows.

        Raises:
            DiffsteerError: a latent of another size, or of more rows than were searched.
        """
        samples = latent["samples"]
        if samples.shape[1:] != self.noises.shape[1:] or len(samples) > len(self.noises):
            wanted, found = tuple(samples.shape), tuple(self.noises.shape)
            raise DiffsteerError(f"the noise search looked at {found}, which is no noise for a latent of {wanted}")
        return self.noises[: len(samples)].to(samples.dtype)


def keyed(seed: int, rows: int, particles: int, like: Tensor) -> Tensor:
    """Keyed first noises (rows, *shape of a row), on the CPU as ComfyUI has them."""
    keys: list[tuple[rng.Id, int]] = [divmod(row, particles) for row in range(rows)]
    return rng.normal(seed, keys, 0, "start", like.shape[1:])
