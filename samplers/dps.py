"""Diffusion posterior sampling: Chung et al. (2022), arXiv 2209.14687."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffsteer.guidance import NORMALISERS
from diffsteer.samplers.guided import Guided
from diffsteer.types import setting


@dataclass(frozen=True)
class DPS(Guided):
    """The state follows the gradient, through the network, of the norm of what is missing to the best reward.

    The paper's step (algorithm 1) adds ``- zeta grad ||y - A(x0)||`` to the next state. With ``normaliser="residual"`` a reward
    ``-||y - A(x0)||^2`` gives that times ``alpha' / alpha`` of the step, as in TFG's form of it: near 1 at the paper's 1,000
    steps, a few times that on the first of few. A reward with an upper bound is taken for the bound minus a squared norm. A
    heuristic; with ``strength=0`` the plain chain.

    Cost: at each step a decode and a reward, forwards and backwards, and the network backwards.

    Args:
        particles: chains a prompt.
        eta: amount of noise in the transition.
        strength: zeta; 0.3 to 1 in the paper, at 1,000 steps.
        normaliser: see `Guidance`.
        highest, lowest: the noise levels ``t = sigma / (alpha + sigma)`` that are guided. every: only each so many steps.
        beta1, beta2: of ``normaliser="adam"``.

    Raises:
        DiffsteerError: a value out of its range.
    """

    strength: float = setting(0.5, low=0)
    normaliser: str = setting("residual", choices=tuple(NORMALISERS))

    name: ClassVar[str] = "dps"
    source: ClassVar[str] = "Chung et al., 2022, arXiv 2209.14687"

    def own(self) -> dict[str, Any]:
        """Through the network alone."""
        return {"network": self.strength}
