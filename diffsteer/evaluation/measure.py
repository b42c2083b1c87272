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
from diffsteer.evaluation.intervals import Bounds, Interval, jackknife, mean_interval
from diffsteer.evaluation.metrics import Against
from diffsteer.types import DiffsteerError

COSTS = ("evaluations", "backwards", "decodes", "tiny_decodes", "reward_calls", "seconds")
RARE = ("backwards", "tiny_decodes")  # told where there are some
DIVERSE, SETS = ("distance", "vendi"), ("fid", "kid", "precision", "recall", "density", "coverage")
LOWER = ("fid", "kid")  # is better
BOUNDS: dict[str, Bounds] = {
    "checker": (0, 1),
    "distance": (0, 2),
    "vendi": (1, math.inf),
    "fid": (0, math.inf),
    "precision": (0, 1),
    "recall": (0, 1),
    "density": (0, math.inf),
    "coverage": (0, 1),
    **{cost: (0, math.inf) for cost in COSTS},
}
FREE: Bounds = (-math.inf, math.inf)
Cells = Mapping[str, tuple[str, int | None]]  # label and budget, by name
Cases = Mapping[str, Mapping[Any, Mapping[int, "Case"]]]  # by cell, prompt and seed


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
    """Cells as points on several axes, where more is better (`LOWER` ones with their sign changed): which are on the front, how
    much each label's cells cover together, and from where it is counted."""

    axes: tuple[str, ...]
    points: dict[str, tuple[float, ...]]
    on_front: list[str]
    volumes: dict[str, Interval]
    reference: tuple[float, ...]


