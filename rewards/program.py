"""Constraints as a reward: a small language of measurements, read by a parser. After ProgMoGen (Liu et al., 2024, CVPR)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.reward import Reward
from diffsteer.rewards.measurements import COLORS, MEASUREMENTS, PRESENT, area, measure, rgb
from diffsteer.types import Context, DiffsteerError, check_numbers, nearest

_TOKEN = re.compile(r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|(#[0-9a-fA-F]{6}|[A-Za-z_]\w*)|(>=|<=|==|[-+*/(),<>]))")
PLACED = ("x", "y", "speed", "speed_x", "speed_y")  # of what is not there they say nothing
RELATIONS = {"left_of": ("x", 1), "right_of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}
GROUPS = ("all_of", "any_of", "weighted")
BOUNDS = {"less_than": "<", "greater_than": ">", "equal": "=="}
MOST = 60  # how deep a program may be nested
SIGNS = 200  # operations in it, at most
LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Node:
    """A part of a program: a number, a measurement, an operation, or a constraint."""

    kind: str
    parts: tuple[Node, ...] = ()
    value: float = 0.0
    color: str | None = None

    def __str__(self) -> str:
        """Text that reads back as the same program."""
        if self.kind == "number":
            return repr(self.value) if self.value >= 0 else f"(0 - {-self.value!r})"
        if self.kind == "color":
            return str(self.color)
        if self.kind in MEASUREMENTS:
            return f"{self.kind}({self.color or ''})"
        inner = ", ".join(map(str, self.parts))
        if self.kind in ("+", "-", "*", "/", "<", ">", "<=", ">=", "=="):
            return f"({self.parts[0]} {self.kind} {self.parts[1]})"
        return f"{self.kind}({inner})"


class _Parser:
    """Recursive descent over tokens; every error says where."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0
        self.tokens = list(self._read(text))
        if sum(token in "+-*/" for _, token, _ in self.tokens) > SIGNS:
            raise DiffsteerError(f"program: more than {SIGNS} operations: {_shown(text)}")

    def _read(self, text: str) -> Iterator[tuple[str, str, int]]:
        at = 0
        while text[at:].strip():
            found = _TOKEN.match(text, at)
            if found is None:
                place = at + len(text[at:]) - len(text[at:].lstrip())
                raise DiffsteerError(f"program: character {place + 1}: {text[place]!r} is not understood in {_shown(text)}")
            kind = "number" if found[1] else "name" if found[2] else "sign"
            yield kind, found[1] or found[2] or found[3], found.start(found.lastindex or 0)
            at = found.end()

    def fail(self, wanted: str) -> DiffsteerError:
        if self.at == len(self.tokens):
            return DiffsteerError(f"program: it ends where {wanted} was wanted: {_shown(self.text)}")
        return self.wrong(self.at, f"{self.tokens[self.at][1]!r} where {wanted} was wanted")

    def wrong(self, at: int, what: str) -> DiffsteerError:
        """With the place of a token."""
        return DiffsteerError(f"program: character {self.tokens[at][2] + 1}: {what}, in {_shown(self.text)}")

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def take(self, token: str) -> None:
        if self.peek() != token:
            raise self.fail(repr(token))
        self.at += 1

    def program(self) -> Node:
        node = self.constraint()
        if self.at < len(self.tokens):
            raise self.fail("the end")
        return node

    def nested(self, read: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > MOST:
            raise DiffsteerError(f"program: nested more than {MOST} deep: {_shown(self.text)}")
        try:
            return read()
        finally:
            self.depth -= 1

    def constraint(self) -> Node:
        name = self.peek()
        if name in GROUPS:
            self.at += 1
            self.take("(")
            if name == "weighted":
                at, weight = self.at, self.sum()
                if weight.kind != "number" or weight.value < 0:
                    raise self.wrong(at, "weighted wants a number first, at least 0")
                self.take(",")
                parts = [weight, self.nested(self.constraint)]
            else:
                parts = [self.nested(self.constraint)]
                while self.peek() == ",":
                    self.at += 1
                    parts.append(self.nested(self.constraint))
            self.take(")")
            return Node(name, tuple(parts))
        if name in RELATIONS:
            self.at += 1
            self.take("(")
            first = Node("color", color=self.color())
            self.take(",")
            at, second = self.at, Node("color", color=self.color())
            if rgb(str(first.color)) == rgb(str(second.color)):
                raise self.wrong(at, f"{name} wants two colours, and nothing is {name} itself")
            self.take(")")
            return Node(name, (first, second))
        if name in BOUNDS:
            self.at += 1
            self.take("(")
            low = self.nested(self.sum)
            self.take(",")
            high = self.nested(self.sum)
            self.take(")")
            return Node(BOUNDS[name], (low, high))
        return self.bracketed() if name == "(" else self.comparison()

    def bracketed(self) -> Node:
        """A constraint in brackets, or a comparison that begins with a sum in brackets. Where it is neither, what is told is
        why not the one that was understood for longer."""
        began, reached, told = self.at, self.at, None
        try:
            self.at += 1
            node = self.nested(self.constraint)
            self.take(")")
            if self.peek() in ("", ",", ")"):
                return node
        except DiffsteerError as error:
            if self.depth >= MOST:
                raise
            reached, told = self.at, error
        self.at = began
        try:
            return self.comparison()
        except DiffsteerError:
            if told is not None and reached > self.at:
                self.at = reached
                raise told from None
            raise

    def comparison(self) -> Node:
        left = self.sum()
        sign = self.peek()
        if sign not in ("<", ">", "<=", ">=", "=="):
            raise self.fail("a comparison")
        self.at += 1
        return Node(sign, (left, self.sum()))

    def sum(self) -> Node:
        node = self.product()
        while self.peek() in ("+", "-"):
            sign = self.peek()
            self.at += 1
            node = self.folded(Node(sign, (node, self.product())))
        return node

    def product(self) -> Node:
        node = self.term()
        while self.peek() in ("*", "/"):
            sign = self.peek()
            self.at += 1
            node = self.folded(Node(sign, (node, self.term())))
        return node

    def term(self) -> Node:
        kind, token, _ = self.tokens[self.at] if self.at < len(self.tokens) else ("", "", 0)
        if token == "-":
            self.at += 1
            return self.folded(Node("-", (Node("number"), self.nested(self.term))))
        if token == "(":
            self.at += 1
            node = self.nested(self.sum)
            self.take(")")
            return node
        if kind == "number":
            self.at += 1
            return self.finite(Node("number", value=float(token)))
        if kind != "name":
            raise self.fail("a number or a measurement")
        constraints = [*RELATIONS, *GROUPS, *BOUNDS]
        if token in constraints:
            raise self.fail("a number or a measurement, and no constraint,")
        if token not in MEASUREMENTS:
            raise self.wrong(self.at, f"{token!r} is unknown{nearest(token, [*MEASUREMENTS, *constraints])}")
        self.at += 1
        self.take("(")
        color = self.color() if MEASUREMENTS[token].colored else None
        self.take(")")
        return Node(token, color=color)

    def color(self) -> str:
        if self.at >= len(self.tokens) or self.tokens[self.at][0] != "name":
            raise self.fail("a colour")
        token = self.tokens[self.at][1]
        try:
            rgb(token)
        except KeyError:
            raise self.wrong(self.at, f"no colour {token!r}{nearest(token, COLORS)}, or #rrggbb") from None
        self.at += 1
        return token

    def folded(self, node: Node) -> Node:
        """An operation on two numbers as a number; a division by zero stays, and is no number when it is asked."""
        a, b = node.parts
        if a.kind != "number" or b.kind != "number" or (node.kind == "/" and b.value == 0):
            return node
        operations = {"+": a.value + b.value, "-": a.value - b.value, "*": a.value * b.value, "/": a.value / (b.value or 1.0)}
        return self.finite(Node("number", value=operations[node.kind]))

    def finite(self, number: Node) -> Node:
        """The number that ends before the next token, refused beyond what single precision holds."""
        if abs(number.value) > LARGEST:
            raise self.wrong(self.at - 1, "too large a number")
        return number


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def parse(text: str) -> Node:
    """Read a program.

    Raises:
        DiffsteerError: with the character and what was wanted there.
    """
    return _Parser(text).program()


def value(node: Node, samples: Tensor) -> Tensor:
    """What a number, a measurement or an operation is of samples, (N,)."""
    if node.kind == "number":
        return torch.full((len(samples),), node.value, device=samples.device)
    if node.kind in MEASUREMENTS:
        return measure(node.kind, samples, node.color)
    a, b = (value(p, samples) for p in node.parts)
    if node.kind == "/":
        nowhere = b == 0  # its gradient would be no number where another alternative counts, either
        return torch.where(nowhere, torch.full_like(a, float("nan")), a / torch.where(nowhere, torch.ones_like(b), b))
    return a + b if node.kind == "+" else a - b if node.kind == "-" else a * b


def error(node: Node, samples: Tensor, margin: float) -> Tensor:
    """How far samples are from satisfying a constraint, (N,), 0 where they do."""
    if node.kind == "all_of":
        return torch.stack([error(p, samples, margin) for p in node.parts]).sum(0)
    if node.kind == "any_of":
        errors = torch.stack([error(p, samples, margin) for p in node.parts])
        return torch.where(errors.isnan(), math.inf, errors).min(0).values
    if node.kind == "weighted":
        return node.parts[0].value * error(node.parts[1], samples, margin)
    if node.kind in RELATIONS:
        axis, sign = RELATIONS[node.kind]
        a, b = (str(p.color) for p in node.parts)
        apart = sign * (measure(axis, samples, b) - measure(axis, samples, a))
        return (margin - apart).clamp(min=0) + _absent(samples, a) + _absent(samples, b)
    a_, b_ = (value(p, samples) for p in node.parts)
    strict = margin if node.kind in (">", "<") else 0.0
    short = b_ - a_ if node.kind in (">", ">=") else a_ - b_
    found = short.abs() if node.kind == "==" else (short + strict).clamp(min=0)
    for color in dict.fromkeys(str(n.color) for n in parts_of(node) if n.kind in PLACED):
        found = found + _absent(samples, color)
    return found


def _absent(samples: Tensor, color: str) -> Tensor:
    """1 where there is nothing of a colour, 0 from `PRESENT` on: what is not there is nowhere."""
    images = samples if samples.ndim == 4 else samples.flatten(0, 1)
    there = area(images, color).view(len(samples), -1).mean(1)
    return (1 - there / PRESENT).clamp(min=0)


def parts_of(node: Node) -> Iterator[Node]:
    yield node
    for part in node.parts:
        yield from parts_of(part)


@dataclass(eq=False)
class Program(Reward):
    """Minus how far a sample is from satisfying constraints; 0 where it satisfies them all, and then a search stops.

    Constraints compare sums and products of measurements and numbers (``area(red) > 2 * area(blue)``), or say where colours are
    (``left_of(red, blue)``); ``all_of`` adds their errors, ``any_of`` takes the least, ``weighted(2, ...)`` multiplies.
    A comparison of places or speeds is not satisfied unless their colours are there: one percent of the picture each.
    ``less_than(a, b)``, ``greater_than(a, b)`` and ``equal(a, b)`` are other spellings of ``<``, ``>`` and ``==``.

    | measurement | of | range |
    |---|---|---|
    | area(C) | share of the picture of a colour | 0 to 1 |
    | x(C), y(C) | its centre of mass, from the left, from the top | 0 to 1 |
    | count(C) | its pieces, without a gradient | 0, 1, ... |
    | brightness(), edges() | mean luma, mean gradient of luma a pixel | 0 to 1 |
    | speed(C), speed_x(C), speed_y(C) | of clips, the way of its centre a frame | widths of the picture |

    Colours are named, or ``#rrggbb``. Differentiable where all its measurements are. The prompt plays no part.

    Args:
        text: the program.
        margin: by how much strict comparisons (``<``, ``>``, relations) want to be satisfied.

    Raises:
        DiffsteerError: a text that is no program, with the character where.
    """

    text: str
    margin: float = 0.02

    name: ClassVar[str] = "program"
    modality: ClassVar[str] = "any"
    range: ClassVar[tuple[float, float]] = (float("-inf"), 0.0)
    differentiable: ClassVar[bool] = True  # where all its measurements are

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise DiffsteerError(f"program: text={self.text!r}; wanted one such as 'area(red) > area(blue)'")
        check_numbers("program: ", {}, {"margin": self.margin})
        if self.margin is None or not 0 <= self.margin < math.inf:
            raise DiffsteerError(f"program: margin={self.margin}; it is at least 0, and finite")
        self.node = parse(self.text)
        used = [MEASUREMENTS[n.kind] for n in parts_of(self.node) if n.kind in MEASUREMENTS]
        clips = any(m.clips for m in used)
        self.__dict__.update(differentiable=all(m.differentiable for m in used), modality="video" if clips else "any")

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Minus the error of images (N, 3, H, W), or clips (N, F, 3, H, W), in [0, 1]: (N,). NaN where it is no number."""
        found = 0.0 - error(self.node, samples.float(), self.margin)
        return torch.where(found.isinf(), torch.full_like(found, float("nan")), found)
