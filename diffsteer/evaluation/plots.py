"""The plots of `diffsteer evaluate`: metrics against what they cost, and aims against each other. PNG, by matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffsteer.evaluation.intervals import Interval
from diffsteer.evaluation.measure import LOWER, Front, Row
from diffsteer.files import replacing

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")  # told apart by most eyes
MARKS = "osD^vP*X"


def plot_scaling(path: Path, rows: Sequence[Row], metrics: Sequence[str]) -> None:
    """Two panels a metric, against evaluations and against seconds, both a prompt; bars are 95 % intervals."""
    plt = _pyplot()
    by, labels = {(r.cell, r.metric): r.value for r in rows}, _labels(rows)
    lines = math.ceil(len(metrics) / 2)
    figure, axes = plt.subplots(lines, 4, figsize=(17, 2.6 * lines + 0.6), squeeze=False)
    panels = [(line[c], line[c + 1]) for line in axes for c in (0, 2)]
    for (left, right), metric in zip(panels, metrics, strict=False):
        for axis, cost in ((left, "evaluations"), (right, "seconds")):
            for n, (label, cells) in enumerate(labels.items()):
                points = sorted((by[c, cost].value, *by[c, metric]) for c in cells)
                values = [Interval(*p[1:]) for p in points]
                style: dict[str, Any] = {"color": COLOURS[n % len(COLOURS)], "marker": MARKS[n % len(MARKS)], "ms": 5}
                axis.errorbar(
                    [p[0] for p in points], [v.value for v in values], _bars(values), label=label, capsize=2.5, lw=1.4, **style
                )
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
            axis.grid(alpha=0.3)
            axis.set_xlabel(f"{cost} a prompt")
        left.set_ylabel(metric + (", less is better" if metric in LOWER else ""))
        right.sharey(left)
    for pair in panels[len(metrics) :]:
        for axis in pair:
            axis.set_visible(False)
    axes[0][1].legend(fontsize=8)
    _save(figure, path)


def plot_fronts(path: Path, front: Front, rows: Sequence[Row]) -> None:
    """One panel for every two axes: each cell a point with its 95 % intervals, the front of those two as steps."""
    from diffsteer.evaluation.fronts import pareto_front

    plt = _pyplot()
    by, labels = {(r.cell, r.metric): r.value for r in rows}, _labels(rows)
    pairs = list(itertools.combinations(range(len(front.axes)), 2))
    figure, panels = plt.subplots(1, len(pairs), figsize=(4.8 * len(pairs), 4.2), squeeze=False)
    for panel, (a, b) in zip(panels[0], pairs, strict=True):
        for n, (label, cells) in enumerate(labels.items()):
            xs, ys = [front.points[c][a] for c in cells], [front.points[c][b] for c in cells]
            bars = [_bars([by[c, front.axes[k]] for c in cells], front.axes[k] in LOWER) for k in (a, b)]
            style = {"color": COLOURS[n % len(COLOURS)], "ms": 7, "elinewidth": 0.8, "capsize": 2}
            panel.errorbar(xs, ys, bars[1], bars[0], MARKS[n % len(MARKS)], label=label, **style)
            for cell, x, y in zip(cells, xs, ys, strict=True):
                if cell != label:
                    panel.annotate(
                        cell.removeprefix(label + "-"), (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8
                    )
        flat = [(p[a], p[b]) for p in front.points.values()]
        edge = sorted(flat[i] for i in pareto_front(flat))
        panel.step([x for x, _ in edge], [y for _, y in edge], where="pre", color="grey", lw=1, alpha=0.8, zorder=0)
        panel.set_xlabel(_towards(front.axes[a]))
        panel.set_ylabel(_towards(front.axes[b]))
        panel.grid(alpha=0.3)
        panel.margins(0.15)
    panels[0][0].legend(fontsize=8)
    _save(figure, path)


def _labels(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The cells of each label."""
    found: dict[str, list[str]] = {}
    for r in rows:
        cells = found.setdefault(r.label, [])
        if r.cell not in cells:
            cells.append(r.cell)
    return found


def _towards(axis: str) -> str:
    return f"-{axis}" if axis in LOWER else axis


def _bars(values: Sequence[Interval], turned: bool = False) -> list[list[float]]:
    """How far the ends of intervals are from their values, below and above; the other way round where the sign is turned."""
    ends = [[_reach(v.value - v.low) for v in values], [_reach(v.high - v.value) for v in values]]
    return ends[::-1] if turned else ends


def _reach(value: float) -> float:
    return 0.0 if math.isnan(value) else max(0.0, value)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)
