"""What classifier-free guidance did in a step, told from the denoiser's outputs and from what the pipeline made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffsteer.algebra import mixed
from diffsteer.types import UnsupportedError

PULLS = (
    "guidance: normaliser=cfg wants a pipeline under classifier-free guidance, whose two outputs are told apart: "
    "take another, such as uncertainty"
)


def guidance_parts(outputs: list[Tensor], mixed: Tensor, scale: float, tolerance: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Tell the unconditional from the conditional output by reconstructing what the pipeline made of them.

    Args:
        outputs: of the denoiser in one step: one tensor of 2N rows, or two of N, in either order.
        mixed: the prediction (N, ...) that the pipeline handed to its scheduler, ``u + scale (c - u)``.
        scale: the guidance scale.

    Returns:
        (unconditional, conditional), each (N, ...).

    Raises:
        UnsupportedError: no order of the outputs gives `mixed`; also at scale 0.5, where both do.
    """
    halves = list(outputs[0].chunk(2)) if len(outputs) == 1 and len(outputs[0]) == 2 * len(mixed) else outputs
    if len(halves) == 2 and scale != 0.5:
        size = mixed.abs().mean().clamp(min=1e-12)
        for u, c in (halves, halves[::-1]):
            u, c = u[:, : mixed.shape[1]], c[:, : mixed.shape[1]]
            if float((u + scale * (c - u) - mixed).abs().mean() / size) < tolerance:
                return u, c
    raise UnsupportedError(f"guidance layout not recognised: {[tuple(o.shape) for o in outputs]} at scale {scale:g}")


def pulls(scheduler: Any, outputs: list[Tensor], scale: float, experts: Sequence[float], x: Tensor, index: int) -> Tensor:
    """The rms of what guidance changed in the noise estimates of these states, (N,).

    Args:
        scheduler: a steered one, whose last step this was. experts: their weights. index: of the step on its own grid.

    Raises:
        UnsupportedError: no guidance, or a layout that is not known.
    """
    try:
        without, _ = guidance_parts(outputs, scheduler.prediction, scale)
    except UnsupportedError as error:
        raise UnsupportedError(f"{PULLS} ({error})") from error
    with torch.no_grad():
        u, c = (scheduler._clean(index, mixed(output, experts), x.detach())[1] for output in (without, scheduler.prediction))
    found: Tensor = (c - u).float().flatten(1).square().mean(1).sqrt().cpu()
    return found
