"""Manifold preserving guided diffusion: He et al. (2023), arXiv 2311.16424."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffsteer.samplers.guided import Guided
from diffsteer.types import setting


@dataclass(frozen=True)
class MPGD(Guided):
    """The clean estimate follows the gradient at itself: nothing goes back through the network.

    The cheapest method on large models. Its weakness: at high noise the estimate is blurred, and the gradient of a reward that
    never saw such pictures says little. A heuristic; with ``strength=0`` the plain chain. The paper's projection through an
    autoencoder is what decoding latents does anyway; for models of pixels there is none here.

    Cost: at each guided step a decode and a reward, forwards and backwards.

    Args:
        particles: chains a prompt.
        eta: amount of noise in the transition.
        strength: at x0.
        normaliser: see `Guidance`. The authors' code has "step" for pixels, with a share that follows the step, and "cfg" for
            Stable Diffusion, with strengths of 15 to 30 on gradients of a norm: far more than a share of what guidance does.
        highest, lowest: the noise levels ``t = sigma / (alpha + sigma)`` that are guided. every: only each so many steps.
        beta1, beta2: of ``normaliser="adam"``.

    Raises:
        DiffsteerError: a value out of its range.
    """

    strength: float = setting(0.3, low=0)
    lowest: float = setting(0.25, low=0, high=1)

    name: ClassVar[str] = "mpgd"
    source: ClassVar[str] = "He et al., 2023, arXiv 2311.16424"

    def own(self) -> dict[str, Any]:
        """At x0 alone."""
        return {"clean": self.strength}
