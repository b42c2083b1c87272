"""A run as a picture: which particles lived on, and how their rewards grew."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffsteer.types import DiffsteerError, Trace

WIDE, TALL, MARGIN, RADIUS = 96, 26, 40, 7
# Rewards from low to high, in colours that also differ in brightness.
LOW, HIGH, LOST = (68, 1, 84), (253, 211, 37), (200, 200, 200)
MOST = 8  # groups that are drawn


def draw(trace: Trace, chosen: Tensor, captions: Sequence[str] = ()) -> Image.Image:
    """Draw the first groups of a run, one below the other: a column an event, a row a particle.

    A dot is a particle's clean estimate at an event, its colour the reward (within the group's own range); lines lead to its
    copies at the next event, thick where they lead to the chosen particle at the end.

    Args:
        chosen: (P,), a particle each. captions: one a group.

    Raises:
        DiffsteerError: a run without events.
    """
    if not trace.events:
        raise DiffsteerError("a run without events has no lineage to draw")
    groups, particles = trace.events[0].ancestors.shape
    shown, columns = min(groups, MOST), len(trace.events)
    height = MARGIN + particles * TALL + 14
    canvas = Image.new("RGB", (2 * MARGIN + (columns - 1) * WIDE + 60, shown * height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for p in range(shown):
        top = p * height
        pen.text((10, top + 4), captions[p] if p < len(captions) else f"image {p + 1}", fill="black", font=font)
        finite = [float(r) for e in trace.events for r in e.rewards[p] if math.isfinite(r)]
        low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
        path = _path(trace, p, int(chosen[p]))

        def at(column: int, k: int, top: int = top) -> tuple[int, int]:
            return MARGIN + column * WIDE, top + MARGIN + k * TALL

        for c in range(1, columns):
            for k, ancestor in enumerate(trace.events[c - 1].ancestors[p].tolist()):
                main = path[c] == k
                pen.line(
                    [at(c - 1, ancestor), at(c, k)], fill=(40, 40, 40) if main else (190, 190, 190), width=3 if main else 1
                )
        for c, event in enumerate(trace.events):
            x, _ = at(c, 0)
            pen.text((x - 14, top + 18), f"step {event.done}", fill=(90, 90, 90), font=font)
            for k, reward in enumerate(event.rewards[p].tolist()):
                x, y = at(c, k)
                box = (x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS)
                pen.ellipse(box, fill=_colour(reward, low, high), outline="black" if path[c] == k else None, width=2)
                if c == columns - 1:
                    pen.text((x + 12, y - 6), f"{reward:.3g}", fill="black", font=font)
    return canvas


def _path(trace: Trace, group: int, chosen: int) -> list[int]:
    """Where the chosen particle was at each event."""
    path = [chosen]
    for event in reversed(trace.events[:-1]):
        path.append(int(event.ancestors[group, path[-1]]))
    return path[::-1]


def _colour(reward: float, low: float, high: float) -> tuple[int, int, int]:
    if not math.isfinite(reward):
        return LOST
    share = (reward - low) / (high - low) if high > low else 1.0
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(LOW, HIGH, strict=True))
    return red, green, blue
