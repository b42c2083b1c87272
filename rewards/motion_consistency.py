"""Does a clip move as a reference does? After Zhang et al. (2025), arXiv 2501.07563, of which no code was published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from diffsteer.correlation import VARIANTS, inconsistency, moving_mask, pairs_of
from diffsteer.media import as_clip, resampled
from diffsteer.reward import Reward
from diffsteer.types import Context, DiffsteerError, check_numbers, setting

BLOCKS, TEMPERATURE = ("up_blocks.0",), 0.1
PAIRS = ("both", "consecutive", "first", "all")


@dataclass(eq=False)
class MotionConsistency(Reward):
    """Minus the difference between what the correlations of a clip's frames and those of a reference's say: 0 is the same
    motion.

    What is correlated are pixels (``features="pixels"``: of finished clips and of clean estimates, for particles, search, and
    guidance at x0 without the network), or, when guidance goes through the network, features of the denoiser itself
    (``features="network"``), compared with those that it has for the reference, noised to the same level. Where no features
    are at hand (selection, final scores) pixels are correlated in both cases.

    A heuristic. Cost: a Fourier transform a channel of a frame and one a pair of frames, or, place by place, ``(side^2)^2``
    cosines a pair; with network features one more row at every guided step.

    Args:
        reference: a clip: a file (GIF, MP4), a folder of pictures, or frames, (F, 3, H, W) in [0, 1] or PIL images. On the
            command line ``reference=`` sets it. It is brought to the number of frames and the size of what is scored.
        variant: "cross_correlation" compares how far things went, wherever they are; the others go place by place, so that
            things have to be where they are in the reference: "full" compares the correlations, "softmax" where each place
            went, "displacement" how far it went.
        pairs: of frames: consecutive, first (with every later one), both, all.
        temperature: of softmax and displacement.
        side: correlations are taken between at most side x side places.
        mask: of the reference: "moving" for places where it changes, "" for all, or a picture or clip whose white parts count.
        features: "pixels" or "network". blocks: modules of the denoiser whose outputs are tapped.

    Raises:
        DiffsteerError: a value out of its range; a reference that cannot be read; no reference; pictures instead of clips; a
            mask that leaves no place, such as "moving" of a reference that stands still.
    """

    reference: Any = None
    variant: str = setting("cross_correlation", choices=VARIANTS)
    pairs: str = setting("both", choices=PAIRS)
    temperature: float = setting(TEMPERATURE, low=0)
    side: int = setting(16, low=2)
    mask: Any = "moving"
    features: str = setting("pixels", choices=("pixels", "network"))
    blocks: Any = field(default=BLOCKS)

    name: ClassVar[str] = "motion_consistency"
    modality: ClassVar[str] = "video"
    range: ClassVar[tuple[float, float]] = (-math.inf, 0.0)
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("variant", self.variant, VARIANTS),
            ("pairs", self.pairs, PAIRS),
            ("features", self.features, ("pixels", "network")),
        ):
            if value not in valid:
                raise DiffsteerError(f"motion_consistency: {name}={value!r} is unknown; valid: {', '.join(valid)}")
        check_numbers("motion_consistency: ", {"side": self.side}, {"temperature": self.temperature})
        if not self.temperature > 0:
            raise DiffsteerError(f"motion_consistency: temperature={self.temperature:g}; it must be positive")
        if self.temperature != TEMPERATURE and self.variant not in ("softmax", "displacement"):
            raise DiffsteerError(f"motion_consistency: temperature has no effect with variant={self.variant}: leave it out")
        if self.side < 2:
            raise DiffsteerError(f"motion_consistency: side={self.side}; at least 2 is needed")
        self.blocks = (self.blocks,) if isinstance(self.blocks, str) else self.blocks
        if not isinstance(self.blocks, Sequence) or not all(isinstance(b, str) for b in self.blocks):
            raise DiffsteerError(f"motion_consistency: blocks={self.blocks}; wanted names of modules, such as up_blocks.0")
        self.blocks = tuple(self.blocks)
        if self.features == "pixels" and self.blocks != BLOCKS:
            raise DiffsteerError("motion_consistency: blocks have no effect with features=pixels: take features=network")
        self.taps = self.blocks if self.features == "network" else ()
        if self.features == "network" and not self.blocks:
            raise DiffsteerError("motion_consistency: features=network wants blocks, modules of the denoiser: up_blocks.0")
        self.frames: Tensor | None = None if self.reference is None else as_clip(self.reference)
        self._mask: Tensor | None = None
        if self.mask is None or isinstance(self.mask, bool | int | float):
            raise DiffsteerError(f'motion_consistency: mask={self.mask}; valid: "", moving, or a picture or clip')
        if isinstance(self.mask, Tensor) or (self.mask and self.mask != "moving"):
            self._mask = as_clip(self.mask, least=1).mean(1)
            if float(self._mask.max()) <= 0:
                raise DiffsteerError("motion_consistency: the mask is black all over: no place counts")
        if self.mask == "moving" and self.frames is not None and not bool(moving_mask(self.frames).any()):
            raise DiffsteerError("motion_consistency: nothing moves in the reference: with mask=moving no place counts")

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        """Refuse to run without a reference."""
        if self.frames is None:
            raise DiffsteerError(
                "motion_consistency has no reference: give reference=CLIP, a GIF, an MP4 or a folder of frames"
            )

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Clips (N, F, 3, H, W) in [0, 1] -> (N,)."""
        if samples.ndim != 5:
            raise DiffsteerError(f"motion_consistency scores clips (N, F, 3, H, W), not {tuple(samples.shape)}")
        if samples.shape[1] < 2:
            raise DiffsteerError("motion_consistency compares frames, and clips of one frame are made: ask for more")
        return self._compare(samples, self.clip(samples.shape[1], samples.shape[-2], samples.shape[-1])[None])

    def score_features(self, features: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Tensor:
        """Features of the tapped modules, (N, F, C, h, w) and those of the reference (1, F, C, h, w), -> (N,)."""
        return torch.stack([self._compare(features[name], reference[name]) for name in self.blocks]).mean(0)

    def clip(self, frames: int, height: int, width: int) -> Tensor:
        """The reference at this size, (F, 3, H, W): frames are taken at even distances, pictures stretched (never cut).

        Raises:
            DiffsteerError: it has fewer frames.
        """
        assert self.frames is not None
        return resampled(self.frames, frames, height, width)

    def _compare(self, clips: Tensor, reference: Tensor) -> Tensor:
        pairs = pairs_of(clips.shape[1], self.pairs)
        return -inconsistency(clips, reference, pairs, self.variant, self.temperature, self.side, self._places(clips))

    def _places(self, clips: Tensor) -> Tensor | None:
        """The mask at the size of pooled features, (F, h', w')."""
        if self.mask == "" and self._mask is None:
            return None
        frames, side = clips.shape[1], [min(s, self.side) for s in clips.shape[-2:]]
        if self._mask is None:
            assert self.frames is not None
            return moving_mask(resampled(self.frames, frames, 4 * side[0], 4 * side[1]), (side[0], side[1]))
        mask = self._mask if len(self._mask) > 1 else self._mask.expand(frames, -1, -1)
        mask = mask[torch.linspace(0, len(mask) - 1, frames).round().long()]
        return adaptive_avg_pool2d(mask[:, None], (side[0], side[1]))[:, 0].contiguous()
