"""Between what a parameter is searched: read from a text, and checked against the sampler's own fields."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from diffsteer.types import DiffsteerError, nearest


@dataclass(frozen=True)
class Range:
    """What a parameter is tried between, ends included: whole numbers alone, or on a logarithmic scale."""

    low: float
    high: float
    whole: bool = False
    log: bool = False


def numeric(cls: type[Any]) -> dict[str, bool]:
    """The fields of a sampler that take numbers, and whether those are whole."""
    hints = get_type_hints(cls)
    found = {}
    for f in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        hint = hints[f.name]
        kinds = set(get_args(hint)) if get_origin(hint) in (typing.Union, UnionType) else {hint}
        if f.init and kinds & {int, float}:
            found[f.name] = float not in kinds
    return found


def ranges_of(cls: type[Any], told: Mapping[str, Any], log: bool | None = None) -> dict[str, Range]:
    """The ranges that ``tune.parameters`` gives, checked against the sampler's own fields.

    Args:
        told: by field, [low, high] or a text such as "0.05..1.0" or "0.05..1.0 log" ("linear").
        log: for ranges without a word of their own; None for a logarithmic scale wherever the lower end is above 0.

    Raises:
        DiffsteerError: nothing told, a field that is none or takes no numbers, a range that is none or that the field's does
            not hold.
    """
    name, fields = getattr(cls, "name", cls.__name__), numeric(cls)
    if not told:
        offered = ", ".join(f for f in fields if f not in ("particles", "eta")) or "none but particles and eta"
        raise DiffsteerError(
            f"which parameters, and between what? Give tune.parameters.NAME=LOW..HIGH; the numbers of {name}: {offered}"
        )
    facts = {f.name: f.metadata for f in dataclasses.fields(cls)}
    found = {}
    for key, value in told.items():
        if key not in fields:
            what = "takes no numbers" if key in facts else "is unknown"
            raise DiffsteerError(f"tune.parameters.{key}: the field {what} in {name}{nearest(str(key), fields)}")
        found[key] = _range(f"tune.parameters.{key}={value}", value, fields[key], log)
        least, most = facts[key].get("low", -math.inf), facts[key].get("high", math.inf)
        if not least <= found[key].low < found[key].high <= most:
            inside = f"lie in [{least:g}, {most:g}]" if math.isfinite(most) else f"be at least {least:g}"
            bounds = f" and {inside}" if math.isfinite(least) or math.isfinite(most) else ""
            raise DiffsteerError(f"tune.parameters.{key}={value}; the ends must rise{bounds}")
    return found


def _range(shown: str, value: Any, whole: bool, log: bool | None) -> Range:
    wrong = DiffsteerError(f"{shown} is no range; wanted LOW..HIGH (then log or linear, if wanted) or [LOW, HIGH]")
    ends: list[Any]
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\S+?)\s*\.\.\s*(\S+?)(?:\s+(log|linear))?\s*", value)
        if match is None:
            raise wrong
        log = log if match[3] is None else match[3] == "log"
        ends = [match[1], match[2]]
    else:
        if not isinstance(value, Sequence) or len(value) != 2:
            raise wrong
        ends = list(value)
        if any(isinstance(end, bool) or not isinstance(end, (int, float)) for end in ends):
            raise wrong
    try:
        low, high = (float(end) for end in ends)
    except ValueError:
        raise wrong from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DiffsteerError(f"{shown}: the ends must be finite")
    if whole and not (low.is_integer() and high.is_integer()):
        raise DiffsteerError(f"{shown}: the ends must be whole numbers")
    if log and low <= 0:
        raise DiffsteerError(f"{shown}: a logarithmic scale begins above 0")
    return Range(low, high, whole, low > 0 if log is None else log)
