"""Training-free guidance: Ye et al. (2024), arXiv 2409.15761."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffsteer.guidance import NORMALISERS, SCHEDULES
from diffsteer.samplers.guided import Guided
from diffsteer.types import setting


@dataclass(frozen=True)
class TFG(Guided):
    """Both paths, iterations, recurrences and smoothing: the space that the paper searches, with its defaults (but for the
    cut of clean estimates at [-1, 1], which is the scheduler's matter).

    A heuristic; with both strengths 0 the plain chain. The paper's strengths are for raw gradients (``normaliser="none"``) of a
    classifier's log-probability; with other rewards take another normaliser, and tune.

    Cost: see `Guidance`.

    Args:
        particles: chains a prompt.
        eta: amount of noise in the transition.
        network: rho. clean: mu.
        smoothing: sigma, in shares of ``sigma / sqrt(alpha^2 + sigma^2)``.
        draws: of the smoothing noise.
        iterations: at x0.
        recurrence: times that each step is taken.
        profile: of both strengths along the run: constant | increase | decrease.
        normaliser: see `Guidance`.
        highest, lowest: the noise levels ``t = sigma / (alpha + sigma)`` that are guided. every: only each so many steps.
        beta1, beta2: of ``normaliser="adam"``.

    Raises:
        DiffsteerError: a value out of its range.
    """

    network: float = setting(1.0, low=0)
    clean: float = setting(1.0, low=0)
    smoothing: float = setting(0.01, low=0)
    draws: int = setting(4, low=1)
    iterations: int = setting(1, low=1)
    recurrence: int = setting(1, low=1)
    profile: str = setting("increase", choices=tuple(SCHEDULES))
    normaliser: str = setting("none", choices=tuple(NORMALISERS))

    name: ClassVar[str] = "tfg"
    source: ClassVar[str] = "Ye et al., 2024, arXiv 2409.15761"

    def own(self) -> dict[str, Any]:
        """All of it."""
        same = ("network", "clean", "iterations", "recurrence", "smoothing", "draws")
        return {"schedule": self.profile, **{name: getattr(self, name) for name in same}}
