"""The level that a row is really at: read from its variance, within a window around the level it should be at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffsteer.algebra import Level
from diffsteer.types import DiffsteerError, check_numbers, setting

REFERENCES = ("calibrated", "noise", "data_var")
SIDES = ("conditioning", "update")
ORDERS = (1, 2, 4)


class Shifted(NamedTuple):
    """Of every row of a session: the time that its network is asked for, (N,), and the level that its state is taken to be
    at."""

    asked: Tensor
    at: Level

    def of(self, rows: list[int]) -> Shifted:
        """Of some rows."""
        return Shifted(self.asked[rows], Level(self.at.alpha[rows], self.at.sigma[rows]))


class Clock(NamedTuple):
    """What a model calls its levels: `times` of the grid's T steps, and all that the model knows.

    Attributes:
        times: (T,). table: (M, 3) of time, alpha and sigma, times rising.
    """

    times: Tensor
    table: Tensor

    @property
    def unit(self) -> float:
        """A thousandth of the model's range of times: 1 for schedules of 1,000 whole times."""
        known = self.table[:, 0]
        whole = bool((known[1:] - known[:-1] == 1).all())
        return (len(known) if whole else float(known[-1] - known[0])) / 1000

    def level(self, t: Tensor) -> Level:
        """The levels of times (N,). Between two of the table an angle is interpolated where ``alpha^2 + sigma^2 = 1``, or
        else both."""
        known, alpha, sigma = self.table.T.contiguous()
        t = t.double().clamp(float(known[0]), float(known[-1]))
        above = torch.searchsorted(known, t).clamp(1, len(known) - 1)
        share = (t - known[above - 1]) / (known[above] - known[above - 1])
        low, high = (Level(alpha[i], sigma[i]) for i in (above - 1, above))
        if not torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha)):
            return Level(*(torch.lerp(a, b, share) for a, b in zip(low, high, strict=True)))
        angle = torch.lerp(torch.atan2(low.sigma, low.alpha), torch.atan2(high.sigma, high.alpha), share)
        return Level(angle.cos(), angle.sin())  # whole times give the table's own pairs

    def window(self, nominal: float, width: float) -> Tensor:
        """Times of the table at most half the width (in units) away, (M',); a table of whole times has one a step."""
        known = self.table[:, 0]
        near = known[(known - nominal).abs() <= width * self.unit / 2]
        return near if len(near) else torch.tensor([nominal], dtype=torch.float64)


@dataclass(frozen=True)
class Timing:
    """How levels are read from variances; see `diffsteer.samplers.TimeShift`.

    Args:
        window: width around the nominal time, in thousandths of the model's range of times; 0 shifts nothing.
        cutoff: no shift at times at or below it.
        reference: the variance that a state should have: "noise", sigma^2 (as published); "data_var", ``alpha^2 v +
            sigma^2`` with ``v = data_variance``; "calibrated", the same with v measured on a plain run of the model.
        side: what is told the shifted level: "conditioning", the network and the update; "update", the update alone.
        order: of the solver: 1 DDIM or DDPM, 2 and 4 the pseudo linear multistep S-PNDM and F-PNDM.
        epsilon_scale: the predicted noise is divided by it.

    Raises:
        DiffsteerError: a value out of its range.
    """

    window: float = setting(40.0, low=0)
    cutoff: float = setting(300.0, low=0)
    reference: str = setting("calibrated", choices=REFERENCES)
    data_variance: float | None = setting(None, low=0)
    side: str = setting("conditioning", choices=SIDES)
    order: int = 1
    epsilon_scale: float = setting(1.0, low=0)

    def __post_init__(self) -> None:
        check_numbers(
            "", {"order": self.order}, {n: getattr(self, n) for n in ("window", "cutoff", "epsilon_scale", "data_variance")}
        )
        for name, value, valid in (
            ("reference", self.reference, REFERENCES),
            ("side", self.side, SIDES),
            ("order", self.order, ORDERS),
        ):
            if value not in valid:
                raise DiffsteerError(f"{name}={value!r} is unknown; valid: {', '.join(map(str, valid))}")
        for name in ("window", "cutoff"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise DiffsteerError(f"{name}={getattr(self, name)}; it must be finite and at least 0")
        if not 0 < self.epsilon_scale < float("inf"):
            raise DiffsteerError(f"epsilon_scale={self.epsilon_scale}; it must be positive")
        if (self.data_variance is not None) != (self.reference == "data_var"):
            raise DiffsteerError("data_variance= goes with reference=data_var, which needs it")
        if self.data_variance is not None and not 0 <= self.data_variance < float("inf"):
            raise DiffsteerError(f"data_variance={self.data_variance}; it must be finite and at least 0")

    @property
    def calibrates(self) -> bool:
        """Is a plain run taken first?"""
        return self.window > 0 and self.reference == "calibrated"

    def evaluations(self, steps: int, blind: int = 0) -> int:
        """Of the network for one row, a calibration left out: the higher orders begin with single steps of their own order.

        Args:
            blind: steps at the beginning from levels with next to no signal, which are of first order.
        """
        first, more = {1: (0, 0), 2: (1, 1), 4: (3, 3)}[self.order]
        return steps + max(0, min(first, steps - 1 - blind)) * more


@dataclass(frozen=True)
class Shift:
    """What was found at a step: `times` (N,) beside the nominal one, and which rows stand at the edge of the window, (N,) bool.

    Attributes:
        flat: rows where an honest state's variance varies by more than the reference does over the window, (N,) bool: what
            is found there is noise.
    """

    step: int
    nominal: float
    times: Tensor
    edge: Tensor
    flat: Tensor

    @property
    def by(self) -> Tensor:
        """How far each row was shifted, (N,)."""
        return self.times - self.nominal


def reference_variance(at: Level, data_variance: Tensor) -> Tensor:
    """What the variance of a state should be: ``alpha^2 v + sigma^2``. For v = 0 that of the noise alone."""
    return at.alpha**2 * data_variance + at.sigma**2


def sample_variance(x: Tensor) -> Tensor:
    """Of each row (N, ...) over all its elements, unbiased, (N,) in float64."""
    return x.double().flatten(1).var(1)


def match(
    x: Tensor, nominal: float, timing: Timing, clock: Clock, data_variance: Tensor, spread: float = 0.0, step: int = 0
) -> Shift:
    """The time in the window whose reference variance each row's own is nearest to; of equals the nearest to the nominal one.

    Args:
        x: (N, ...). data_variance: of clean samples, (N,). spread: standard deviation of that from sample to sample.
    """
    around = clock.window(nominal, timing.window)
    around = around[(around - nominal).abs().argsort(stable=True)]
    at = clock.level(around)
    curve = reference_variance(at, data_variance[:, None])  # (N, M')
    found = (sample_variance(x)[:, None].cpu() - curve).abs().argmin(1)  # the first of equals
    times, count = around[found], x[0].numel()
    edge = (times == around.min()) | (times == around.max())
    here = clock.level(torch.tensor([nominal], dtype=torch.float64))
    honest = reference_variance(here, data_variance) * (2 / max(count - 1, 1)) ** 0.5 + here.alpha**2 * spread
    flat = (curve.amax(1) - curve.amin(1)) < honest
    return Shift(step, nominal, times, edge & (len(around) > 1), flat)
