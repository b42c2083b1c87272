"""Several aims at once: which points no other beats, and how much a set of points covers."""

from __future__ import annotations

from collections.abc import Sequence

Point = Sequence[float]


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Which points are not dominated: no other is as good on every axis and better on one. More is better on every axis. A
    point with NaN is on no front; equal points share their fate.

    Cost: quadratic in the number of points.
    """

    def beats(a: Point, b: Point) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))

    known = [i for i, p in enumerate(points) if all(v == v for v in p)]
    return [i for i in known if not any(beats(points[j], points[i]) for j in known)]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume of what lies above `reference` and below at least one of the points, on every axis (Zitzler & Thiele, 1998).
    Exact, by slices along the last axis. A point that is not above the reference on every axis adds nothing.

    Cost: grows with the number of points to the power of axes; meant for some dozens of points on two to four axes.
    """
    above = [tuple(map(float, p)) for p in points if all(v > r for v, r in zip(p, reference, strict=True))]
    if not above:
        return 0.0
    if len(reference) == 1:
        return max(p[0] for p in above) - reference[0]
    above.sort(key=lambda p: -p[-1])
    volume = 0.0
    for n, point in enumerate(above):
        below = above[n + 1][-1] if n + 1 < len(above) else reference[-1]
        if point[-1] > below:
            volume += (point[-1] - below) * hypervolume([p[:-1] for p in above[: n + 1]], reference[:-1])
    return volume
