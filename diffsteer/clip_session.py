"""What a session over a pipeline can do with clips: encode them, and hand out the denoiser's features of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffsteer import decoding
from diffsteer.decoding import Size
from diffsteer.families import Family
from diffsteer.session import Session
from diffsteer.start import refuse_encoding
from diffsteer.types import DiffsteerError


class ClipSession(Session):
    """Of pipelines whose clips are encoded frame by frame, and whose networks have a row a frame."""

    user: Any
    family: Family
    _size: Size

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.features: dict[str, Tensor] = {}
        self._taps: tuple[str, ...] = ()

    def encoded(self, frames: Tensor) -> Tensor:
        """As in `Session`."""
        if self.family.layout is not decoding.video_by_image:
            raise refuse_encoding(type(self.user).__name__)
        with torch.no_grad():
            return decoding.encoded_by_image(self.user, self._size, frames)

    @contextmanager
    def tapping(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """As in `Session`."""
        if self.family.layout is not decoding.video_by_image:
            raise refuse_encoding(type(self.user).__name__)
        self.features, self._taps = {}, tuple(names)
        try:
            yield self.features
        finally:
            self._taps = ()

    def lay_out(self, states: Tensor) -> None:
        """Features of both halves of guidance, a row a frame, as those of the conditional half, which comes last: of states
        (N, C, F, h, w) they are (N, F, C', h', w')."""
        for name, feature in self.features.items() if self._taps else ():
            if not isinstance(feature, Tensor) or feature.ndim != 4 or len(feature) % (len(states) * states.shape[2]):
                shape = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
                raise DiffsteerError(
                    f"the module {name} gives no features of frames, (N F, C, h, w), but {shape}: take one like up_blocks.0"
                )
            self.features[name] = feature.view(-1, states.shape[2], *feature.shape[1:])[-len(states) :]
