"""Scenes of the shapes world: sampled, described, drawn. 64 x 64 RGB, anti-aliased, objects upright and never touching."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from diffsteer.shapes.grammar import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    TASKS,
    UNSEEN_PAIRS,
    Group,
    Statement,
)

SIDE = 64
RADII = {"small": (7.0, 8.0), "large": (11.5, 13.0)}  # half the side of the box that holds the object, in pixels
_GAP, _MARGIN, _SUPERSAMPLING = 4.0, 2.5, 4


@dataclass(frozen=True)
class Thing:
    """One object: centre `(x, y)` and half extent `r` in pixels, y downwards; `rgb` is its colour after jitter."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    r: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """What is drawn (`things`, `background`, `background_rgb`) and what its caption says of it (`statement`)."""

    task: str
    statement: Statement
    things: tuple[Thing, ...]
    background: str
    background_rgb: tuple[int, int, int]


def caption(scene: Scene) -> str:
    """The caption of a scene, e.g. ``"a red circle left of a blue square"``."""
    return str(scene.statement)


def sample_scene(task: str, rng: np.random.Generator, pairs: str = "all") -> Scene:
    """Draw a scene and what its caption says.

    Args:
        task: one of `TASKS`.
        rng: every draw comes from it.
        pairs: "all"; "seen" leaves out scenes with a pair of `UNSEEN_PAIRS` (training); "unseen" wants one among them.

    Raises:
        ValueError: an unknown task or value of `pairs`.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; valid: {', '.join(TASKS)}")
    if pairs not in ("all", "seen", "unseen"):
        raise ValueError(f"unknown pairs {pairs!r}; valid: all, seen, unseen")
    while True:
        scene = _try_scene(task, rng)
        unseen = any((t.color, t.shape) in UNSEEN_PAIRS for t in scene.things)
        if pairs == "all" or unseen == (pairs == "unseen"):
            return scene


def scene_of(statement: Statement, rng: np.random.Generator, task: str = "") -> Scene:
    """Draw a scene of which `statement` is true, what it leaves open being drawn at random.

    Raises:
        ValueError: more things than fit (four), or a relation between more than two.
    """
    count = sum(g.count for g in statement.groups)
    if count > 4 or (statement.relation and count > 2):
        raise ValueError(f"{str(statement)!r} names {count} things; a scene holds 4, and 2 with a relation")
    things: list[tuple[str, str, str]] = []
    for group in statement.groups:
        color = group.color or str(rng.choice(list(COLORS)))
        size = group.size or str(rng.choice(SIZES))
        things += [(group.shape, color, size)] * group.count
    background = statement.background or str(rng.choice(list(BACKGROUNDS)))
    radii = [float(rng.uniform(*RADII[size])) for _, _, size in things]
    centres = _place(radii, statement.relation, rng)
    return Scene(
        task=task,
        statement=statement,
        things=tuple(
            Thing(shape, color, size, x, y, r, _jitter(COLORS[color], 8, rng))
            for (shape, color, size), r, (x, y) in zip(things, radii, centres, strict=True)
        ),
        background=background,
        background_rgb=_jitter(BACKGROUNDS[background], 5, rng),
    )


def render(scene: Scene) -> Image.Image:
    """Draw a scene: a 64 x 64 RGB image."""
    big = SIDE * _SUPERSAMPLING
    image = Image.new("RGB", (big, big), scene.background_rgb)
    for thing in scene.things:
        mask = Image.new("L", (big, big), 0)
        _draw(ImageDraw.Draw(mask), thing.shape, thing.x * _SUPERSAMPLING, thing.y * _SUPERSAMPLING, thing.r * _SUPERSAMPLING)
        image.paste(thing.rgb, mask=mask)
    return image.reduce(_SUPERSAMPLING)


