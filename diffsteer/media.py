"""What a run makes, as files: pictures are PNG, videos (lists of their frames) GIF, sounds WAV."""

from __future__ import annotations

import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL.PngImagePlugin import PngInfo
from torch import Tensor

FRAME_MS = 125  # of a GIF: what most models of short clips were trained on, 8 frames a second


class Sound(NamedTuple):
    """A sound: `samples` (channels, T) in [-1, 1], at `rate` a second."""

    samples: Tensor
    rate: int


def kind(made: Any) -> tuple[str, str]:
    """What something made is, in the plural, and how the names of such files end."""
    if isinstance(made, Sound):
        return "sounds", ".wav"
    return ("videos", ".gif") if isinstance(made, list) else ("images", ".png")


def save(made: Any, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a picture, a video or a sound; a WAV has 16 bits.

    Args:
        texts: written into a picture's metadata.
    """
    if isinstance(made, Sound):
        with wave.open(str(path), "wb") as file:
            file.setnchannels(len(made.samples))
            file.setsampwidth(2)
            file.setframerate(made.rate)
            pcm = (made.samples.detach().cpu().clamp(-1, 1) * 32767).round().short()
            file.writeframes(pcm.T.contiguous().numpy().tobytes())
    elif isinstance(made, list):
        made[0].save(path, format="GIF", save_all=True, append_images=made[1:], duration=FRAME_MS, loop=0)
    else:
        info = PngInfo()
        for key, text in (texts or {}).items():
            info.add_text(key, text)
        made.save(path, format="PNG", pnginfo=info)
