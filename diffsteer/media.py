"""What a run makes, as files: pictures are PNG, videos (lists of their frames) GIF or MP4, sounds WAV; and clips read back."""

from __future__ import annotations

import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffsteer.types import DiffsteerError

if TYPE_CHECKING:  # PIL is imported by what reads and writes: importing diffsteer is to stay quick
    from PIL import Image

VIDEOS = ("gif", "mp4")
FRAME_MS = 120  # of a GIF, in its hundredths of a second: nearly the 8 frames a second of most models of short clips
OURS = f"{FRAME_MS} ms a frame".encode()  # a GIF's comment: PIL writes equal frames as one that stands longer
LONGEST = 2048  # frames of a clip, once those that stand longer count as several


class Sound(NamedTuple):
    """A sound: `samples` (channels, T) in [-1, 1], at `rate` a second."""

    samples: Tensor
    rate: int


def kind(made: Any, video: str = "gif") -> tuple[str, str]:
    """What something made is, in the plural, and how the names of such files end; those of videos are of the given format."""
    if isinstance(made, Sound):
        return "sounds", ".wav"
    return ("videos", f".{video}") if isinstance(made, list) else ("images", ".png")


def picture_of(image: Tensor) -> Image.Image:
    """A picture (3, H, W) in [0, 1] in whole grey levels."""
    from PIL import Image

    levels = (image.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def small(samples: Tensor, side: int) -> Tensor | None:
    """Pictures (N, 3, H, W) in [0, 1], or the middle frames of clips (N, F, 3, H, W), no longer than `side`, as bytes
    (N, 3, h, w). None of what is neither."""
    x = samples[:, samples.shape[1] // 2] if samples.ndim == 5 else samples
    if x.ndim != 4 or x.shape[1] != 3:
        return None
    shrink = max(1.0, max(x.shape[-2:]) / side)
    size = [max(1, round(n / shrink)) for n in x.shape[-2:]]
    return (interpolate(x.detach().float(), size, mode="area") * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def save(made: Any, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a picture, a video or a sound; a WAV has 16 bits, an MP4 H.264.

    Args:
        path: a video's ending, .mp4 or another, says its format; ``.part`` after it does not count.
        texts: written into a picture's metadata.

    Raises:
        DiffsteerError: an MP4 without PyAV.
    """
    if isinstance(made, Sound):
        with wave.open(str(path), "wb") as file:
            file.setnchannels(len(made.samples))
            file.setsampwidth(2)
            file.setframerate(made.rate)
            pcm = (made.samples.detach().cpu().clamp(-1, 1) * 32767).round().short()
            file.writeframes(pcm.T.contiguous().numpy().tobytes())
    elif isinstance(made, list) and path.name.removesuffix(".part").endswith(".mp4"):
        _save_mp4(made, path)
    elif isinstance(made, list):
        made[0].save(path, "GIF", save_all=True, append_images=made[1:], duration=FRAME_MS, loop=0, comment=OURS)
    else:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key, text in (texts or {}).items():
            info.add_text(key, text)
        made.save(path, format="PNG", pnginfo=info)


def check_video(video: str) -> None:
    """Refuse a format that cannot be written.

    Raises:
        DiffsteerError: an unknown one, or one whose package is missing.
    """
    if video not in VIDEOS:
        raise DiffsteerError(f"video={video!r} is unknown; valid: {', '.join(VIDEOS)}")
    if video == "mp4":
        _av()


def read_clip(path: str | Path, least: int = 2) -> list[Image.Image]:
    """The frames of a clip, RGB: a GIF or another animated picture, a video (with PyAV), or a folder of pictures in order. A
    frame that stands for as long as several of the shortest is that many.

    Raises:
        DiffsteerError: nothing there, or nothing that can be read.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in (".png", ".jpg", ".webp"))
        frames = [frame for p in files for frame in _pictures(p)[:1]]
    elif not path.is_file():
        raise DiffsteerError(f"{path}: there is no such clip")
    else:
        frames = _read_video(path) if path.suffix.lower() in (".mp4", ".webm", ".mov", ".mkv", ".avi") else _pictures(path)
    if len(frames) < least:
        raise DiffsteerError(f"{path}: a clip has at least {least} frames, and this has {len(frames)}")
    if len({frame.size for frame in frames}) > 1:
        raise DiffsteerError(f"{path}: its frames are of several sizes, {frames[0].size} and others")
    return frames


def _pictures(path: Path) -> list[Image.Image]:
    """The pictures in a file, as often as they are shown."""
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            comment = picture.info.get("comment")
            timed = [(frame.convert("RGB"), frame.info.get("duration") or 0) for frame in ImageSequence.Iterator(picture)]
    except UnidentifiedImageError:
        return _read_video(path)
    except (OSError, SyntaxError, ValueError) as error:  # what PIL says of broken files
        raise DiffsteerError(f"{path}: it cannot be read ({error})") from error
    unit = FRAME_MS if comment == OURS else min((ms for _, ms in timed if ms > 0), default=1)
    counts = [max(round(ms / unit), 1) for _, ms in timed]
    if sum(counts) > LONGEST:
        raise DiffsteerError(
            f"{path}: some of its frames stand so long that it has {sum(counts)}; at most {LONGEST} can be read"
        )
    return [frame for (frame, _), count in zip(timed, counts, strict=True) for _ in range(count)]


def as_clip(clip: Any, least: int = 2) -> Tensor:
    """A clip as (F, 3, H, W) in [0, 1]: from a file, a folder, PIL images, or a tensor.

    Raises:
        DiffsteerError: what is none, cannot be read, or has fewer frames than `least`.
    """
    if isinstance(clip, Tensor):
        if clip.ndim != 4 or clip.shape[1] != 3:
            raise DiffsteerError(f"a clip is a tensor (F, 3, H, W) in [0, 1], not {tuple(clip.shape)}")
        pixels: Tensor = clip.float()
        low, high = float(pixels.amin()), float(pixels.amax())
        if not (low >= -0.01 and high <= 1.01):
            raise DiffsteerError(f"a clip lies in [0, 1], and this from {low:g} to {high:g}")
        return pixels
    from PIL import Image

    if isinstance(clip, Image.Image):
        clip = [clip]
    if not isinstance(clip, (str, Path, list, tuple)):
        raise DiffsteerError(f"a clip is a file, a folder, frames, or a tensor (F, 3, H, W) in [0, 1], not {clip!r}")
    frames = clip if isinstance(clip, (list, tuple)) else read_clip(clip, least)
    if not all(isinstance(frame, Image.Image) for frame in frames):
        raise DiffsteerError(f"the frames of a clip are PIL images, not {type(frames[0]).__name__}: a tensor is (F, 3, H, W)")
    if len(frames) < least or len({frame.size for frame in frames}) > 1:
        raise DiffsteerError(f"a clip is at least {least} frames of one size, not {[frame.size for frame in frames]}")
    arrays = np.stack([np.asarray(f.convert("RGB")) for f in frames])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def resampled(clip: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Another number of frames, no more than there are, and another size."""
    if frames > len(clip):
        raise DiffsteerError(
            f"the reference has {len(clip)} frames, and clips of {frames} are made: give call.num_frames={len(clip)}"
        )
    chosen = clip[torch.linspace(0, len(clip) - 1, frames).round().long()]
    same = chosen.shape[-2:] == (height, width)
    return chosen if same else interpolate(chosen, (height, width), mode="bilinear", antialias=True, align_corners=False)


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise DiffsteerError("MP4 needs PyAV: pip install 'diffsteer[video]', or take GIF") from None
    return av


def _read_video(path: Path) -> list[Image.Image]:
    av = _av()
    try:
        with av.open(str(path)) as file:
            return [frame.to_image() for frame in file.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise DiffsteerError(f"{path}: it is no clip that can be read ({error})") from error


def _save_mp4(frames: Sequence[Image.Image], path: Path) -> None:
    """4:2:0 wants even sides: an odd one loses its last line."""
    av = _av()
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=1000 // FRAME_MS)
        stream.width, stream.height = (side // 2 * 2 for side in frames[0].size)
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "12"}
        for frame in frames:
            cut = np.asarray(frame.convert("RGB"))[: stream.height, : stream.width]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(cut), format="rgb24")))
        file.mux(stream.encode())
