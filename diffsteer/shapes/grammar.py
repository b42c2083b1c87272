"""Captions of the shapes world: what may be said, and how to read it back.

Six tasks, after GenEval (Ghosh et al., 2023, arXiv 2310.11513):

    single_object  "a star", "a small star"
    two_object     "a star and a ring"
    counting       "three stars", "three red stars"
    colors         "a red star", "a large red star"
    position       "a star left of a ring", "a red star left of a blue ring"
    color_attr     "a red star and a blue ring"

and any of them may end in "on a white | gray | black background". A caption is parsed into a `Statement`, the only thing
that the renderer and the checker share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 42, 42),
    "green": (40, 165, 60),
    "blue": (40, 80, 225),
    "yellow": (242, 220, 50),
    "orange": (245, 140, 28),
    "purple": (135, 45, 185),
    "cyan": (45, 205, 220),
    "pink": (248, 130, 195),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (18, 18, 18)}
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# Colour-shape pairs, one colour a shape, that the autoencoder and the painter never see in training: what they make of them is
# generalisation. (The miniature CLIPs do meet them, in the hard negatives that they are trained on.)
UNSEEN_PAIRS = frozenset(
    {("cyan", "circle"), ("pink", "square"), ("green", "triangle"), ("red", "star"), ("yellow", "cross"), ("purple", "ring")}
)

_PLURALS = {shape + ("es" if shape.endswith("s") else "s"): shape for shape in SHAPES}
_COUNTS = {word: n for n, word in NUMBERS.items()}
WORDS = tuple(
    sorted(
        {"a", "an", "and", "of", "on", "left", "right", "above", "below", "background"}
        | {*SHAPES, *_PLURALS, *COLORS, *BACKGROUNDS, *SIZES, *_COUNTS}
    )
)


@dataclass(frozen=True)
class Group:
    """`count` things alike. `size` and `color` are None where the caption leaves them open."""

    shape: str
    count: int = 1
    size: str | None = None
    color: str | None = None

    def __str__(self) -> str:
        plural = next(p for p, s in _PLURALS.items() if s == self.shape)
        words = [w for w in (self.size, self.color) if w] + [self.shape if self.count == 1 else plural]
        article = "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article if self.count == 1 else NUMBERS[self.count], *words])


@dataclass(frozen=True)
class Statement:
    """What a caption says: one or two groups, how the first lies to the second, and the background."""

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None

    def __str__(self) -> str:
        text = str(self.groups[0])
        if len(self.groups) == 2:
            text += f" {self.relation or 'and'} {self.groups[1]}"
        return text + (f" on a {self.background} background" if self.background else "")


def task_of(statement: Statement) -> str:
    """The task that a statement belongs to."""
    first = statement.groups[0]
    if len(statement.groups) == 1:
        if first.count > 1:
            return "counting"
        return "colors" if first.color else "single_object"
    if statement.relation:
        return "position"
    return "color_attr" if all(g.color for g in statement.groups) else "two_object"


def parse(caption: str) -> Statement:
    """Read a caption of the grammar.

    Raises:
        ValueError: the caption is not of the grammar; the message names the word and what may stand there.
    """
    words = caption.lower().split()
    unknown = [w for w in words if w not in WORDS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no word of the shapes world; it knows: {', '.join(WORDS)}")
    background = None
    if len(words) >= 4 and words[-4:-2] == ["on", "a"] and words[-1] == "background":
        background, words = words[-2], words[:-4]
        if background not in BACKGROUNDS:
            raise ValueError(f"{background!r} is no background; there are {', '.join(BACKGROUNDS)}")
    group, words = _parse_group(words, caption)
    if not words:
        return Statement((group,), None, background)
    relation = None
    if words[0] == "and":
        words = words[1:]
    else:
        relation = next((r for r in RELATIONS if words[: len(r.split())] == r.split()), None)
        if relation is None:
            raise ValueError(f"{words[0]!r} cannot follow {str(group)!r} in {caption!r}; valid: and, {', '.join(RELATIONS)}")
        words = words[len(relation.split()) :]
    other, words = _parse_group(words, caption)
    if words:
        raise ValueError(f"{' '.join(words)!r} is left over at the end of {caption!r}")
    return Statement((group, other), relation, background)


def _parse_group(words: list[str], caption: str) -> tuple[Group, list[str]]:
    if not words or (words[0] not in ("a", "an") and words[0] not in _COUNTS):
        raise ValueError(f"an article or a number (a, an, {', '.join(_COUNTS)}) is missing in {caption!r}")
    count, rest = _COUNTS.get(words[0], 1), words[1:]
    size = rest[0] if rest and rest[0] in SIZES else None
    rest = rest[1:] if size else rest
    color = rest[0] if rest and rest[0] in COLORS else None
    rest = rest[1:] if color else rest
    nouns = dict(zip(SHAPES, SHAPES, strict=True)) if count == 1 else _PLURALS
    if not rest or rest[0] not in nouns:
        got = repr(rest[0]) if rest else "the end"
        raise ValueError(f"{got} stands where a shape should in {caption!r}; valid: {', '.join(nouns)}")
    return Group(nouns[rest[0]], count, size, color), rest[1:]


def one_attribute_changed(statement: Statement) -> list[Statement]:
    """Every statement that differs from this one in exactly one stated attribute (or has two colours or shapes swapped).

    Each of them is false of every scene of which `statement` is true, as long as the two groups have different shapes, which
    holds for all that `sample_scene` says.
    """
    groups, changed = statement.groups, []

    def with_group(i: int, group: Group) -> Statement:
        return replace(statement, groups=(*groups[:i], group, *groups[i + 1 :]))

    for i, group in enumerate(groups):
        others = {g.shape for g in groups}
        changed += [with_group(i, replace(group, shape=s)) for s in SHAPES if s not in others]
        if group.color:
            changed += [with_group(i, replace(group, color=c)) for c in COLORS if c not in {g.color for g in groups}]
        if group.size:
            changed += [with_group(i, replace(group, size=s)) for s in SIZES if s != group.size]
        if len(groups) == 1:
            changed += [with_group(i, replace(group, count=n)) for n in (1, *NUMBERS) if n != group.count]
    if len(groups) == 2 and statement.relation:
        changed += [replace(statement, relation=r) for r in RELATIONS if r != statement.relation]
    if len(groups) == 2 and groups[0].color and groups[1].color and groups[0].color != groups[1].color:
        swapped = (replace(groups[0], color=groups[1].color), replace(groups[1], color=groups[0].color))
        changed.append(replace(statement, groups=swapped))
    if statement.background:
        changed += [replace(statement, background=b) for b in BACKGROUNDS if b != statement.background]
    return changed
