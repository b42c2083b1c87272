"""The fields of samplers, rewards and schedules as widgets, from what they say of themselves, and widgets' values back."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from diffsteer.comfy.node import Input
from diffsteer.types import DiffsteerError

NOT_SET = -1  # of a number that may be left out; all of ours are at least 0


def widgets(cls: type[Any], leave_out: tuple[str, ...] = ()) -> tuple[Input, ...]:
    """One widget a field of a dataclass, with its default, its choices or bounds (see `setting`) and its documentation."""
    if not dataclasses.is_dataclass(cls):
        return ()
    hints, told = get_type_hints(cls), arguments(cls)
    shown = [f for f in dataclasses.fields(cls) if f.init and f.name not in leave_out]
    return tuple(_widget(f, hints[f.name], told.get(f.name, "")) for f in shown)


def values(cls: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    """The values of widgets as the fields of `cls`, those that are no field left out.

    Raises:
        DiffsteerError: a text that is no value.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    hints = get_type_hints(cls)
    return {name: _value(fields[name], hints[name], value) for name, value in given.items() if name in fields}


def names(cls: type[Any]) -> tuple[str, ...]:
    """The fields that are widgets."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.init) if dataclasses.is_dataclass(cls) else ()


def shown(cls: type[Any], made: Any, name: str) -> Any:
    """The value of a widget for the field of an object."""
    field = {f.name: f for f in dataclasses.fields(cls)}[name]
    return _shown(getattr(made, name), _kind(field, get_type_hints(cls)[name]))


def arguments(cls: type[Any]) -> dict[str, str]:
    """What the section ``Args:`` of a docstring says of each argument."""
    lines, found, at, inside = (inspect.getdoc(cls) or "").splitlines(), {}, "", False
    for line in lines:
        if re.fullmatch(r"\w+:", line):
            inside = line == "Args:"
        elif inside and (said := re.match(r"    (\w[\w, ]*): (.*)", line)):
            at = said[1]
            found[at] = said[2]
        elif inside and at and line.startswith("     "):
            found[at] += f" {line.strip()}"
    return {name.strip(): text for names, text in found.items() for name in names.split(",")}


def summary(cls: type[Any]) -> str:
    """The paragraphs of a docstring before its sections, and what they cost, as one text."""
    paragraphs = [" ".join(p.split()) for p in (inspect.getdoc(cls) or "").split("\n\n")]
    return " ".join(p for p in paragraphs if not re.match(r"(Args|Raises|Attributes|Returns):", p))


def _kind(field: dataclasses.Field[Any], hint: Any) -> tuple[str, bool]:
    """The type of a field's widget, and may the field be None?"""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    plain = [p for p in parts if p is not type(None)]
    optional = len(plain) < len(parts)
    if field.metadata.get("choices"):
        return "COMBO", optional
    kind = {bool: "BOOLEAN", int: "INT", float: "FLOAT"}.get(plain[0], "TEXT") if len(plain) == 1 else "YAML"
    if optional and kind in ("INT", "FLOAT") and field.metadata.get("low", NOT_SET) < 0:
        kind = "YAML"  # there is no number that could stand for none
    return "YAML" if hint is Any else kind, optional


def _widget(field: dataclasses.Field[Any], hint: Any, tooltip: str) -> Input:
    kind, optional = _kind(field, hint)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = _shown(None if default is dataclasses.MISSING else default, (kind, optional))
    low, high = field.metadata.get("low"), field.metadata.get("high")
    options: dict[str, Any] = {}
    if kind in ("INT", "FLOAT"):
        floor = NOT_SET if optional else low
        options = {"min": floor if floor is not None else -(2**31), "max": high if high is not None else 2**31}
        options |= {"step": 0.01, "round": False} if kind == "FLOAT" else {}
        tooltip += f" ({NOT_SET}: not set)" if optional else ""
    elif kind == "TEXT" and optional:
        tooltip += " (empty: not set)"
    choices = tuple(str(c) for c in field.metadata.get("choices", ()))
    shown_as = "STRING" if kind in ("TEXT", "YAML") else kind
    return Input(field.name, shown_as, tooltip, value, options, choices)


def _shown(value: Any, kind: tuple[str, bool]) -> Any:
    if kind[0] in ("INT", "FLOAT"):
        return NOT_SET if value is None else value
    if kind[0] == "YAML":
        if isinstance(value, (list, tuple)):
            listed = ", ".join(str(v) for v in value)
            return listed if len(value) > 1 else f"[{listed}]"
        return "" if value is None else str(value)
    return "" if value is None else value


def _value(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    kind, optional = _kind(field, hint)
    if optional and (value == "" or (kind in ("INT", "FLOAT") and value == NOT_SET)):
        return None
    if kind != "YAML" or not isinstance(value, str):
        return value
    try:
        read = yaml.safe_load(f"[{value}]" if "," in value and not value.lstrip().startswith("[") else value)
    except yaml.YAMLError as error:
        raise DiffsteerError(f"{field.name}={value!r} cannot be read: wanted a value, or several with commas") from error
    return tuple(read) if isinstance(read, list) else read
