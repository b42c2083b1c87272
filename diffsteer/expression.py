"""Rewards as a person types them, ``clip + 0.3*z(aesthetic(head='head.pth'))``: a parser, and what comes of it.

sum      = ["-"] product { ("+" | "-") product }
product  = part { ("*" | "/") part }                  of one reward and any numbers
part     = number | "(" sum ")" | "z(" sum [, mean=, std=] ")" | reward [ "(" key=value, ... ")" ]
value    = number | true | false | null | word | 'text' | "text"
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from diffsteer.reward import Reward, ZScore, terms_of
from diffsteer.types import DiffsteerError, nearest

Make = Callable[[str, dict[str, Any]], Reward]  # from a reward's name and its arguments
_TOKEN = re.compile(r"""\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|([A-Za-z_]\w*)|('[^']*'|"[^"]*")|([-+*/(),=]))""")
_WORDS = {"true": True, "false": False, "null": None, "none": None}
_CONSTRAINTS = re.compile(
    r"\b(?:all_of|any_of|weighted|less_than|greater_than|equal|left_of|right_of|above|below)\s*\("
    r"|\(.*(?:[<>]|==)|(?:[<>]|==).*\(",
    re.DOTALL,
)
SWEEP = re.compile(r"\s*(choice|range|interval|glob|sort|shuffle|tag)\(")  # functions of Hydra's sweeps
MOST = 60  # how deep an expression may be nested


def reward_of(text: str, make: Make, names: Collection[str]) -> Reward:
    """The reward that a text stands for.

    Args:
        make: makes a reward of its name and arguments. names: that there are, for messages.

    Raises:
        DiffsteerError: with the character from which on it is not understood, or what `make` refuses.
    """
    return _Parser(text, make, names).whole()


def is_expression(text: str, names: Collection[str]) -> bool:
    """Does a text look like one, rather than the name of an option, a sweep over several, or a program of constraints? It has
    operators or arguments, and a word in it, outside quotes, is a reward."""
    bare = _bare(text)
    words = set(re.findall(r"[A-Za-z_]\w*", bare))
    operators = bool(re.search(r"[-+*/()]", bare)) and not re.search(r"[<>]|==", bare) and not is_program(text)
    return operators and not _listed(text) and bool(words & {*names, "z"}) and not SWEEP.match(text)


def is_program(text: str) -> bool:
    """Does a text look like a program of constraints (`diffsteer.rewards.constraints`)?"""
    return not _listed(text) and bool(_CONSTRAINTS.search(_bare(text)))


def _listed(text: str) -> bool:
    """Is it a list, a mapping, or a sweep over several?"""
    return text.lstrip().startswith(("[", "{")) or len(split(f"[{text}]")) > 1


def _bare(text: str) -> str:
    """Without what stands in quotes."""
    return re.sub(r"""'[^']*'|"[^"]*\"""", "", text)


