"""FreeDoM: Yu et al. (2023), arXiv 2303.09833."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffsteer.guidance import NORMALISERS
from diffsteer.samplers.guided import Guided
from diffsteer.types import setting


@dataclass(frozen=True)
class FreeDoM(Guided):
    """Guidance through the network with recurrences, in the stage of the run where the picture's meaning is decided.

    A heuristic; with ``strength=0`` the plain chain. The authors' code for Stable Diffusion guides where 30 to 70 of 100 steps
    are left, and recurs three times while there are more than 40. Stages are noise levels here, those of the 30 to 70, so that
    they do not hang on the number of steps, and every guided step recurs. The size of a step is its rule for Stable
    Diffusion: a fifth of what classifier-free guidance changes in the noise estimate, sample by sample. Models without that
    want another normaliser, such as "uncertainty" with a strength of about 0.3.

    Cost: at each guided step, `recurrence` times, a decode and a reward forwards and backwards, and the network backwards.

    Args:
        particles: chains a prompt.
        eta: amount of noise in the transition.
        strength: through the network.
        recurrence: times that each guided step is taken.
        normaliser: see `Guidance`.
        highest, lowest: the noise levels ``t = sigma / (alpha + sigma)`` that are guided. every: only each so many steps.
        beta1, beta2: of ``normaliser="adam"``.

    Raises:
        DiffsteerError: a value out of its range.
        UnsupportedError: ``normaliser="cfg"`` without classifier-free guidance.
    """

    strength: float = setting(0.2, low=0)
    recurrence: int = setting(3, low=1)
    highest: float = setting(0.77, low=0, high=1)
    lowest: float = setting(0.45, low=0, high=1)
    normaliser: str = setting("cfg", choices=tuple(NORMALISERS))

    name: ClassVar[str] = "freedom"
    source: ClassVar[str] = "Yu et al., 2023, arXiv 2303.09833"

    def own(self) -> dict[str, Any]:
        """Through the network, in the middle."""
        return {"network": self.strength, "recurrence": self.recurrence}
