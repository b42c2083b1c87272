"""Conditions are encoded once a session: a pipeline's own `encode_prompt`, remembered row by row.

Pipelines agree on nothing but that name: arguments, order of results, masks and pooled vectors differ. So the pipeline goes on
calling it, with texts, in every segment; what it calls is this memory, which encodes each row of texts alone, once, and puts
results together for whatever rows a call has.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Results = Any  # a tensor, or a tuple of tensors, lists of tensors, and None


class Memory:
    """Stands in for `pipe.encode_prompt`.

    A row's result does not depend on the other rows, unless texts of different lengths get results of different lengths: then a
    call's rows are encoded as they stand, and that is remembered.

    Args:
        together: every row of the session, as lists of arguments: for encoders that mix rows, which then see them all, once.

    Attributes:
        calls: of the pipeline's own encoder.
    """

    def __init__(self, encode: Callable[..., Results], together: dict[str, list[Any]] | None = None) -> None:
        self.encode, self.together, self.calls = encode, together, 0
        self._signature = inspect.signature(encode)
        self._known: dict[Any, Results] = {}
        functools.update_wrapper(self, encode)

    def __call__(self, *args: Any, **kwargs: Any) -> Results:
        """As the pipeline's own."""
        bound = self._signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        prompt = given.get("prompt")
        if not isinstance(prompt, list) or any(isinstance(v, Tensor) for v in given.values()):
            return self._remembered(given)
        rows = len(prompt)
        if self.together is not None:
            all_rows = list(zip(*self.together.values(), strict=True))
            asked = [all_rows.index(row) for row in zip(*(given[name] for name in self.together), strict=True)]
            return _pick(self._remembered(given | self.together), asked, len(all_rows))
        single = [{k: _row(v, i, rows) if "prompt" in k else v for k, v in given.items()} for i in range(rows)]
        joined = _join([self._remembered(one) for one in single])
        return self._remembered(given) if joined is _UNEQUAL else joined

    def _remembered(self, given: dict[str, Any]) -> Results:
        key = tuple((k, _key(v)) for k, v in given.items())
        if key not in self._known:
            self.calls += 1
            bound = self._signature.bind_partial()
            bound.arguments.update({k: list(v) if isinstance(v, list) else v for k, v in given.items()})  # some write into them
            with torch.no_grad():
                self._known[key] = self.encode(*bound.args, **bound.kwargs)
        found = self._known[key]
        return [*found] if isinstance(found, list) else found


_UNEQUAL: Any = object()


def _row(value: Any, i: int, rows: int) -> Any:
    return [value[i]] if isinstance(value, (list, tuple)) and len(value) == rows else value


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in value.items())
    if isinstance(value, (torch.device, torch.dtype)):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else (type(value).__name__, id(value))


def _pick(results: Results, rows: list[int], count: int) -> Results:
    """Some rows of the results for all; guidance may have put several sets of all rows one after the other."""
    if isinstance(results, tuple):
        return tuple(_pick(r, rows, count) for r in results)
    if not isinstance(results, Tensor):
        return results
    sets = results.view(-1, count, *results.shape[1:])
    return sets[:, rows].flatten(0, 1)


def _join(results: list[Results]) -> Results:
    """One result of many rows from results of one row each."""
    first = results[0]
    if isinstance(first, tuple):
        parts = [_join([r[i] for r in results]) for i in range(len(first))]
        return _UNEQUAL if any(p is _UNEQUAL for p in parts) else tuple(parts)
    if any(r is None for r in results):
        return None if all(r is None for r in results) else _UNEQUAL
    if isinstance(first, list):
        return [item for r in results for item in r]
    if not isinstance(first, Tensor):
        return first
    if any(r.shape != first.shape for r in results):
        return _UNEQUAL
    if len(first) != 1:  # position ids, say: the same for all rows
        return first
    return torch.cat(results)
