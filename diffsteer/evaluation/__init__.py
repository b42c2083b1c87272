"""What methods make, measured: ``diffsteer evaluate``, and its metrics for Python.

From samples to numbers: `features` (what is compared), `metrics` (sets of features), `intervals` (how sure a number is),
`fronts` (several aims at once). The command: `cells` (what is to be run), `measure` (from folders of results to values),
`tables` and `plots` (what is left), `evaluate` (all of it). matplotlib, torchmetrics and scipy come with
``diffsteer[evaluate]``."""

from diffsteer.evaluation.fronts import hypervolume, pareto_front
from diffsteer.evaluation.intervals import Interval, jackknife, mean_interval
from diffsteer.evaluation.metrics import Against, frechet_distance, kernel_distance, manifolds

__all__ = [
    "Against",
    "Interval",
    "frechet_distance",
    "hypervolume",
    "jackknife",
    "kernel_distance",
    "manifolds",
    "mean_interval",
    "pareto_front",
]
