"""Clips of the shapes world, in which each object moves straight on at a speed of its own; and what a clip shows to move."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffsteer.shapes.check import Seen, look
from diffsteer.shapes.scene import _GAP, _MARGIN, SIDE, Scene, Thing, render, sample_scene

FRAMES = 8
CLIP_TASKS = ("single_object", "colors", "two_object", "color_attr")  # what their captions say holds while things move
SPEEDS = (1.5, 3.5)  # pixels a frame of what moves
AT_REST = 0.15  # the share of objects that do not move
_STILL = 0.6  # pixels a frame: no slower speed is told from none


@dataclass(frozen=True)
class Clip:
    """A scene as its first frame shows it, and how its things move: `velocities` (dx, dy) in pixels a frame, y downwards."""

    scene: Scene
    velocities: tuple[tuple[float, float], ...]
    frames: int = FRAMES

    def at(self, frame: int) -> Scene:
        """The scene in a frame, from 0."""
        moved = [
            replace(t, x=t.x + frame * dx, y=t.y + frame * dy)
            for t, (dx, dy) in zip(self.scene.things, self.velocities, strict=True)
        ]
        return replace(self.scene, things=tuple(moved))


@dataclass(frozen=True)
class Track:
    """One object of a clip: the name of what it is, where it was in each frame that showed it, and its speed.

    Attributes:
        positions: (frames, 2) in pixels, NaN where it was not seen.
        velocity: (dx, dy) in pixels a frame, of the straight line that fits best.
        straight: root mean square distance of the positions from that line, in pixels.
    """

    shape: str
    color: str
    positions: NDArray[np.float64]
    velocity: tuple[float, float]
    straight: float

    @property
    def moves(self) -> bool:
        return math.hypot(*self.velocity) >= _STILL


def sample_clip(task: str, rng: np.random.Generator, frames: int = FRAMES, pairs: str = "all") -> Clip:
    """Draw a clip: a scene, and for each thing a direction and a speed with which nothing leaves the picture or touches.

    Raises:
        ValueError: a task that is not one of `CLIP_TASKS`, or no frame.
    """
    if task not in CLIP_TASKS:
        raise ValueError(f"unknown task {task!r} of a clip; valid: {', '.join(CLIP_TASKS)}")
    if frames < 1:
        raise ValueError(f"a clip of {frames} frames; at least 1 is needed")
    while True:
        scene = sample_scene(task, rng, pairs)
        resting = rng.random(len(scene.things)) < AT_REST  # drawn once: what fits easily would come too often
        for _ in range(20):
            clip = Clip(scene, tuple((0.0, 0.0) if r else _velocity(rng) for r in resting), frames)
            if all(_fits(clip.at(k).things) for k in range(frames)):
                return clip


def render_clip(clip: Clip) -> list[Image.Image]:
    """Draw a clip: its frames, 64 x 64 RGB."""
    return [render(clip.at(k)) for k in range(clip.frames)]


def track(frames: Sequence[Any]) -> list[Track]:
    """Follow the objects of a clip that are seen, with shape and colour, in at least half of its frames.

    An object is followed by its name; of several of one name the nearest to where the last was seen.

    Args:
        frames: images as `look` takes them.

    Raises:
        ValueError: fewer than two frames.
    """
    if len(frames) < 2:
        raise ValueError(f"{len(frames)} frames do not show a motion; at least 2 are needed")
    paths: list[dict[int, Seen]] = []
    for k, frame in enumerate(frames):
        named = [s for s in look(frame).objects if s.shape and s.color]
        pairs = [
            (math.hypot(s.x - last.x, s.y - last.y), i, j)
            for i, s in enumerate(named)
            for j, path in enumerate(paths)
            for last in [path[max(path)]]
            if (s.shape, s.color) == (last.shape, last.color)
        ]
        used: set[int] = set()
        followed: set[int] = set()
        for _, i, j in sorted(pairs):
            if i not in used and j not in followed:
                paths[j][k] = named[i]
                used.add(i)
                followed.add(j)
        paths += [{k: s} for i, s in enumerate(named) if i not in used]
    return [_track(path, len(frames)) for path in paths if len(path) >= max(2, len(frames) / 2)]


def direction_error(seen: Sequence[Track], wanted: Sequence[tuple[float, float]]) -> float:
    """The angle in degrees, 0 to 180, between the motion that a clip shows and the one that is wanted.

    Args:
        seen: of `track`. wanted: velocities, of which those that are at rest are left out.

    The objects are paired as fits best; the mean is taken over the wanted ones. 90 is what a motion at random has on average,
    and counts for an object that is missing or at rest. NaN where none is wanted to move.
    """
    moving = [w for w in wanted if math.hypot(*w) >= _STILL]
    if not moving:
        return math.nan
    costs = np.full((len(moving), max(len(seen), len(moving))), 90.0)
    for i, w in enumerate(moving):
        for j, s in enumerate(seen):
            if s.moves:
                turn = math.degrees(math.atan2(w[1], w[0]) - math.atan2(s.velocity[1], s.velocity[0]))
                costs[i, j] = abs((turn + 180) % 360 - 180)
    ways = itertools.permutations(range(costs.shape[1]), len(moving))
    return float(min(costs[range(len(moving)), list(way)].mean() for way in ways))


def _track(path: dict[int, Seen], frames: int) -> Track:
    positions = np.full((frames, 2), np.nan)
    for k, s in path.items():
        positions[k] = s.x, s.y
    times = np.array(sorted(path), dtype=float)
    seen = positions[sorted(path)]
    slope = np.polyfit(times, seen, 1)
    off = seen - (times[:, None] * slope[0] + slope[1])
    first = next(iter(path.values()))
    return Track(
        str(first.shape), str(first.color), positions, (slope[0, 0], slope[0, 1]), float((off**2).sum(1).mean() ** 0.5)
    )


def _velocity(rng: np.random.Generator) -> tuple[float, float]:
    angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(*SPEEDS)
    return speed * math.cos(angle), speed * math.sin(angle)


def _fits(things: Sequence[Thing]) -> bool:
    inside = all(_MARGIN + t.r <= c <= SIDE - _MARGIN - t.r for t in things for c in (t.x, t.y))
    pairs = [(a, b) for i, a in enumerate(things) for b in things[:i]]
    return inside and all(max(abs(a.x - b.x), abs(a.y - b.y)) >= a.r + b.r + _GAP for a, b in pairs)