class Results:
    """What all cells made of the prompts that all of them have, with all seeds.

    Args:
        features: of a list of pictures, (N, D); None leaves out whatever compares pictures.
        real: features (M, D) of real ones, from these prompts; None leaves out what wants them. neighbours: of density and its
            like.

    Raises:
        DiffsteerError: no prompt that all cells have.
    """

    def __init__(
        self,
        cells: Cells,
        cases: Cases,
        seeds: Sequence[int],
        features: Callable[[Sequence[Path]], Tensor] | None = None,
        real: Callable[[Sequence[Any]], Tensor] | None = None,
        neighbours: int = 3,
    ) -> None:
        self.cells, self.cases, self.seeds = cells, cases, list(seeds)
        everyone = dict.fromkeys(id for name in cells for id in cases[name])
        self.prompts = [id for id in everyone if all(set(self.seeds) <= set(cases[c].get(id, {})) for c in cells)]
        if not self.prompts:
            raise DiffsteerError("no prompt is done by all samplers, so that there is nothing to compare")
        self.features: dict[str, Tensor] = {}  # (P, S, D)
        compares = features is not None and (len(self.seeds) > 1 or real is not None)
        for name in cells if compares else ():
            assert features is not None
            found = features([case.image for id in self.prompts for case in self._of(name, id)])
            self.features[name] = found.view(len(self.prompts), len(self.seeds), -1)
        self.against = Against(real(self.prompts), neighbours) if self.features and real is not None else None
        self.sets: list[str] = []
        if self.against is not None:
            self.sets = sets_of(len(self.prompts), len(self.seeds), len(self.against.features), neighbours)
        self._sets_known: dict[tuple[str, tuple[int, ...]], dict[str, float]] = {}
        spent = [case.cost for name in cells for id in self.prompts for case in self._of(name, id)]
        self.costs = [c for c in COSTS if c not in RARE or any(cost.get(c) for cost in spent)]
        self.by_prompt = {name: self._by_prompt(name) for name in cells}
        metrics = next(iter(self.by_prompt.values()))
        # of each metric the prompts for which every cell has a number
        self.known = {m: np.all([np.isfinite(of[m]) for of in self.by_prompt.values()], axis=0) for m in metrics}

    @property
    def scores(self) -> list[str]:
        """The names of all rewards, the one that steers first."""
        first = self._of(next(iter(self.cells)), self.prompts[0])[0]
        return list(first.scores)

    @property
    def metrics(self) -> list[str]:
        """All that can be an axis: what is measured but costs."""
        return [*(m for m in self.known if m not in COSTS), *self.sets]

    def rows(self) -> list[Row]:
        """Every metric of every cell, costs last."""
        base = next(iter(self.cells))
        sets, differences = self._sets()
        rows = []
        for name, (label, budget) in self.cells.items():
            for metric in [*self.metrics, *(m for m in COSTS if m in self.known)]:
                if metric in self.sets:
                    value, difference = sets[name, metric].within(BOUNDS.get(metric, FREE)), differences[name, metric]
                else:
                    known, bounds = self.known[metric], BOUNDS.get(metric, FREE)
                    mine, other = self.by_prompt[name][metric][known], self.by_prompt[base][metric][known]
                    value, difference = mean_interval(mine, bounds), mean_interval(mine - other)
                rows.append(Row(name, label, budget, metric, value, difference))
        return rows

    def front(self, axes: Sequence[str]) -> Front:
        """The cells on some axes.

        Raises:
            DiffsteerError: an axis that was not measured.
        """
        check_axes(axes, self.metrics)

        def points(prompts: Sequence[int]) -> dict[str, tuple[float, ...]]:
            signs = [-1 if a in LOWER else 1 for a in axes]
            return {
                name: tuple(sign * self._value(name, a, list(prompts)) for a, sign in zip(axes, signs, strict=True))
                for name in self.cells
            }

        whole = points(range(len(self.prompts)))
        worst = [min((p[n] for p in whole.values() if math.isfinite(p[n])), default=math.nan) for n in range(len(axes))]
        floors = [-math.inf if a in LOWER else BOUNDS.get(a, FREE)[0] for a in axes]
        reference = tuple(f if math.isfinite(f) else w for f, w in zip(floors, worst, strict=True))
        labels = list(dict.fromkeys(label for label, _ in self.cells.values()))

        def volumes(prompts: Sequence[int]) -> list[float]:
            at = points(prompts)
            of = [[at[name] for name, (mine, _) in self.cells.items() if mine == label] for label in labels]
            return [
                hypervolume(group, reference) if all(map(math.isfinite, [*reference, *sum(group, ())])) else math.nan
                for group in (*of, list(at.values()))
            ]

        each = zip([*labels, "all"], jackknife(volumes, len(self.prompts)), strict=True)
        found = {label: v.within((0, math.inf)) for label, v in each}
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
            for metric in (c for c in self.costs if c in mine[0].cost):
                found[metric].append(float(np.mean([case.cost[metric] for case in mine])))
        return {metric: np.asarray(values) for metric, values in found.items()}

    def _value(self, name: str, metric: str, prompts: list[int]) -> float:
        if metric in self.sets:
            return self._of_set(name, prompts)[metric]
        known = [p for p in prompts if self.known[metric][p]]
        return float(self.by_prompt[name][metric][known].mean()) if known else math.nan

    def _of_set(self, name: str, prompts: list[int]) -> dict[str, float]:
        """Remembered: the front leaves out the same prompts as the table does."""
        assert self.against is not None
        key = name, tuple(prompts)
        if key not in self._sets_known:
            made = self.features[name][torch.tensor(prompts)].flatten(0, 1)
            found = {"fid": self.against.frechet_distance(made), "kid": self.against.kernel_distance(made)}
            found |= self.against.manifolds(made)._asdict() if "density" in self.sets else {}
            self._sets_known[key] = found
        return self._sets_known[key]

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


def sets_of(prompts: int, seeds: int, real: int, neighbours: int) -> list[str]:
    """The metrics of sets for which there are samples enough, one tenth of the prompts (one at least) left out."""
    left = prompts - math.ceil(prompts / 10) if prompts > 1 else 1
    fewest = min(left * seeds, real)
    return [m for m in SETS if fewest >= (2 if m in LOWER else neighbours + 1)]


def check_axes(axes: Sequence[str], measured: Sequence[str]) -> None:
    """Refuse axes that are no metrics.

    Raises:
        DiffsteerError: with those that are.
    """
    for axis in axes:
        if axis not in measured:
            raise DiffsteerError(f"evaluate.axes: {axis} is not measured; valid: {', '.join(measured)}")
