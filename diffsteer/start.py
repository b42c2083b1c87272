"""What is done to the first noise before anything else: transforms that keep it standard normal, or nearly so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffsteer.media import resampled
from diffsteer.types import DiffsteerError, UnsupportedError, check_numbers, setting


class NoiseTransform(Protocol):
    """From the keyed standard normal noise of some rows, (N, *shape), to the noise that the session starts from. `rows` are
    their numbers, whose texts `session.texts_of(rows)` tells."""

    def __call__(self, noise: Tensor, session: Any, rows: Sequence[int]) -> Tensor: ...


@dataclass(eq=False)
class ReferenceNoise:
    """Clips start from noise whose low frequencies have something of a reference clip, noised, so that things move as there.

    Of the reference's latents what changes over time is taken (what stands still would bring its appearance), within a
    low-pass of `cutoff`, scaled to the power of white noise; a share of it is mixed with the rows' own low frequencies,
    ``sqrt(1 - share^2) low + share reference``, and the high frequencies stay. For any row mean, variance and spectrum are
    those of white noise up to the reference's own spectrum inside the band. A heuristic, after the initial noise of Zhang et
    al., 2025, arXiv 2501.07563; with ``share=0`` nothing is changed, bit for bit.

    Args:
        frames: the reference, (F, 3, H, W) in [0, 1].
        share: in [0, 1], the correlation with the reference within the band.
        cutoff: of the low-pass, in shares of the corner of the spectrum, where time, height and width all have their Nyquist
            frequency: along one axis 0.58 is that frequency.

    Raises:
        DiffsteerError: a value out of its range. UnsupportedError, when called: latents that are no clip encoded frame by
            frame.
    """

    frames: Tensor
    share: float = setting(0.5, low=0, high=1)
    cutoff: float = setting(0.5, low=0, high=1)

    def __post_init__(self) -> None:
        check_numbers("reference noise: ", real={"share": self.share, "cutoff": self.cutoff})
        for name in ("share", "cutoff"):
            if not 0 <= getattr(self, name) <= 1:
                raise DiffsteerError(f"reference noise: {name}={getattr(self, name):g}; it lies in [0, 1]")
        self._latents: Tensor | None = None

    def __call__(self, noise: Tensor, session: Any, rows: Sequence[int] = ()) -> Tensor:
        """(N, C, F, h, w) -> the same."""
        if self.share == 0:
            return noise
        if self._latents is None or self._latents.shape[1:] != noise.shape[1:]:
            clips = noise.ndim == 5 and all(session.size)  # others are refused there
            frames = resampled(self.frames, noise.shape[2], *session.size) if clips else self.frames
            self._latents = session.encoded(frames)
        return mixed_noise(noise, self._latents.to(noise), self.share, self.cutoff)


def mixed_noise(noise: Tensor, reference: Tensor, share: float, cutoff: float) -> Tensor:
    """Noise (N, C, F, h, w) with the moving part of reference latents (1, C, F, h, w) in its low frequencies, see
    `ReferenceNoise`."""
    dims = (-3, -2, -1)
    low = low_pass(tuple(noise.shape[-3:]), cutoff).to(noise)
    moving = reference - reference.mean(2, keepdim=True)
    spectrum = torch.fft.fftn(moving.double(), dim=dims) * low
    power = spectrum.abs().square().sum((1, *dims), keepdim=True) / (low.double().square().sum() * noise.shape[1])
    spectrum = spectrum / power.clamp(min=1e-12).sqrt() * math.sqrt(math.prod(noise.shape[-3:]))
    own = torch.fft.fftn(noise.double(), dim=dims)
    # within the band own and reference share the power of one, outside all is own
    kept = (1 - (share * low.double()) ** 2).sqrt()
    mixed: Tensor = torch.fft.ifftn(kept * own + share * spectrum, dim=dims).real.to(noise.dtype)
    return mixed


def low_pass(size: tuple[int, ...], cutoff: float) -> Tensor:
    """1 for frequencies up to the cut-off and 0 above, on the grid of `torch.fft.fftn`; 1 is the corner of the grid."""
    axes = [torch.fft.fftfreq(n, dtype=torch.float64) * 2 if n > 1 else torch.zeros(1, dtype=torch.float64) for n in size]
    squares = [a.square().view([-1 if i == j else 1 for j in range(len(size))]) for i, a in enumerate(axes)]
    total = squares[0]
    for square in squares[1:]:
        total = total + square
    return (total.sqrt() <= cutoff * math.sqrt(len(size))).double()


def refuse_encoding(what: str) -> UnsupportedError:
    return UnsupportedError(f"{what} is not known to encode clips frame by frame: a reference wants AnimateDiffPipeline")
