"""The language of constraints: what its programs are made of, and their parser. After ProgMoGen (Liu et al., 2024, CVPR)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from diffsteer.rewards.measurements import COLORS, MEASUREMENTS, rgb
from diffsteer.types import DiffsteerError, nearest

_TOKEN = re.compile(r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|(#[0-9a-fA-F]{6}|[A-Za-z_]\w*)|(>=|<=|==|[-+*/(),<>]))")
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
        return self.chain(("+", "-"), self.product)

    def product(self) -> Node:
        return self.chain(("*", "/"), self.term)

    def chain(self, signs: tuple[str, str], part: Callable[[], Node]) -> Node:
        """Parts with operations of one rank between them, from the left."""
        node = part()
        while (sign := self.peek()) in signs:
            self.at += 1
            node = self.folded(Node(sign, (node, part())))
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


def parts_of(node: Node) -> Iterator[Node]:
    yield node
    for part in node.parts:
        yield from parts_of(part)
