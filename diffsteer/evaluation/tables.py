"""What `diffsteer evaluate` leaves beside pictures: a line a case, a line a metric, and a table for people."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffsteer.charts import number
from diffsteer.evaluation.intervals import Interval
from diffsteer.evaluation.measure import COSTS, Case, Front, Results, Row
from diffsteer.files import replacing


def write_cases(path: Path, results: Results) -> None:
    """A line a cell, prompt and seed."""
    names = [*results.scores, *(c for c in COSTS if c in results.known)]
    lines: list[Sequence[object]] = [("cell", "sampler", "budget", "id", "seed", *names, "image")]
    for cell, (label, budget) in results.cells.items():
        for id in results.prompts:
            for seed in results.seeds:
                case: Case = results.cases[cell][id][seed]
                told = [_exact({**case.scores, **case.cost}[name]) for name in names]
                place = case.image.relative_to(path.parent) if case.image.is_relative_to(path.parent) else case.image
                lines.append((cell, label, "" if budget is None else budget, id, seed, *told, place.as_posix()))
    _write(path, lines)


def write_metrics(path: Path, rows: Iterable[Row]) -> None:
    """A line a cell and metric, with 95 % intervals; differences are to the first cell, prompt by prompt."""
    heads = ("cell", "sampler", "budget", "metric", "value", "low", "high", "difference", "difference_low", "difference_high")
    lines: list[Sequence[object]] = [heads]
    for r in rows:
        told = [_exact(v) for v in (*r.value, *r.difference)]
        lines.append((r.cell, r.label, "" if r.budget is None else r.budget, r.metric, *told))
    _write(path, lines)


def write_fronts(path: Path, front: Front) -> None:
    """A line a cell: where it lies, and whether it is on the front; then the volumes, a line a sampler."""
    lines: list[Sequence[object]] = [("what", "name", *front.axes, "on_front", "hypervolume", "low", "high")]
    blank = [""] * len(front.axes)
    for name, point in front.points.items():
        lines.append(("cell", name, *map(_exact, point), int(name in front.on_front), "", "", ""))
    for name, volume in front.volumes.items():
        lines.append(("sampler", name, *blank, "", *map(_exact, volume)))
    lines.append(("reference", "", *map(_exact, front.reference), "", "", "", ""))
    _write(path, lines)


def markdown(rows: Sequence[Row], front: Front | None, about: Sequence[str]) -> str:
    """The table for people: a line a cell, a column a metric, and what stands beside it."""
    metrics = list(dict.fromkeys(r.metric for r in rows))
    cells = list(dict.fromkeys(r.cell for r in rows))
    by = {(r.cell, r.metric): r for r in rows}
    lines = ["| | " + " | ".join(m.replace("_", " ") for m in metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for cell in cells:
        lines.append(f"| {cell} | " + " | ".join(shown(by[cell, m].value) for m in metrics) + " |")
    against = [m for m in metrics if m not in COSTS]
    lines += ["", f"Differences to {cells[0]}, prompt by prompt:", ""]
    lines += ["| | " + " | ".join(against) + " |", "|---" * (len(against) + 1) + "|"]
    for cell in cells[1:]:
        lines.append(f"| {cell} | " + " | ".join(shown(by[cell, m].difference, True) for m in against) + " |")
    if len(cells) == 1:
        del lines[-4:]
    if front is not None:
        from_where = ", ".join(f"{a} {number(v)}" for a, v in zip(front.axes, front.reference, strict=True))
        lines += ["", f"On the front of {', '.join(front.axes)}: {', '.join(front.on_front)}."]
        volumes = ", ".join(f"{name} {shown(v)}" for name, v in front.volumes.items())
        lines += [f"Volume above {from_where}: {volumes}."]
    return "\n".join([*lines, "", *about]) + "\n"


def shown(value: Interval, signed: bool = False) -> str:
    """A number and its interval, short."""
    if math.isnan(value.value):
        return "none"
    sign = "+" if signed and value.value > 0 else ""
    if value.low == value.high or math.isnan(value.low) or math.isnan(value.high):
        return sign + number(value.value)
    digits = max(0, 2 - math.floor(math.log10(max(value.high - value.low, 1e-9))) - 1)
    return f"{sign}{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value)) if value != round(value) else str(int(value))


def _write(path: Path, lines: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    with replacing(path) as part:
        part.write_text(text.getvalue(), encoding="utf-8")