def holds(relation: str, first: tuple[float, float], second: tuple[float, float], slack: float = 1.0) -> bool:
    """Is `first` (x, y) left of | right of | above | below `second`? The other axis may differ `slack` times as much."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > 0 and abs(across) <= slack * along


def _try_scene(task: str, rng: np.random.Generator) -> Scene:
    def maybe(p: float, values: tuple[str, ...] | list[str]) -> str | None:
        return str(rng.choice(values)) if rng.random() < p else None

    shape, other = (str(s) for s in rng.choice(SHAPES, 2, replace=False))
    color, other_color = (str(c) for c in rng.choice(list(COLORS), 2, replace=False))
    relation = None
    if task == "single_object":
        groups: tuple[Group, ...] = (Group(shape, size=maybe(0.3, SIZES)),)
    elif task == "colors":
        groups = (Group(shape, size=maybe(0.3, SIZES), color=color),)
    elif task == "counting":
        groups = (Group(shape, count=int(rng.integers(2, 5)), color=maybe(0.5, [color])),)
    elif task == "two_object":
        groups = (Group(shape), Group(other))
    elif task == "color_attr":
        groups = (Group(shape, color=color), Group(other, color=other_color))
    else:
        relation = str(rng.choice(RELATIONS))
        coloured = rng.random() < 0.5
        groups = (Group(shape, color=color if coloured else None), Group(other, color=other_color if coloured else None))
    return scene_of(Statement(groups, relation, maybe(0.25, list(BACKGROUNDS))), rng, task)


def _place(radii: list[float], relation: str | None, rng: np.random.Generator) -> list[tuple[float, float]]:
    def free(r: float) -> tuple[float, float]:
        x, y = rng.uniform(_MARGIN + r, SIDE - _MARGIN - r, 2)
        return float(x), float(y)

    def apart(centres: list[tuple[float, float]]) -> bool:
        pairs = [(i, j) for i in range(len(radii)) for j in range(i)]
        return all(
            max(abs(centres[i][0] - centres[j][0]), abs(centres[i][1] - centres[j][1])) >= radii[i] + radii[j] + _GAP
            for i, j in pairs
        )

    for attempt in itertools.count():
        centres = [free(r) for r in radii]
        if apart(centres) and (relation is None or holds(relation, centres[0], centres[1], slack=0.6)):
            return centres
        if attempt == 300 and relation is None:
            break
    # Four large objects hardly ever fit by chance: give each a quarter of the image.
    quarters = rng.permutation(4)[: len(radii)]
    corners = [(r + _MARGIN, SIDE / 2 - r - _GAP / 2) for r in radii]
    lows = [(float(rng.uniform(lo, max(lo, hi))), float(rng.uniform(lo, max(lo, hi)))) for lo, hi in corners]
    return [(SIDE - x if q % 2 else x, SIDE - y if q >= 2 else y) for (x, y), q in zip(lows, quarters, strict=True)]


def _jitter(rgb: tuple[int, int, int], by: int, rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in np.clip(np.asarray(rgb) + rng.integers(-by, by + 1, 3), 0, 255))
    return r, g, b


def outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a polygonal shape in the box [-1, 1] x [-1, 1], y downwards."""
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)]
    if shape == "cross":
        a = 0.34
        return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    if shape == "star":
        tips = [(1.05 if i % 2 == 0 else 0.44, -math.pi / 2 + i * math.pi / 5) for i in range(10)]
        return [(r * math.cos(t), r * math.sin(t) + 0.05) for r, t in tips]
    raise ValueError(f"{shape!r} is no polygon")


def _draw(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    if shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            hole = 0.52 * r
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        draw.polygon([(x + r * u, y + r * v) for u, v in outline(shape)], fill=255)


def describes(statement: Statement, scene: Scene) -> bool:
    """Is the statement true of the scene, objects that it does not name counting against it?"""

    def fits(group: Group, thing: Thing) -> bool:
        return group.shape == thing.shape and group.color in (None, thing.color) and group.size in (None, thing.size)

    if statement.background not in (None, scene.background) or sum(g.count for g in statement.groups) != len(scene.things):
        return False
    if len(statement.groups) == 1:
        return all(fits(statement.groups[0], t) for t in scene.things)
    first, second = statement.groups
    for chosen in itertools.combinations(scene.things, first.count):
        rest = [t for t in scene.things if t not in chosen]
        if all(fits(first, t) for t in chosen) and all(fits(second, t) for t in rest):
            pairs = itertools.product(chosen, rest)
            if statement.relation is None or all(holds(statement.relation, (a.x, a.y), (b.x, b.y)) for a, b in pairs):
                return True
    return False
