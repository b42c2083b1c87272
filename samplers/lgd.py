"""Loss-guided diffusion with Monte Carlo: Song et al. (2023), ICML, PMLR 202:32483."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffsteer.samplers.guided import Guided
from diffsteer.types import setting


@dataclass(frozen=True)
class LGD(Guided):
    """DPS with the reward's exponential averaged over Gaussian draws around the clean estimate.

    A heuristic: the draws stand for the unknown posterior of x0. With ``draws=1, smoothing=0`` it is DPS with the same
    normaliser; with ``strength=0`` the plain chain.

    Cost: at each step `draws` decodes and rewards, forwards and backwards, and the network backwards.

    Args:
        particles: chains a prompt.
        eta: amount of noise in the transition.
        strength: through the network.
        draws: of the posterior; 10 where others compare with it (Ye et al., 2024).
        smoothing: their standard deviation, in shares of ``sigma / sqrt(alpha^2 + sigma^2)``, which is the paper's.
        normaliser: see `Guidance`.
        highest, lowest: the noise levels ``t = sigma / (alpha + sigma)`` that are guided. every: only each so many steps.
        beta1, beta2: of ``normaliser="adam"``.

    Raises:
        DiffsteerError: a value out of its range.
    """

    strength: float = setting(0.3, low=0)
    draws: int = setting(10, low=1)
    smoothing: float = setting(1.0, low=0)

    name: ClassVar[str] = "lgd"
    source: ClassVar[str] = "Song et al., 2023, ICML (PMLR 202:32483)"

    def own(self) -> dict[str, Any]:
        """Through the network, smoothed."""
        return {"network": self.strength, "draws": self.draws, "smoothing": self.smoothing}
