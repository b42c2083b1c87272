"""How sure a number is: 95 % intervals over prompts, which are what would be others next time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

LEVEL, DRAWS, GROUPS = 0.95, 4000, 10


class Interval(NamedTuple):
    """A value between two ends; the ends are NaN where nothing can be said of them."""

    value: float
    low: float
    high: float


def bootstrap(values: Any) -> Interval:
    """The mean of a value a prompt, with percentiles of its bootstrap over prompts (Efron, 1979). With few prompts, or values
    that are nearly all the same, it is too narrow: of 0 wrong in 6 it says 0 to 0.

    Args:
        values: numbers, (P,).

    Returns:
        NaN where a value is NaN, and ends of NaN for less than two prompts.
    """
    from scipy import stats

    told = np.asarray(values, dtype=np.float64)
    mean = float(told.mean()) if len(told) else math.nan
    if len(told) < 2 or not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan)
    if np.ptp(told) == 0:
        return Interval(mean, mean, mean)
    rng = np.random.default_rng(0)
    found = stats.bootstrap(
        (told,), np.mean, n_resamples=DRAWS, batch=64, confidence_level=LEVEL, method="percentile", rng=rng
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def jackknife(statistic: Callable[[Sequence[int]], Sequence[float]], prompts: int) -> list[Interval]:
    """Any statistics of a set, with intervals from leaving out one tenth of the prompts at a time (Quenouille, 1956; Tukey,
    1958), Student's t telling how wide: for distances and neighbours, which samples drawn twice, as a bootstrap has them,
    would distort.

    Args:
        statistic: several numbers of the prompts with these indices. prompts: how many there are.

    Returns:
        Ends of NaN for less than two prompts, or where a number is NaN.
    """
    from scipy import stats

    groups = min(GROUPS, prompts)
    whole = np.asarray(statistic(range(prompts)), dtype=np.float64)
    if groups < 2:
        return [Interval(float(v), math.nan, math.nan) for v in whole]
    left = np.stack([np.asarray(statistic([p for p in range(prompts) if p % groups != g])) for g in range(groups)])
    error = np.sqrt((groups - 1) / groups * np.square(left - left.mean(0)).sum(0))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, groups - 1)) * error
    return [Interval(float(v), float(v - r), float(v + r)) for v, r in zip(whole, reach, strict=True)]