def split(text: str) -> list[str]:
    """The parts of ``[a, b(c, d), 'e, f']``: at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text.strip()[1:-1]:
        quote = "" if letter == quote else quote or (letter if letter in "'\"" else "")
        depth += 0 if quote else (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


class _Parser:
    """Recursive descent; what it returns is a number or a reward."""

    def __init__(self, text: str, make: Make, names: Collection[str]) -> None:
        self.text, self.make, self.names = text, make, names
        self.tokens, self.at, self.depth = list(self._read()), 0, 0

    def whole(self) -> Reward:
        made = self.sum()
        if self.kind != "end":
            raise self.wrong(f"{self.value!r} is out of place")
        if not isinstance(made, Reward):
            raise DiffsteerError(f"reward: {self.text!r} is a number, and no reward")
        if not all(math.isfinite(weight) for weight, _ in terms_of(made)):
            raise DiffsteerError(f"reward: a weight in {self.text!r} is no finite number")
        return made

    def sum(self) -> float | Reward:
        self.depth += 1
        if self.depth > MOST:
            raise self.wrong(f"nested more than {MOST} deep")
        total: float | Reward = -1.0 * self.product() if self.take("-") else self.product()
        while self.value in ("+", "-"):
            sign = 1.0 if self.next() == "+" else -1.0
            part = self.product()
            if isinstance(total, Reward) != isinstance(part, Reward):
                raise self.wrong("a number that is added changes no choice: leave it out")
            if isinstance(total, Reward) and isinstance(part, Reward):
                total = total + sign * part
            else:
                total = float(total) + sign * float(part)  # type: ignore[arg-type]
        self.depth -= 1
        return total

    def product(self) -> float | Reward:
        made = self.part()
        while self.value in ("*", "/"):
            sign, other = self.next(), self.part()
            if sign == "/":
                if isinstance(other, Reward) or other == 0:
                    raise self.wrong("only numbers other than 0 can stand behind a /")
                made = made * (1 / other)
            elif isinstance(other, float):
                made = made * other
            elif isinstance(made, float):
                made = other * made
            else:
                raise self.wrong("rewards can be added, not multiplied")
        return made

    def part(self) -> float | Reward:
        sign = 1.0
        while self.take("-"):
            sign = -sign
        if sign < 0:
            return sign * self.part()
        if self.take("("):
            made = self.sum()
            self.expect(")")
            return made
        kind, value = self.kind, self.next()
        if kind == "number":
            if not math.isfinite(float(value)):
                raise self.wrong(f"{value} is no weight", back=1)
            return float(value)
        if kind != "name":
            ended = kind == "end"
            raise self.wrong("something is missing at the end" if ended else f"{value!r} is out of place", back=not ended)
        if value == "z" and self.value == "(":
            return self.z()
        if value not in self.names:
            raise DiffsteerError(f"reward: there is no {value!r} ({self.text!r}){nearest(value, self.names)}")
        return self.make(value, self.arguments() if self.take("(") else {})

    def z(self) -> Reward:
        self.expect("(")
        inner = self.sum()
        if not isinstance(inner, Reward):
            raise self.wrong("z() takes a reward")
        if not self.take(","):
            self.expect(")")
            return ZScore(inner)
        given = self.arguments()
        if set(given) - {"mean", "std"}:
            raise self.wrong(f"z() takes mean= and std=, not {sorted(set(given) - {'mean', 'std'})[0]}=")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
                raise self.wrong(f"z(): {name}={value!r} is no number")
        return ZScore(inner, **given)

    def arguments(self) -> dict[str, Any]:
        """What stands between brackets, the closing one included."""
        given: dict[str, Any] = {}
        while not self.take(")"):
            kind, name = self.kind, self.next()
            if kind != "name" or not self.take("="):
                raise self.wrong("arguments are key=value", back=1)
            if name in given:
                raise self.wrong(f"{name}= is given twice", back=1)
            given[name] = self.argument()
            if self.value != ")":
                self.expect(",")
        return given

    def argument(self) -> Any:
        negative = self.take("-")
        kind, value = self.kind, self.next()
        if kind == "number":
            try:
                number = float(value) if re.search(r"[.eE]", value) else int(value)
            except ValueError:  # thousands of digits
                raise self.wrong("too large a number", back=1) from None
            return -number if negative else number
        if negative or kind not in ("name", "text"):
            raise self.wrong(f"{value!r} is no value; put texts into quotes", back=1)
        return value[1:-1] if kind == "text" else _WORDS.get(value, value)

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    @property
    def value(self) -> str:
        kind, value, _ = self.tokens[self.at]
        return "" if kind == "text" else value

    def next(self) -> str:
        value = self.tokens[self.at][1]
        self.at = min(self.at + 1, len(self.tokens) - 1)
        return value

    def take(self, sign: str) -> bool:
        if self.value != sign:
            return False
        self.next()
        return True

    def expect(self, sign: str) -> None:
        if not self.take(sign):
            raise self.wrong(f"a {sign!r} is missing")

    def wrong(self, what: str, back: int = 0) -> DiffsteerError:
        place = self.tokens[max(0, self.at - back)][2]
        return DiffsteerError(f"reward: character {place + 1} of {self.text!r}: {what}")

    def _read(self) -> Iterator[tuple[str, str, int]]:
        at = 0
        while self.text[at:].strip():
            found = _TOKEN.match(self.text, at)
            if found is None:
                place = at + len(self.text[at:]) - len(self.text[at:].lstrip())
                raise DiffsteerError(f"reward: character {place + 1} of {self.text!r}: {self.text[place]!r} is not understood")
            kind = ("number", "name", "text", "sign")[next(i for i in range(4) if found[i + 1] is not None)]
            yield kind, found[found.lastindex or 0], found.start(found.lastindex or 0)
            at = found.end()
        yield "end", "", len(self.text)
