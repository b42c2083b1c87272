"""A contact sheet: many images on one, with captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffsteer.media import read_clip
from diffsteer.types import DiffsteerError
from diffsteer.warn import warn


def sheet(rows: Sequence[Sequence[Path]], captions: Sequence[str], target: Path) -> None:
    """One picture of many: images in rows with their captions above, wrapped after eight when there is a single row."""
    images = [[frame_or_blank(path) for path in row] for row in rows]
    if not images or not images[0]:
        return
    columns = min(len(images[0]), 8) if len(images) == 1 else len(images[0])
    bands = [[row[start : start + columns] for row in images] for start in range(0, len(images[0]), columns)]
    zoom = max(1, 192 // max(images[0][0].size))
    wide, tall = (zoom * max(getattr(i, side) for row in images for i in row) for side in ("width", "height"))
    font, gap = ImageFont.load_default(), 6
    texts = [_wrapped(caption, wide, font.getlength) for caption in captions]
    head = 12 * max(text.count("\n") + 1 for text in texts) + gap
    height = head + len(images) * (tall + gap)
    canvas = Image.new("RGB", (columns * (wide + gap) + gap, len(bands) * height + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for b, band in enumerate(bands):
        for c in range(len(band[0])):
            left, top = gap + c * (wide + gap), gap + b * height
            draw.multiline_text((left, top), texts[b * columns + c], fill="black", font=font, spacing=1)
            for r, row in enumerate(band):
                picture = row[c].resize((zoom * row[c].width, zoom * row[c].height), Image.Resampling.NEAREST)
                canvas.paste(picture, (left, top + head + r * (tall + gap)))
    canvas.save(target)


def first_frame(path: Path) -> Image.Image:
    """Of a clip, or the picture itself, RGB."""
    if path.suffix == ".mp4":
        return read_clip(path)[0]
    with Image.open(path) as picture:
        return picture.convert("RGB")


def frame_or_blank(path: Path) -> Image.Image:
    """That; of what is damaged a gray one, and a warning."""
    try:
        return first_frame(path)
    except (OSError, SyntaxError, ValueError, DiffsteerError) as error:  # Pillow's errors of a broken PNG are SyntaxErrors
        warn(f"{path} cannot be read ({error}): delete it, and the command that made it makes it again")
        return Image.new("RGB", (64, 64), "lightgray")


def _wrapped(text: str, width: float, length: Callable[[str], float], lines: int = 3) -> str:
    rows, row = [], ""
    for word in text.split():
        if row and length(f"{row} {word}") > width:
            rows.append(row)
            row = ""
        row = f"{row} {word}".strip()
        while length(row) > width and len(row) > 1:
            row = row[:-1]
    rows.append(row)
    return "\n".join(rows[:lines])
