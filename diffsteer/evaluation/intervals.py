"""How sure a number is: 95 % intervals over prompts, which are what would be others next time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

LEVEL, GROUPS = 0.95, 10
Bounds = tuple[float, float]


class Interval(NamedTuple):
    """A value between two ends; the ends are NaN where nothing can be said of them."""

    value: float
    low: float
    high: float

    def within(self, bounds: Bounds) -> Interval:
        """No further than the value itself can go."""
        low, high = bounds
        return Interval(self.value, low if self.low < low else self.low, high if self.high > high else self.high)


def mean_interval(values: Any, bounds: Bounds = (-math.inf, math.inf)) -> Interval:
    """The mean of a value a prompt, (P,), by Student's t (1908): right for few prompts, too, as far as their values are normal.

    Args:
        bounds: of each value. Where all of them are at one of two finite bounds, nothing was seen to vary: then the interval
            is that of a share of P trials (Clopper & Pearson, 1934), as if each prompt had been one.

    Returns:
        Ends of NaN for less than two prompts, or where a value is NaN.
    """
    from scipy import stats

    told = np.asarray(values, dtype=np.float64)
    n, mean = len(told), float(told.mean()) if len(told) else math.nan
    if n < 2 or not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan)
    low, high = bounds
    if np.ptp(told) == 0 and math.isfinite(high - low) and mean in bounds:
        reach = (high - low) * (1 - ((1 - LEVEL) / 2) ** (1 / n))
        return Interval(mean, max(low, mean - reach), min(high, mean + reach))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * float(told.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - reach, mean + reach).within(bounds)


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
