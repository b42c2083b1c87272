"""Diffusion posterior sampling: Chung et al. (2022), arXiv 2209.14687."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.guidance import NORMALISERS, Guidance
from diffsteer.samplers.guided import Guided
from diffsteer.types import setting


@dataclass(frozen=True)
class DPS(Guided):
    """The state follows the gradient, through the network, of the norm of what is missing to the best reward.

    The paper's step (algorithm 1) is ``- zeta grad ||y - A(x0)||``: with ``normaliser="residual"`` a reward
    ``-||y - A(x0)||^2`` gives it exactly, and a reward with an upper bound is taken for the bound minus a squared norm. A
    heuristic; with ``strength=0`` the plain chain.

    Cost: at each step a decode and a reward, forwards and backwards, and the network backwards.

    Args:
        particles: chains a prompt.
        eta: amount of noise in the transition.
        strength: zeta; 0.3 to 1 in the paper, at 1,000 steps.
        normaliser: see `Guidance`.

    Raises:
        DiffsteerError: a value out of its range.
    """

    strength: float = setting(0.5, low=0)
    normaliser: str = setting("residual", choices=tuple(NORMALISERS))

    name: ClassVar[str] = "dps"
    source: ClassVar[str] = "Chung et al., 2022, arXiv 2209.14687"

    @property
    def guidance(self) -> Guidance:
        """Through the network alone."""
        return Guidance(clean=0.0, network=self.strength, normaliser=self.normaliser, lowest=0.0)
