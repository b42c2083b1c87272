"""How the frames of a clip hang together: correlations of features between frames, which say what moved and little of what
it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize


class Pairs(NamedTuple):
    """Frames that are compared: from `first` to `second`, (M,) each."""

    first: Tensor
    second: Tensor


def pairs_of(frames: int, which: str) -> Pairs:
    """ "consecutive": every frame and the next; "first": the first and every later one; "both"; "all".

    Raises:
        ValueError: an unknown choice.
    """
    follow = [(k, k + 1) for k in range(frames - 1)]
    from_first = [(0, k) for k in range(1, frames)]
    every = [(j, k) for k in range(frames) for j in range(k)]
    chosen = {"consecutive": follow, "first": from_first, "both": list(dict.fromkeys(follow + from_first)), "all": every}
    if which not in chosen:
        raise ValueError(f"unknown pairs {which!r}; valid: {', '.join(chosen)}")
    return Pairs(*torch.tensor(chosen[which]).T)


def pooled(features: Tensor, side: int) -> Tensor:
    """Features (N, F, C, h, w), or pixels, averaged to at most side x side places and freed of what all places and frames
    share: (N, F, C, h', w'). The common part would make all places alike."""
    n, f, c, h, w = features.shape
    small = adaptive_avg_pool2d(features.flatten(0, 1).float(), (min(h, side), min(w, side)))
    small = small.view(n, f, c, *small.shape[-2:])
    return small - small.flatten(3).transpose(1, 2).flatten(2).mean(2)[:, None, :, None, None]


def correlations(features: Tensor, pairs: Pairs) -> Tensor:
    """Cosines between the places of two frames: features (N, F, C, h, w) -> (N, M, h w, h w). Memory is that of the result."""
    tokens = normalize(features.flatten(3), dim=2, eps=1e-6)  # (N, F, C, h w)
    return torch.einsum("nmcp,nmcq->nmpq", tokens[:, pairs.first], tokens[:, pairs.second])


def full(cosines: Tensor, side: tuple[int, int], temperature: float) -> Tensor:
    """The correlations themselves, (N, M, p, q)."""
    return cosines


def softmax(cosines: Tensor, side: tuple[int, int], temperature: float) -> Tensor:
    """Of each place, where it is in the other frame: a distribution, (N, M, p, q); appearance shows less in it. Scaled so
    that a certain place has 1."""
    return (cosines / temperature).softmax(-1)


def displacement(cosines: Tensor, side: tuple[int, int], temperature: float) -> Tensor:
    """Of each place, how far it went: the mean of that distribution less the place, in shares of the picture, (N, M, p, 2).
    Appearance shows least in it; of a plain background it says nothing but where its middle is."""
    tall, wide = side
    y, x = torch.meshgrid(torch.arange(tall) / tall, torch.arange(wide) / wide, indexing="ij")
    places = torch.stack([x, y], -1).view(-1, 2).to(cosines)
    return softmax(cosines, side, temperature) @ places - places


def cross_correlations(features: Tensor, pairs: Pairs, mask: Tensor | None = None, floor: float = 0.02) -> Tensor:
    """How much of what changes in one frame is found in another at each distance, wherever it is: features (N, F, C, h, w) ->
    cross-correlations (N, M, 2 h, 2 w), at most 1, the distance 0 first. Of one thing that moves they have one peak, at how
    far it went: where it is does not count, and its look hardly.

    Args:
        mask: (F, h, w) in [0, 1], the places that count.
        floor: the share of a still clip's contrast that a change is measured by at least, so that noise is no motion.
    """
    size = (2 * features.shape[-2], 2 * features.shape[-1])  # twice, since the transform goes round in circles
    moving = features - features.mean(1, keepdim=True)
    if mask is not None:
        moving = moving * mask[None, :, None].to(features)
    spectra = torch.fft.rfft2(moving, s=size)
    found: Tensor = torch.fft.irfft2((spectra[:, pairs.first].conj() * spectra[:, pairs.second]).sum(2), s=size)
    power = (moving.square() + floor * features.square()).sum((2, 3, 4)).clamp(min=1e-12).sqrt()
    return found / (power[:, pairs.first] * power[:, pairs.second])[:, :, None, None]


# Place by place: from cosines (N, M, p, q) to what is compared with a reference's, (N, M, p, ...).
BY_PLACE: dict[str, Callable[[Tensor, tuple[int, int], float], Tensor]] = {
    "full": full,
    "softmax": softmax,
    "displacement": displacement,
}
VARIANTS = (*BY_PLACE, "cross_correlation")


def inconsistency(
    features: Tensor,
    reference: Tensor,
    pairs: Pairs,
    variant: str = "full",
    temperature: float = 0.1,
    side: int = 16,
    mask: Tensor | None = None,
) -> Tensor:
    """The mean squared difference of what a clip's and a reference's correlations say, (N,).

    Args:
        features: (N, F, C, h, w). reference: (1 or N, F, C', h, w); another number of channels is allowed.
        mask: (F, h', w') in [0, 1], at the size of the pooled features: which places of the first frame of a pair count; for
            "cross_correlation", which places of the reference.

    Cost: ``M (h' w')^2`` cosines a clip; for "cross_correlation" fast Fourier transforms of ``(2 h', 2 w')``.
    """
    found, wanted = pooled(features, side), pooled(reference, side).to(features)
    if variant == "cross_correlation":
        return (cross_correlations(found, pairs) - cross_correlations(wanted, pairs, mask)).square().sum((2, 3)).mean(1)
    size, read = (found.shape[-2], found.shape[-1]), BY_PLACE[variant]
    differences = read(correlations(found, pairs), size, temperature) - read(correlations(wanted, pairs), size, temperature)
    each = differences.square().flatten(3).sum(-1) if variant != "full" else differences.square().mean(-1)  # (N, M, p)
    if mask is None:
        return each.mean((1, 2))
    weights = mask[pairs.first].flatten(1).to(each)
    return (each * weights).sum((1, 2)) / weights.sum().clamp(min=1e-6)


def moving_mask(clip: Tensor, size: tuple[int, int] = (16, 16), least: float = 0.15, still: float = 0.02) -> Tensor:
    """Where anything changes in a clip (F, C, h, w): 1 there, and next to it, in any frame; (F, h', w') at the given size. All
    zeros where nothing changes by more than `still`."""
    small = adaptive_avg_pool2d(clip.float(), size)
    change = (small - small.median(0, keepdim=True).values).norm(dim=1)  # (F, h', w')
    moving = (change > max(least * float(change.max()), still)).float()
    wide = torch.nn.functional.max_pool2d(moving[:, None], 3, 1, 1)[:, 0]
    return wide.amax(0, keepdim=True).expand_as(wide).contiguous()
