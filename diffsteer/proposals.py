"""Proposals: from a noise to another near it, both standard normal. Everything is computed in float64.

One parameter says how far: `step` s in (0, 1], the cosine between the two being ``sqrt(1 - s^2)``; s = 1 leaves nothing of the
old noise, which is random search.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffsteer.types import DiffsteerError, nearest

ADDITIVE = (
    "proposal=additive adds variance: the radius of the noise grows by sqrt(1 + step^2) every time, and the model was trained "
    "on one radius; take rotation or mix"
)


def rotation(z: Tensor, fresh: Tensor, step: float, place: torch.Generator | None = None) -> Tensor:
    """Rotate on the sphere: ``|z| (c z/|z| + s w)``, w being the direction of the fresh noise across z. The radius is kept
    exactly, so are the uniform direction and with it the law. At step 1 it is the fresh noise itself, and of a
    single number, which has no other direction, the mix.

    Args:
        z, fresh: one noise and an independent one, of any shape.
    """
    if step >= 1:
        return fresh.clone()
    a, n = z.double(), fresh.double()
    radius = a.norm()
    u = a / radius
    across = n - (n * u).sum() * u
    if z.numel() == 1 or not radius > 0:  # nothing lies across, or everything does
        return mix(z, fresh, step)
    rotated: Tensor = radius * (math.sqrt(1 - step**2) * u + step * across / across.norm())
    return rotated.to(z.dtype)


def mix(z: Tensor, fresh: Tensor, step: float, place: torch.Generator | None = None) -> Tensor:
    """The variance-preserving mix ``sqrt(1 - s^2) z + s n`` (preconditioned Crank-Nicolson)."""
    return (math.sqrt(max(0.0, 1 - step**2)) * z.double() + step * fresh.double()).to(z.dtype)


def redraw(z: Tensor, fresh: Tensor, step: float, place: torch.Generator | None = None) -> Tensor:
    """The fresh noise, whatever the step."""
    return fresh.clone()


def partial(z: Tensor, fresh: Tensor, step: float, place: torch.Generator | None = None) -> Tensor:
    """Redraw a part, s^2 of the elements: one box in the last two axes of an image's latents, through all channels, at a place
    drawn from `place`; scattered elements of anything with fewer axes. A local edit: the rest stays bit for bit."""
    place = place or torch.Generator().manual_seed(0)
    share = min(1.0, step**2)
    if z.ndim < 3:
        order = torch.randperm(z.numel(), generator=place)[: max(1, round(share * z.numel()))]
        moved = z.clone().flatten()
        moved[order] = fresh.flatten()[order]
        return moved.view_as(z)
    height, width = z.shape[-2:]
    aspect = math.exp(float(torch.empty(()).uniform_(-0.5, 0.5, generator=place)))
    h = max(1, round(min(1.0, max(share, math.sqrt(share) * aspect)) * height))  # as high as leaves a width that there is
    w = min(width, max(1, round(share * height * width / h)))
    top, left = (int(torch.randint(size - part + 1, (), generator=place)) for size, part in ((height, h), (width, w)))
    moved = z.clone()
    moved[..., top : top + h, left : left + w] = fresh[..., top : top + h, left : left + w]
    return moved


Proposal = Callable[[Tensor, Tensor, float, torch.Generator | None], Tensor]
PROPOSALS: dict[str, Proposal] = {"rotation": rotation, "mix": mix, "redraw": redraw, "partial": partial}


def proposal_of(name: str) -> Proposal:
    """A proposal by its name.

    Raises:
        DiffsteerError: an unknown name; "additive", with the reason why there is none.
    """
    if name == "additive":
        raise DiffsteerError(ADDITIVE)
    if name not in PROPOSALS:
        raise DiffsteerError(f"proposal={name!r} is unknown{nearest(name, PROPOSALS)}")
    return PROPOSALS[name]


def cross(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """A child of two noises: ``sqrt(w) a + sqrt(1 - w) b``, standard normal if they are independent; of relatives, whose cosine
    is beyond chance, divided by what that adds to the variance (a child of twins is the twin)."""
    x, y = a.double(), b.double()
    cosine = float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-12))
    related = cosine if abs(cosine) > 4 / math.sqrt(a.numel()) else 0.0
    size = math.sqrt(max(1 + 2 * math.sqrt(weight * (1 - weight)) * related, 1e-12))
    return ((math.sqrt(weight) * x + math.sqrt(1 - weight) * y) / size).to(a.dtype)
