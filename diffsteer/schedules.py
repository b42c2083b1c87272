"""Where to put the steps: grids of noise levels for any model, as ratios sigma / alpha (the "sigmas" of EDM's space)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from diffsteer.types import DiffsteerError, check_numbers, setting

__all__ = ["FlowTime", "Karras", "LogSNR"]


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


def _ramp(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps, dtype=torch.float64)
