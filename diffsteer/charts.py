"""Small drawings for a report, as SVG: curves with their points told, and the lines of a family tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BELOW, ABOVE = 320, 150, 44, 24, 10
Point = tuple[float, float | None]
Curve = tuple[str, Sequence[Point]]  # a name, and points with numbers or none


def curves(title: str, across: str, lines: Sequence[Curve], span: tuple[float, float] | None = None) -> str:
    """Lines through points, each point with its numbers for whoever points at it; nothing of lines without numbers.

    Args:
        span: from where to where the drawing goes up, if not as far as the numbers do.
    """
    known = [(x, y) for _, points in lines for x, y in points if y is not None and math.isfinite(y)]
    if not known:
        return ""
    xs, ys = [x for x, _ in known], [y for _, y in known]
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))
    low, high = span or ((low, high) if high > low else (low - 0.5, high + 0.5))

    def place(x: float, y: float) -> tuple[float, float]:
        share = 0.5 if right == left else (x - left) / (right - left)
        return LEFT + share * (WIDTH - LEFT - 10), HEIGHT - BELOW - (y - low) / (high - low) * (HEIGHT - BELOW - ABOVE)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts.append(f"<title>{escape(title)}</title>")
    for y in (low, high):
        parts.append(f'<text x="{LEFT - 5}" y="{place(left, y)[1] + 4:.1f}" class="tick end">{number(y)}</text>')
    base = HEIGHT - BELOW
    parts.append(f'<line x1="{LEFT}" y1="{base}" x2="{WIDTH - 10}" y2="{base}" class="axis"/>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}" class="tick">{number(left)}</text>')
    parts.append(f'<text x="{WIDTH - 10}" y="{HEIGHT - 8}" class="tick end">{number(right)} {escape(across)}</text>')
    for n, (name, points) in enumerate(lines):
        there = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in there))
        parts.append(f'<polyline points="{path}" class="line c{n % 4}"/>')
        for x, y in there:
            px, py = place(x, y)
            told = f"{name}: {number(y)} at {number(x)} {across}"
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" class="dot c{n % 4}"><title>{escape(told)}</title></circle>'
            )
    parts.append("</svg>")
    keys = "".join(f'<span class="key c{n % 4}">{escape(name)}</span>' for n, (name, _) in enumerate(lines))
    return f"<figure><figcaption>{escape(title)} {keys if len(lines) > 1 else ''}</figcaption>{''.join(parts)}</figure>"


def descent(ancestors: Sequence[int]) -> str:
    """Lines from each column to the columns that descend from it."""
    k = len(ancestors)
    lines = "".join(
        f'<path d="M{a + 0.5:g} 0 C{a + 0.5:g} 0.5 {c + 0.5:g} 0.5 {c + 0.5:g} 1" vector-effect="non-scaling-stroke"/>'
        for c, a in enumerate(ancestors)
    )
    return f'<svg class="descent" viewBox="0 0 {k} 1" preserveAspectRatio="none" aria-hidden="true">{lines}</svg>'


def number(value: float | None) -> str:
    """Short, for people."""
    if value is None or not math.isfinite(value):
        return "none"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.4g}"
