"""From folders of results to values: what each cell made of each prompt with each seed, and what that amounts to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffsteer.diversity import diversity
from diffsteer.evaluation.fronts import hypervolume, pareto_front
from diffsteer.evaluation.intervals import Interval, bootstrap, jackknife
from diffsteer.evaluation.metrics import frechet_distance, kernel_distance, manifolds
from diffsteer.types import DiffsteerError

COSTS = ("evaluations", "decodes", "reward_calls", "seconds")
DIVERSE, SETS = ("distance", "vendi"), ("fid", "kid", "precision", "recall", "density", "coverage")
LOWER = ("fid", "kid")  # is better
FLOORS = {"checker": 0.0, "distance": 0.0, "vendi": 1.0, "fid": 0.0, "density": 0.0}
FLOORS |= dict.fromkeys(("precision", "recall", "coverage"), 0.0)
SHARES = ("precision", "recall", "coverage")  # at most 1


@dataclass(frozen=True)
class Case:
    """One prompt under one cell with one seed: scores by name, cost by name, and the picture that was chosen."""

    scores: dict[str, float]
    cost: dict[str, float]
    image: Path


@dataclass(frozen=True)
class Row:
    """A metric of a cell, and its difference to the first cell's, both with intervals over prompts."""

    cell: str
    label: str
    budget: int | None
    metric: str
    value: Interval
    difference: Interval


@dataclass(frozen=True)
class Front:
    """Cells as points on several axes, where more is better (`LOWER` ones with their sign changed): which are on the front,
    how much each label's cells cover together, and from where it is counted."""

    axes: tuple[str, ...]
    points: dict[str, tuple[float, ...]]
    on_front: list[str]
    volumes: dict[str, Interval]
    reference: tuple[float, ...]


