"""Keyed randomness: every draw names what it is for, so batches, blocks of rows, processes and resumes do not change it.

A key is (seed, prompt id, slot, step, purpose). It is hashed to a fresh counter-based stream: no stream is shared, none
advances behind a caller's back, and a row draws the same numbers wherever it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

Id = int | str


def generator(seed: int, *key: Id) -> torch.Generator:
    """A CPU generator for a key; ``1`` and ``"1"`` are two keys.

    torch seeds it with 32 bits, enough for the few draws of a run that selects; noise comes from `normal`, with 128.
    """
    return torch.Generator("cpu").manual_seed(_hash(seed, *key) & (2**63 - 1))


def seed_of(generator: torch.Generator | Sequence[torch.Generator] | None) -> int:
    """The seed that a generator was set to (of a list: of all together); without one, a draw from torch's own stream."""
    if generator is None:
        return int(torch.randint(2**62, ()))
    if isinstance(generator, torch.Generator):
        return generator.initial_seed()
    return _hash(0, *(g.initial_seed() for g in generator)) & (2**62 - 1)


def normal(seed: int, rows: Sequence[tuple[Id, int]], step: int, purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of shape (N, *shape) in float32, one key (prompt id, slot) a row."""
    noise = np.empty((len(rows), *shape), dtype=np.float32)
    for i, (id, slot) in enumerate(rows):
        stream = np.random.Generator(np.random.Philox(key=_hash(seed, id, slot, step, purpose)))
        noise[i] = stream.standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(noise)


def _hash(seed: int, *key: Id) -> int:
    """128 bits of a key."""
    parts = tuple(k if isinstance(k, str) else int(k) for k in key)
    return int.from_bytes(blake2b(repr((int(seed), *parts)).encode(), digest_size=16).digest(), "little")
