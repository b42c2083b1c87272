"""Rows in blocks: as many at a time as were asked for, or as fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from diffsteer.types import DiffsteerError
from diffsteer.warn import warn

T = TypeVar("T")
Size = int | str | None  # rows in a block; "auto" halves when memory runs out; None is one block


def check_size(size: Size, deterministic: bool = False) -> None:
    """Refuse what is no size of a block.

    Raises:
        DiffsteerError: no positive number, "auto" or None; "auto" in a deterministic run.
    """
    if isinstance(size, str) and size != "auto" or isinstance(size, int) and size < 1:
        raise DiffsteerError(f'chunk={size}; a number of rows, at least 1, or "auto"')
    if size == "auto" and deterministic:
        raise DiffsteerError("chunk=auto cannot be deterministic, since memory decides what runs together: give a number")


def blocks(rows: int, size: int | None, pad: bool) -> list[list[int]]:
    """Row numbers in blocks of `size` (None: one block); with `pad` the last block repeats its last row up to full size."""
    size = rows if size is None else size
    parts = [list(range(i, min(i + size, rows))) for i in range(0, rows, size)]
    if pad and parts:
        parts[-1] += [parts[-1][-1]] * (size - len(parts[-1]))
    return parts


class Blocks:
    """How a run cuts its rows.

    Attributes:
        size: rows in a block, None for all; with `auto` halved, for good, whenever memory runs out, which is said once.
        pad: fill up the last block, so that all have one size.
    """

    def __init__(self, size: Size = None, pad: bool = False) -> None:
        check_size(size, pad)
        self.auto, self.pad = size == "auto", pad
        self.size = None if isinstance(size, str) else size
        self._said = False

    def run(self, rows: int, work: Callable[[list[int]], T]) -> list[T]:
        """What `work` returns for each block of row numbers, in order. With padding, whoever asked cuts the surplus off.

        Raises:
            torch.OutOfMemoryError: a single row does not fit, or the size is given.
        """
        done: list[T] = []
        at = 0
        while at < rows:
            block = [at + i for i in blocks(rows - at, self.size, self.pad)[0]]
            try:
                found = work(block)
            except torch.OutOfMemoryError:
                if not self.auto or len(block) == 1:
                    raise
                self.halve(len(block))
                continue
            done.append(found)
            at += len(set(block))
        return done

    def halve(self, rows: int) -> None:
        """So many rows at a time were too many."""
        self.size = (rows + 1) // 2
        if not self._said:
            warn(f"out of memory with {rows} rows at a time: going on with {self.size}")
            self._said = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