class Results:
    """What all cells made of the prompts that all of them have, with all seeds.

    Args:
        cells: by name, label and budget. cases: by cell, prompt and seed.
        features: of a list of pictures, (N, D); None leaves out whatever compares pictures.
        real: features (M, D) of real ones; None leaves out what wants them. neighbours: of density and its like.

    Raises:
        DiffsteerError: no prompt that all cells have.
    """

    def __init__(
        self,
        cells: Mapping[str, tuple[str, int | None]],
        cases: Mapping[str, Mapping[Any, Mapping[int, Case]]],
        seeds: Sequence[int],
        features: Callable[[Sequence[Path]], Tensor] | None = None,
        real: Tensor | None = None,
        neighbours: int = 3,
    ) -> None:
        self.cells, self.cases, self.seeds, self.real, self.neighbours = cells, cases, list(seeds), real, neighbours
        everyone = [id for name in cells for id in cases[name]]
        self.prompts = [
            id for id in dict.fromkeys(everyone) if all(set(self.seeds) <= set(cases[c].get(id, {})) for c in cells)
        ]
        if not self.prompts:
            raise DiffsteerError("no prompt is done by all samplers, so that there is nothing to compare")
        self.features: dict[str, Tensor] = {}  # (P, S, D)
        for name in cells if features is not None else ():
            assert features is not None
            found = features([case.image for id in self.prompts for case in self._of(name, id)])
            self.features[name] = found.view(len(self.prompts), len(self.seeds), -1)
        self.sets = [m for m in SETS if self.features and real is not None and self._large_enough(m)]
        self.by_prompt = {name: self._by_prompt(name) for name in cells}

    @property
    def scores(self) -> list[str]:
        """The names of all rewards, the one that steers first."""
        first = self._of(next(iter(self.cells)), self.prompts[0])[0]
        return list(first.scores)

    def rows(self) -> list[Row]:
        """Every metric of every cell."""
        base = next(iter(self.cells))
        sets, differences = self._sets()
        rows = []
        for name, (label, budget) in self.cells.items():
            mine = {
                metric: (bootstrap(values), bootstrap(values - self.by_prompt[base][metric]))
                for metric, values in self.by_prompt[name].items()
            }
            mine |= {m: (_within(sets[name, m], m), differences[name, m]) for m in self.sets}
            ordered = [*(m for m in mine if m not in COSTS), *COSTS]
            rows += [Row(name, label, budget, metric, *mine[metric]) for metric in ordered]
        return rows

    def front(self, axes: Sequence[str]) -> Front:
        """The cells on some axes.

        Raises:
            DiffsteerError: an axis that was not measured.
        """
        check_axes(axes, [*(m for m in next(iter(self.by_prompt.values())) if m not in COSTS), *self.sets])

        def points(prompts: Sequence[int]) -> dict[str, tuple[float, ...]]:
            return {
                name: tuple((-1 if a in LOWER else 1) * self._value(name, a, list(prompts)) for a in axes)
                for name in self.cells
            }

        whole = points(range(len(self.prompts)))
        worst = [min(p[n] for p in whole.values()) for n in range(len(axes))]
        reference = tuple(w if a in LOWER else FLOORS.get(a, w) for a, w in zip(axes, worst, strict=True))
        labels = list(dict.fromkeys(label for label, _ in self.cells.values()))

        def volumes(prompts: Sequence[int]) -> list[float]:
            at = points(prompts)
            of = [[at[name] for name, (mine, _) in self.cells.items() if mine == label] for label in labels]
            return [hypervolume(group, reference) for group in (*of, list(at.values()))]

        each = zip([*labels, "all"], jackknife(volumes, len(self.prompts)), strict=True)
        found = {label: v._replace(low=max(0.0, v.low)) for label, v in each}
        names = list(whole)
        return Front(tuple(axes), whole, [names[i] for i in pareto_front(list(whole.values()))], found, reference)

    def _of(self, name: str, id: Any) -> list[Case]:
        return [self.cases[name][id][seed] for seed in self.seeds]

    def _by_prompt(self, name: str) -> dict[str, np.ndarray]:
        """Each metric that a prompt has by itself, (P,): means over seeds, and how different what the seeds made is."""
        found: dict[str, list[float]] = defaultdict(list)
        for p, id in enumerate(self.prompts):
            mine = self._of(name, id)
            for metric in mine[0].scores:
                found[metric].append(float(np.mean([case.scores[metric] for case in mine])))
            if self.features and len(self.seeds) > 1:
                apart = diversity(F.normalize(self.features[name][p], dim=1))
                found["distance"].append(apart.distance)
                found["vendi"].append(apart.vendi)
            for metric in COSTS:
                found[metric].append(float(np.mean([case.cost[metric] for case in mine])))
        return {metric: np.asarray(values) for metric, values in found.items()}

    def _value(self, name: str, metric: str, prompts: list[int]) -> float:
        if metric in self.by_prompt[name]:
            return float(self.by_prompt[name][metric][prompts].mean())
        return self._of_set(name, prompts)[metric]

    def _of_set(self, name: str, prompts: list[int]) -> dict[str, float]:
        assert self.real is not None
        made = self.features[name][torch.tensor(prompts)].flatten(0, 1)
        found = {"fid": frechet_distance(made, self.real), "kid": kernel_distance(made, self.real)}
        if "density" in self.sets:
            found |= manifolds(made, self.real, self.neighbours)._asdict()
        return found

    def _sets(self) -> tuple[dict[tuple[str, str], Interval], dict[tuple[str, str], Interval]]:
        """What sets of pictures are told by, and its difference to the first cell's."""
        if not self.sets:
            return {}, {}
        keys = [(name, metric) for name in self.cells for metric in self.sets]

        def statistic(prompts: Sequence[int]) -> list[float]:
            each = {name: self._of_set(name, list(prompts)) for name in self.cells}
            base = next(iter(each.values()))
            return [each[n][m] for n, m in keys] + [each[n][m] - base[m] for n, m in keys]

        found = jackknife(statistic, len(self.prompts))
        return dict(zip(keys, found[: len(keys)], strict=True)), dict(zip(keys, found[len(keys) :], strict=True))

    def _large_enough(self, metric: str) -> bool:
        """Are there samples enough, one tenth of the prompts (one at least) left out?"""
        assert self.real is not None
        left = len(self.prompts) - max(1, math.ceil(len(self.prompts) / 10)) if len(self.prompts) > 1 else 1
        least = 2 if metric in ("fid", "kid") else self.neighbours + 1
        return min(left * len(self.seeds), len(self.real)) >= least


def check_axes(axes: Sequence[str], measured: Sequence[str]) -> None:
    """Refuse axes that are no metrics.

    Raises:
        DiffsteerError: with those that are.
    """
    for axis in axes:
        if axis not in measured:
            raise DiffsteerError(f"evaluate.axes: {axis} is not measured; valid: {', '.join(measured)}")


def _within(interval: Interval, metric: str) -> Interval:
    """An interval that goes no further than its metric can."""
    low = max(interval.low, FLOORS.get(metric, -math.inf))
    return interval._replace(low=low, high=min(interval.high, 1.0) if metric in SHARES else interval.high)
