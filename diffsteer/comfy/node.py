"""What a node is, told once, and made into a class of ComfyUI's V3 schema or of its older V1 form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffsteer.types import DiffsteerError

CATEGORY = "diffsteer"
# Sockets of our own.
REWARD, STEERING, RUN = "DIFFSTEER_REWARD", "DIFFSTEER_STEERING", "DIFFSTEER_RUN"
_NUMBERS: dict[str, Any] = {"INT": int, "FLOAT": (int, float)}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
MOST = 2**64 - 1  # the largest seed of ComfyUI's widgets


@dataclass(frozen=True)
class Input:
    """An input: a widget (`WIDGETS`) or a socket of any other type.

    Attributes:
        options: of a widget: min, max, step, multiline, control_after_generate.
        choices: of a COMBO; a function where only ComfyUI knows them.
    """

    name: str
    type: str
    tooltip: str = ""
    default: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    choices: Sequence[str] | Callable[[], Sequence[str]] = ()
    optional: bool = False

    @property
    def is_widget(self) -> bool:
        return self.type in WIDGETS

    def listed(self) -> list[str]:
        """The choices of a COMBO."""
        return list(self.choices() if callable(self.choices) else self.choices)


@dataclass(frozen=True)
class Shown:
    """What an output node returns: its results, and what the canvas is to show."""

    ui: dict[str, Any]
    result: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        run: called with the inputs by name; returns one value an output (of an output node: a `Shown`, and it is also given
            `graph`, the graph in API form, and `extra`, what ComfyUI writes into files beside it).
        check: called before anything runs with the values of the widgets named in `checked`; raises `DiffsteerError`.
    """

    id: str
    title: str
    description: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]  # (type, name)
    run: Callable[..., Any]
    check: Callable[..., Any] | None = None
    checked: tuple[str, ...] = ()
    is_output: bool = False

    def __post_init__(self) -> None:
        names = [i.name for i in self.inputs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DiffsteerError(f"the node {self.id} has two inputs {twice[0]!r}: a field may not be called so")

    @property
    def widgets(self) -> tuple[Input, ...]:
        return tuple(i for i in self.inputs if i.is_widget)

    def known(self, widget: Input) -> list[str]:
        """The choices of a COMBO; none where only a ComfyUI that is not here knows them."""
        try:
            return widget.listed()
        except ImportError:
            return []

    def complaint(self, given: dict[str, Any]) -> bool | str:
        """True, or in one line what is wrong with the widgets' values; those that come over a link are not known yet."""
        for widget in self.widgets:
            value, low, high = given.get(widget.name), widget.options.get("min"), widget.options.get("max")
            if value is None:
                continue
            if widget.type in _NUMBERS and not (isinstance(value, _NUMBERS[widget.type]) and not isinstance(value, bool)):
                return f"{widget.name}={value!r} is no {'whole ' if widget.type == 'INT' else ''}number"
            if widget.type == "COMBO" and (listed := self.known(widget)) and value not in listed:
                return f"{widget.name}={value!r} is unknown; valid: {', '.join(listed)}"
            if (low is not None and value < low) or (high is not None and value > high):
                return f"{widget.name}={value}; it lies in [{low}, {high}]"
        if self.check is None or any(given.get(name) is None for name in self.checked):
            return True
        try:
            self.check(**{name: given[name] for name in self.checked})
        except DiffsteerError as error:
            return str(error)
        return True


def as_v1(node: Node) -> type:
    """The node as a class for NODE_CLASS_MAPPINGS."""

    def input_types(cls: type) -> dict[str, Any]:
        groups: dict[str, Any] = {"required": {}, "optional": {}}
        for i in node.inputs:
            options = dict(i.options)
            options |= {"tooltip": i.tooltip} if i.tooltip else {}
            options |= {"default": i.default} if i.is_widget else {}
            kind: Any = i.listed() if i.type == "COMBO" else i.type
            groups["optional" if i.optional else "required"][i.name] = (kind, options)
        if node.is_output:
            groups["hidden"] = {"graph": "PROMPT", "extra": "EXTRA_PNGINFO"}
        return groups

    def run(self: Any, **given: Any) -> Any:
        result = node.run(**given)
        return {"ui": result.ui, "result": result.result} if isinstance(result, Shown) else result

    body: dict[str, Any] = {
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(kind for kind, _ in node.outputs),
        "RETURN_NAMES": tuple(name for _, name in node.outputs),
        "FUNCTION": "run",
        "CATEGORY": CATEGORY,
        "DESCRIPTION": node.description,
        "OUTPUT_NODE": node.is_output,
        "run": run,
    }
    if node.widgets:
        body["VALIDATE_INPUTS"] = classmethod(_validator(node))
    return type(node.id, (), body)


def as_v3(node: Node, io: Any) -> type:
    """The node as a class of the V3 schema. `io` is ComfyUI's module of that name."""
    kinds = {"INT": io.Int, "FLOAT": io.Float, "STRING": io.String, "BOOLEAN": io.Boolean, "COMBO": io.Combo}

    def socket(i: Input) -> Any:
        common: dict[str, Any] = {"tooltip": i.tooltip or None, "optional": i.optional}
        if not i.is_widget:
            return io.Custom(i.type).Input(i.name, **common)
        more = {"options": i.listed()} if i.type == "COMBO" else {}
        return kinds[i.type].Input(i.name, default=i.default, **i.options, **more, **common)

    def define_schema(cls: type) -> Any:
        return io.Schema(
            node_id=node.id,
            display_name=node.title,
            category=CATEGORY,
            description=node.description,
            inputs=[socket(i) for i in node.inputs],
            outputs=[io.Custom(kind).Output(f"out_{name}", display_name=name) for kind, name in node.outputs],
            is_output_node=node.is_output,
        )

    def execute(cls: Any, /, **given: Any) -> Any:
        if node.is_output:
            given |= {"graph": cls.hidden.prompt, "extra": cls.hidden.extra_pnginfo}
        result = node.run(**given)
        if isinstance(result, Shown):
            return io.NodeOutput(*result.result, ui=result.ui)
        return io.NodeOutput(*result)

    body: dict[str, Any] = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    if node.widgets:
        body["validate_inputs"] = classmethod(_validator(node))
    return type(node.id, (io.ComfyNode,), body)


def _validator(node: Node) -> Callable[..., bool | str]:
    """ComfyUI reads from the signature which inputs a validation wants, and leaves those to it altogether."""

    def validate(cls: type, **given: Any) -> bool | str:
        return node.complaint(given)

    names = ["cls", *(w.name for w in node.widgets)]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    validate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return validate
