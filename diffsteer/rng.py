"""Keyed randomness: every draw names what it is for, so batches, blocks of rows, processes and resumes do not change it.

A key is (seed, prompt id, slot, step, purpose). It is hashed to the seed of a fresh CPU generator: no stream is shared, none
advances behind a caller's back, and a row draws the same numbers wherever it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

Id = int | str


def generator(seed: int, *key: Id) -> torch.Generator:
    """A CPU generator for a key. Distinct keys (also ``1`` and ``"1"``) give independent streams."""
    digest = blake2b(repr((int(seed), *key)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(seed: int, rows: Sequence[tuple[Id, int]], step: int, purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of shape (N, *shape) in float32, one key (prompt id, slot) a row."""
    drawn = [torch.randn(*shape, generator=generator(seed, id, slot, step, purpose)) for id, slot in rows]
    return torch.stack(drawn) if drawn else torch.empty(0, *shape)
