"""What a solver that steps by itself remembers of its last steps, kept by row and level: any rows go on from any level."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffsteer.levels import cut_state, native_state
from diffsteer.types import UnsupportedError


class History:
    """The memory of a solver over one session.

    Attributes:
        of_rows, of_all: the solver's attributes that hold something of each row, and of all; empty where it remembers nothing,
            or our own transition steps.
    """

    def __init__(self, scheduler: Any, native: bool, ours: bool) -> None:
        self.name = type(scheduler).__name__
        self.of_rows: tuple[str, ...] = ()
        self.of_all: tuple[str, ...] = ()
        if native:
            self.of_rows, self.of_all = native_state(scheduler), ("lower_order_nums",)
        elif not ours:
            self.of_rows, self.of_all = cut_state(scheduler) or ((), ())
        self._rows: dict[tuple[int, int], list[Any]] = {}  # by row and index
        self._all: dict[int, dict[str, Any]] = {}  # by index

    def keep(self, scheduler: Any, rows: Sequence[int], index: int) -> None:
        """Note what it remembers at a level."""
        if self.of_rows:
            for i, row in enumerate(rows):
                self._rows[row, index] = [_sliced(getattr(scheduler, name), i) for name in self.of_rows]
            self._all[index] = {name: copy.copy(getattr(scheduler, name)) for name in self.of_all}

    def remind(self, scheduler: Any, rows: Sequence[int], index: int) -> None:
        """Tell it again what it knew of these rows at a level.

        Raises:
            UnsupportedError: a row that was not carried there.
        """
        if not self.of_rows:
            return
        for row in rows:
            if (row, index) not in self._rows:
                raise UnsupportedError(
                    f"{self.name} remembers its last steps, and row {row} was not carried to step {index} before"
                )
        for j, name in enumerate(self.of_rows):
            setattr(scheduler, name, _joined([self._rows[row, index][j] for row in rows]))
        for name, value in self._all[index].items():
            setattr(scheduler, name, copy.copy(value))

    def follow(self, ancestors: Tensor, index: int) -> None:
        """Rows, (P, K), have become copies of others at a level: so does what is kept of them. Earlier levels are forgotten."""
        before = {row: kept for (row, at), kept in self._rows.items() if at == index}
        particles = ancestors.shape[1]
        self._rows = {(row, index): kept for row, kept in before.items()}
        for p, chosen in enumerate(ancestors.tolist()):
            for k, ancestor in enumerate(chosen):
                if p * particles + ancestor in before:
                    self._rows[p * particles + k, index] = before[p * particles + ancestor]


def _sliced(value: Any, i: int) -> Any:
    """One row of a tensor, of a list of them, or of what is not there yet."""
    if isinstance(value, list):
        return [_sliced(v, i) for v in value]
    return None if value is None else value[i]


def _joined(values: list[Any]) -> Any:
    """Rows put together again."""
    if isinstance(values[0], list):
        return [_joined(list(column)) for column in zip(*values, strict=True)]
    return None if values[0] is None else torch.stack(values)
