"""Named measurements of a sample: areas, places, counts and speeds of colours, brightness, edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffsteer.types import DiffsteerError

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 180),
    "orange": (240, 140, 40),
    "cyan": (60, 200, 220),
    "pink": (240, 140, 180),
    "brown": (130, 80, 40),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
}
NEAR, SOFT = 0.30, 0.04  # how far from a colour, in RGB of range 1, half a pixel still counts, and how soft that is
PRESENT = 0.01  # share of the picture below which a colour counts as absent
APART = 0.15  # colours nearer to each other than this are one
SPECK = 0.002  # share of the picture below which a piece is dirt


def rgb(color: str) -> tuple[float, float, float]:
    """A colour of `COLORS`, or ``#rrggbb``, in [0, 1].

    Raises:
        KeyError: it is neither.
    """
    if color.startswith("#") and len(color) == 7:
        try:
            r, g, b = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        except ValueError:
            raise KeyError(color) from None
        return r, g, b
    r, g, b = (v / 255 for v in COLORS[color])
    return r, g, b


def mask(images: Tensor, color: str) -> Tensor:
    """How much each pixel of (N, 3, H, W) is of a colour, softly: (N, H, W) in [0, 1]. A pixel that is nearer to another colour
    of `COLORS` is that one's. Differentiable."""
    wanted = rgb(color)
    others = [c for c in (rgb(name) for name in COLORS) if sum((a - b) ** 2 for a, b in zip(c, wanted, strict=True)) > APART**2]
    palette = torch.tensor([wanted, *others], device=images.device, dtype=images.dtype)
    distances = ((images[:, None] - palette[None, :, :, None, None]).square().sum(2) + 1e-6).sqrt()
    shares: Tensor = (-distances / SOFT).softmax(1)[:, 0]
    return ((NEAR - distances[:, 0]) / SOFT).sigmoid() * shares


def area(images: Tensor, color: str) -> Tensor:
    """Share of the picture of a colour, in [0, 1]."""
    return mask(images, color).mean((1, 2))


def across(images: Tensor, color: str) -> Tensor:
    """Where the colour's centre of mass lies, 0 left to 1 right; 0.5 where there is none."""
    return _centre(mask(images, color), 2)


def down(images: Tensor, color: str) -> Tensor:
    """Where the colour's centre of mass lies, 0 top to 1 bottom; 0.5 where there is none."""
    return _centre(mask(images, color), 1)


def _centre(m: Tensor, axis: int) -> Tensor:
    size = m.shape[axis]
    places = (torch.arange(size, device=m.device, dtype=m.dtype) + 0.5) / size
    shape = [1, 1, 1]
    shape[axis] = size
    tiny = PRESENT * PRESENT * m.shape[1] * m.shape[2]
    return ((m * places.view(shape)).sum((1, 2)) + 0.5 * tiny) / (m.sum((1, 2)) + tiny)


def brightness(images: Tensor) -> Tensor:
    """Mean luma, in [0, 1]."""
    return _luma(images).mean((1, 2))


def edges(images: Tensor) -> Tensor:
    """Mean size of the luma's gradient, Sobel's, a pixel."""
    y = F.pad(_luma(images)[:, None], (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=y.device, dtype=y.dtype) / 8
    gx, gy = F.conv2d(y, kernel[None, None]), F.conv2d(y, kernel.T[None, None])
    return (gx.square() + gy.square() + 1e-8).sqrt().mean((1, 2, 3))


def _luma(images: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype)
    return (images * weights.view(1, 3, 1, 1)).sum(1)


def count(images: Tensor, color: str) -> Tensor:
    """Pieces of a colour that hang together (by edges or corners) and are more than dirt. No gradient."""
    m = (mask(images.detach(), color) > 0.5).cpu().numpy()
    least = max(1, round(SPECK * m.shape[1] * m.shape[2]))
    return torch.tensor([float(_pieces(one, least)) for one in m], device=images.device)


def _pieces(m: np.ndarray, least: int) -> int:
    left, found = {(int(i), int(j)) for i, j in np.argwhere(m)}, 0
    while left:
        stack, size = [left.pop()], 0
        while stack:
            i, j = stack.pop()
            size += 1
            near = [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
            stack += [p for p in near if p in left]
            left.difference_update(near)
        found += size >= least
    return found


def _speeds(clips: Tensor, color: str) -> tuple[Tensor, Tensor]:
    n, frames = clips.shape[:2]
    flat = clips.flatten(0, 1)
    x, y = (f(flat, color).view(n, frames) for f in (across, down))
    return x[:, 1:] - x[:, :-1], y[:, 1:] - y[:, :-1]


def speed(clips: Tensor, color: str) -> Tensor:
    """How far the colour's centre goes, in widths (heights) of the picture a frame; of (N, F, 3, H, W)."""
    dx, dy = _speeds(clips, color)
    return (dx.square() + dy.square() + 1e-10).sqrt().mean(1)


def speed_x(clips: Tensor, color: str) -> Tensor:
    """How far to the right the colour's centre goes, in widths a frame."""
    return _speeds(clips, color)[0].mean(1)


def speed_y(clips: Tensor, color: str) -> Tensor:
    """How far down the colour's centre goes, in heights a frame."""
    return _speeds(clips, color)[1].mean(1)


@dataclass(frozen=True)
class Measurement:
    """A function of samples (and a colour), whether it takes a colour, has a gradient, and wants clips."""

    function: Callable[..., Tensor]
    colored: bool = True
    differentiable: bool = True
    clips: bool = False


MEASUREMENTS: dict[str, Measurement] = {
    "area": Measurement(area),
    "x": Measurement(across),
    "y": Measurement(down),
    "brightness": Measurement(brightness, colored=False),
    "edges": Measurement(edges, colored=False),
    "count": Measurement(count, differentiable=False),
    "speed": Measurement(speed, clips=True),
    "speed_x": Measurement(speed_x, clips=True),
    "speed_y": Measurement(speed_y, clips=True),
}


def measure(name: str, samples: Tensor, color: str | None) -> Tensor:
    """A measurement of samples (N, 3, H, W), or of clips (N, F, 3, H, W): of images the mean over the frames. (N,)"""
    told = MEASUREMENTS[name]
    if told.clips and samples.ndim != 5:
        raise DiffsteerError(f"program: {name} is measured in clips, and these are pictures")
    arguments = () if color is None else (color,)
    if told.clips or samples.ndim == 4:
        return told.function(samples, *arguments)
    n, frames = samples.shape[:2]
    return told.function(samples.flatten(0, 1), *arguments).view(n, frames).mean(1)
