"""Where to put the steps: grids of noise levels for any model, as ratios sigma / alpha (the "sigmas" of EDM's space).

Those in `__all__` are data alone, and nodes of ComfyUI; `Profile` and `gits` are made of what was measured of a model
(`diffsteer.profiles`), and `Given` is a grid in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from diffsteer.types import DiffsteerError, check_numbers, setting

__all__ = ["AYS", "FlowTime", "Karras", "LogSNR"]

KINDS = ("ratios", "sigmas", "timesteps")
# Timesteps of Stable Diffusion's noise schedule, or sigmas; ten steps each and the end, which is not stepped at.
_AYS: dict[str, tuple[float, ...]] = {
    "sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
    "svd": (700, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


class Schedule(Protocol):
    """A grid: `ratios` gives (steps,) falling values from `high` to `low`; the clean level, 0, comes after them."""

    name: ClassVar[str]
    source: ClassVar[str]

    def ratios(self, steps: int, high: float, low: float) -> Tensor: ...


@dataclass(frozen=True)
class Karras:
    """Ratios whose rho-th roots are evenly spaced: more steps near the clean end than evenly spaced ones.

    Args:
        rho: 7 in the paper; 1 is evenly spaced; as it grows `log_snr` is approached.

    Raises:
        DiffsteerError: rho below 1.
    """

    rho: float = setting(7.0, low=1)

    name: ClassVar[str] = "karras"
    source: ClassVar[str] = "Karras et al., 2022, arXiv 2206.00364, eq. 5"

    def __post_init__(self) -> None:
        check_numbers("karras: ", real={"rho": self.rho})
        if not self.rho >= 1:
            raise DiffsteerError(f"karras: rho={self.rho:g}; at least 1 is needed")

    def ratios(self, steps: int, high: float, low: float) -> Tensor:
        """(steps,) in float64."""
        top, bottom = high ** (1 / self.rho), low ** (1 / self.rho)
        roots: Tensor = top + _ramp(steps) * (bottom - top)
        return roots**self.rho


@dataclass(frozen=True)
class LogSNR:
    """Evenly spaced in the logarithm of the signal-to-noise ratio."""

    name: ClassVar[str] = "log_snr"
    source: ClassVar[str] = "Lu et al., 2022, arXiv 2206.00927, section 3.2"

    def ratios(self, steps: int, high: float, low: float) -> Tensor:
        """(steps,) in float64."""
        ends = torch.tensor([high, low], dtype=torch.float64).log()
        return (ends[0] + _ramp(steps) * (ends[1] - ends[0])).exp()


@dataclass(frozen=True)
class FlowTime:
    """Evenly spaced in a flow's time ``t = sigma / (alpha + sigma)``, then shifted towards noise.

    Args:
        shift: ``t' = shift t / (1 + (shift - 1) t)``; above 1 there are more steps at high noise, where the layout is decided.

    Raises:
        DiffsteerError: a shift that is not positive.
    """

    shift: float = setting(1.0, low=0)

    name: ClassVar[str] = "flow_time"
    source: ClassVar[str] = "Esser et al., 2024, arXiv 2403.03206, eq. 23"

    def __post_init__(self) -> None:
        check_numbers("flow_time: ", real={"shift": self.shift})
        if not self.shift > 0:
            raise DiffsteerError(f"flow_time: shift={self.shift:g}; it must be positive")

    def ratios(self, steps: int, high: float, low: float) -> Tensor:
        """(steps,) in float64. A shift of t is a factor of ``t / (1 - t)``; the ends are divided by it first, so they stay."""
        top, bottom = (r / self.shift / (1 + r / self.shift) for r in (high, low))
        t = top + _ramp(steps) * (bottom - top)
        return self.shift * t / (1 - t)


@dataclass(frozen=True)
class AYS:
    """Align Your Steps: published tables of ten steps, optimised for one model each, and of use to its relatives. Their noise
    ratios are kept, those outside of the model's range put at its ends. Other lengths interpolate a table log-linearly.

    Args:
        table: "sd15" | "sdxl" | "svd", the model that it was made for.

    Raises:
        DiffsteerError: an unknown table.
    """

    table: str = setting("sd15", choices=tuple(_AYS))

    name: ClassVar[str] = "ays"
    source: ClassVar[str] = "Sabour et al., 2024, arXiv 2404.14507; tables as in huggingface/diffusers#7760 and #7817"

    def __post_init__(self) -> None:
        if self.table not in _AYS:
            raise DiffsteerError(f"ays: table={self.table!r} is unknown; valid: {', '.join(_AYS)}")

    def ratios(self, steps: int, high: float, low: float) -> Tensor:
        """(steps,) in float64."""
        table = torch.tensor(_AYS[self.table], dtype=torch.float64)
        if self.table != "svd":
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            bars = (1 - betas).cumprod(0)[table.long()]
            table = ((1 - bars) / bars).sqrt()
        at = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:-1]
        return within(interpolated(at, torch.linspace(0, 1, len(table), dtype=torch.float64), table.log()).exp(), high, low)


@dataclass(frozen=True)
class Profile:
    """Equal mass a step: the inverse of a cumulative profile over noise. Which profile is a heuristic; the inverse is exact.

    Args:
        times: (M + 1) edges of cells, rising within [0, 1], in a flow's time ``t = sigma / (alpha + sigma)``.
        masses: (M) of the cells, within which the mass is spread evenly; none negative.

    Raises:
        DiffsteerError: edges that do not rise, masses that are none.
    """

    times: tuple[float, ...]
    masses: tuple[float, ...]

    name: ClassVar[str] = "profile"
    source: ClassVar[str] = "after the adaptive time scheduler of PUFM++, 2025, arXiv 2512.20988"

    def __post_init__(self) -> None:
        t, rising = self.times, all(b > a for a, b in zip(self.times, self.times[1:], strict=False))
        if len(t) != len(self.masses) + 1 or len(t) < 2 or not (rising and t[0] >= 0 and t[-1] <= 1):
            raise DiffsteerError(f"profile: {len(self.masses)} masses want as many times and one more, rising within [0, 1]")
        if not (all(0 <= m < math.inf for m in self.masses) and sum(self.masses) > 0):
            raise DiffsteerError("profile: masses are finite, none negative, and not all zero")

    def ratios(self, steps: int, high: float, low: float) -> Tensor:
        """(steps,) in float64: from `high`, with the same mass between any two neighbours and between the last one and the
        clean level."""
        edges = torch.tensor(self.times, dtype=torch.float64)
        cumulative = torch.tensor((0.0, *self.masses), dtype=torch.float64).cumsum(0)
        top = torch.tensor([high / (1 + high)], dtype=torch.float64)
        left = 1 - torch.arange(steps, dtype=torch.float64) / steps
        t = interpolated(left * interpolated(top, edges, cumulative), cumulative, edges)
        t[:1] = top
        return within(t / (1 - t).clamp(min=1e-12), high, low)


def from_profile(times: Sequence[float], densities: Sequence[float]) -> Profile:
    """A profile of any density, (M) values at (M) rising times (a flow's, in [0, 1]), by trapezoids."""
    if len(times) != len(densities):
        raise DiffsteerError(f"from_profile: {len(times)} times and {len(densities)} densities; as many of each are needed")
    cells = zip(times, times[1:], densities, densities[1:], strict=False)
    return Profile(tuple(map(float, times)), tuple(float((b - a) * (p + q) / 2) for a, b, p, q in cells))


@dataclass(frozen=True)
class Given:
    """A grid in numbers, as many as there are steps; the clean level comes after them.

    Args:
        values: falling.
        kind: "ratios" sigma / alpha; "sigmas": of a flow its t in [0, 1], of any other model the ratios; "timesteps": what the
            model is told.

    Raises:
        DiffsteerError: no values, some that are no numbers, an unknown kind.
    """

    values: tuple[float, ...]
    kind: str = "ratios"

    name: ClassVar[str] = "given"
    source: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DiffsteerError(f"kind={self.kind!r} is unknown; valid: {', '.join(KINDS)}")
        check_numbers(f"{self.kind}: ", real=dict(enumerate(self.values)))  # type: ignore[arg-type]
        if not self.values:
            raise DiffsteerError(f"{self.kind}: give at least one")
        if any(not b < a for a, b in zip(self.values, self.values[1:], strict=False)):
            raise DiffsteerError(f"{self.kind} must fall from step to step: {', '.join(f'{v:g}' for v in self.values)}")

    def ratios(self, steps: int, high: float, low: float) -> Tensor:
        """(steps,) in float64, if that many were given."""
        if steps != len(self.values):
            raise DiffsteerError(f"{steps} steps, but {len(self.values)} {self.kind} were given: leave num_inference_steps out")
        return torch.tensor(self.values, dtype=torch.float64)


def gits(cost: Tensor, steps: int, coefficient: float = 1.0) -> list[int]:
    """The cheapest way from 0 to T in exactly so many hops, by dynamic programming: exact, O(steps T^2).

    Args:
        cost: (T + 1, T + 1); [i, j], j > i, is what one step from i to j costs; the rest is not looked at.
        coefficient: the m-th hop counts ``coefficient ** m``; the paper's code takes 1.15.

    Returns:
        steps + 1 rising indices, from 0 to T.

    Source:
        Chen et al., 2024, arXiv 2405.11326, algorithm 1; what a hop costs is the caller's choice.

    Raises:
        DiffsteerError: no square matrix, costs that are no numbers, or more steps than there are.
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or len(cost) < 2:
        raise DiffsteerError(f"gits: cost {tuple(cost.shape)} is no square matrix")
    last = len(cost) - 1
    if not 1 <= steps <= last:
        raise DiffsteerError(f"gits: steps={steps}; this cost has 1 to {last}")
    hop = torch.full_like(cost, math.inf, dtype=torch.float64, device="cpu")
    above = torch.ones_like(hop, dtype=torch.bool).triu(1)
    hop[above] = cost.detach().double().cpu()[above]
    if bool(hop[above].isnan().any()):
        raise DiffsteerError("gits: some costs are no numbers")
    rest, after = hop[:, last], []  # of the way from each index to the end
    for _ in range(steps - 1):
        rest, chosen = (hop + coefficient * rest).min(1)
        after.append(chosen)
    way = [0]
    for chosen in reversed(after):
        way.append(int(chosen[way[-1]]))
    return [*way, last]


def within(ratios: Tensor, high: float, low: float) -> Tensor:
    """Falling ratios (N,) put into a range; where several meet an end they keep a relative distance of 1e-4."""
    apart = torch.arange(len(ratios), dtype=torch.float64) * 1e-4
    return torch.maximum(torch.minimum(ratios, high * (-apart).exp()), low * apart.flip(0).exp())


def interpolated(x: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (at (M,) not falling, values (M,)), constant beyond; (N,) -> (N,)."""
    k = torch.searchsorted(at, x).clamp(1, len(at) - 1)
    share = ((x - at[k - 1]) / (at[k] - at[k - 1]).clamp(min=1e-300)).clamp(0, 1)
    return values[k - 1] + share * (values[k] - values[k - 1])


def as_schedule(schedule: Schedule | Sequence[float] | Tensor | None) -> Schedule | None:
    """A schedule as it is, or numbers as the ratios of one.

    Raises:
        DiffsteerError: neither.
    """
    if schedule is None or (hasattr(schedule, "ratios") and not isinstance(schedule, type)):
        return schedule  # type: ignore[return-value]
    if isinstance(schedule, type | str) or not hasattr(schedule, "__iter__"):
        raise DiffsteerError(f"schedule is an object, such as Karras(), or falling ratios sigma / alpha, not {schedule!r}")
    return Given(tuple(float(v) for v in schedule))


def _ramp(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps, dtype=torch.float64)
