"""Universal guidance: Bansal et al. (2023), arXiv 2302.07121."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffsteer.samplers.guided import Guided
from diffsteer.types import setting


@dataclass(frozen=True)
class UniversalGuidance(Guided):
    """Forward guidance (through the network), backward guidance (iterations at x0), and recurrences.

    A heuristic; with both strengths 0 the plain chain. The paper's strengths span four orders of magnitude, since its losses
    have no common scale; here they are shares of the clean estimate's uncertainty. The clean estimate is moved and the noise
    estimate stays, as TFG writes the method; the authors' code moves both, which is another profile along the run.

    Cost: `recurrence` times: a decode and a reward forwards and backwards, the network backwards, and `iterations` more decodes
    and rewards forwards and backwards.

    Args:
        particles: chains a prompt.
        eta: amount of noise in the transition.
        forward: strength through the network.
        backward: strength at x0.
        iterations: m, of the backward guidance.
        recurrence: k, times that each step is taken; 2 to 10 in the paper.
        normaliser: see `Guidance`.
        highest, lowest: the noise levels ``t = sigma / (alpha + sigma)`` that are guided. every: only each so many steps.
        beta1, beta2: of ``normaliser="adam"``.

    Raises:
        DiffsteerError: a value out of its range.
    """

    forward: float = setting(0.2, low=0)
    backward: float = setting(0.1, low=0)
    iterations: int = setting(3, low=1)
    recurrence: int = setting(2, low=1)

    name: ClassVar[str] = "universal"
    source: ClassVar[str] = "Bansal et al., 2023, arXiv 2302.07121"

    def own(self) -> dict[str, Any]:
        """Both paths, again and again."""
        numbers = {"iterations": self.iterations, "recurrence": self.recurrence}
        return {"clean": self.backward, "network": self.forward, **numbers}
