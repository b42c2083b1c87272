"""Samplers, rewards and schedules by name: those that ship, and those of entry points (`diffsteer.samplers`,
`diffsteer.rewards`, `diffsteer.schedules`)."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points
from typing import Any

from diffsteer.types import DiffsteerError
from diffsteer.types import nearest as nearest

# The modules whose `__all__` ships; the group of entry points has the first one's name.
KINDS = {
    "sampler": ("diffsteer.samplers",),
    "reward": ("diffsteer.rewards",),
    "schedule": ("diffsteer.schedules", "diffsteer.measured"),
}


def registered(kind: str) -> dict[str, type[Any]]:
    """Every class of a kind ("sampler", "reward" or "schedule") by its name. What ships cannot be replaced by a plug-in of the
    same name.

    Raises:
        DiffsteerError: a plug-in that cannot be imported.
    """
    modules = [importlib.import_module(name) for name in KINDS[kind]]
    shipped: list[Any] = [cls for m in modules for cls in (getattr(m, name) for name in m.__all__) if inspect.isclass(cls)]
    found: dict[str, type[Any]] = {cls.name: cls for cls in shipped if isinstance(getattr(cls, "name", None), str)}
    for point in entry_points(group=KINDS[kind][0]):
        try:
            found.setdefault(point.name, point.load())
        except (ImportError, AttributeError) as error:
            raise DiffsteerError(f"the {kind} {point.name!r} cannot be imported from {point.value}: {error}") from error
    return found


def find(kind: str, name: str) -> type[Any]:
    """The class of that name.

    Raises:
        DiffsteerError: with the nearest name and all that are valid.
    """
    known = registered(kind)
    if name not in known:
        raise DiffsteerError(f"unknown {kind} {name!r}{nearest(name, known)}")
    return known[name]
