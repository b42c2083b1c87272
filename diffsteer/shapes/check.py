"""Reads an image of the shapes world and says whether it shows exactly what a caption says. No neural network.

The median of the border is the background. What stands out from it falls into connected pieces, and a piece of two colours
into pieces of one; each is an object. Its colour is the one of the palette that is nearest to its median colour, in OKLab. Its
shape is the template that overlaps best with its soft mask, both cropped to their boxes, if that overlap is good enough. The
thresholds put up with what a small diffusion model does to edges and colours, as a person would, and with no more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from diffsteer.shapes.grammar import BACKGROUNDS, COLORS, SHAPES, Group, Statement, parse
from diffsteer.shapes.scene import RADII, SIDE, _draw, holds

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

# Least overlap (IoU) with a shape's template, a blob overlapping more with a full shape than with a thin one; and how much
# wider or taller it may be, a long circle or square having another name.
_TOLERANCES = {
    "circle": (0.83, 1.3),
    "square": (0.80, 1.3),
    "triangle": (0.75, 1.45),
    "star": (0.70, 1.45),
    "cross": (0.71, 1.45),
    "ring": (0.66, 1.45),
}
_STRANGER = "diamond"  # not of the world; without a template of its own it would pass for a cross
_VISIBLE = 40.0  # least distance to the background, in RGB, of what is no ghost
_SPECK = 12  # pixels; anything smaller is dirt
_PLAIN = 0.7  # least part of the border that is background
_NEAR_BACKGROUND = 60.0  # in RGB
_NEAR_COLOR, _TWO_COLORS = 0.13, 0.10  # in `_oklab`
_LARGE = (RADII["small"][1] + RADII["large"][0]) / 2
_BORDER = np.pad(np.zeros((SIDE - 4, SIDE - 4), bool), 2, constant_values=True)
_GRID = 20  # side of the masks that are compared

# 4 Y, 1.5 Cb, 1.5 Cr: the eye sees shape in luma, and JPEG and autoencoders blur the rest.
_RGB_TO_EYE = np.array([[1.196, 2.348, 0.456], [-0.253, -0.497, 0.75], [0.75, -0.628, -0.122]], np.float32)
_RGB_TO_LMS = np.array([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]], np.float32)
_LMS_TO_LAB = np.array([[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]], np.float32)


@dataclass(frozen=True)
class Seen:
    """One object, its box centred at `(x, y)`; `r` compares with `Thing.r`.

    `fit`, 0 to 1, is the overlap with the best template. `shape` is None where that is too poor, or the template's shape not of
    the world; `color` is None where none of the palette is near.
    """

    shape: str | None
    color: str | None
    size: str
    x: float
    y: float
    r: float
    fit: float


@dataclass(frozen=True)
class Sight:
    """What is in an image, objects from left to right.

    `background` is None where the border is not of one colour, or of none that has a name.
    """

    background: str | None
    objects: tuple[Seen, ...]


@dataclass(frozen=True)
class Verdict:
    """Does an image show exactly what a caption says? `reasons` are what is amiss, in words; empty when nothing is."""

    correct: bool
    reasons: tuple[str, ...]


def check(image: Image.Image | NDArray[Any] | Tensor, caption: str) -> Verdict:
    """Compare an image with a caption. Objects that the caption does not name count against the image.

    Args:
        image: a PIL image, a uint8 array (H, W, 3), or a float array or tensor (3, H, W) in [0, 1].
        caption: of the grammar, e.g. ``"a red star left of a ring"``.

    Raises:
        ValueError: the caption is not of the grammar, or the image is none of these.
    """
    statement = parse(caption)
    reasons = tuple(_complaints(statement, look(image)))
    return Verdict(not reasons, reasons)


def look(image: Image.Image | NDArray[Any] | Tensor) -> Sight:
    """Find the background and the objects of an image, given as in `check`."""
    pixels = _pixels(image)
    border = pixels[_BORDER]
    ground = np.median(border, axis=0)
    plain = np.mean(np.linalg.norm(border - ground, axis=-1) < _VISIBLE) >= _PLAIN
    pieces = _pieces(pixels, ground)
    objects = [_recognise(pixels, ground, piece, _union(pieces) & ~piece) for piece in pieces]
    return Sight(_name_background(ground) if plain else None, tuple(sorted(objects, key=lambda o: (o.x, o.y))))


def _complaints(statement: Statement, sight: Sight) -> Iterator[str]:
    groups, objects = statement.groups, sight.objects
    saw = _listing(objects, sizes=any(g.size for g in groups))
    if statement.background not in (None, sight.background):
        yield f"the background is {sight.background or 'of no known colour'}, wanted {statement.background}"
    wanted = sum(g.count for g in groups)
    if len(objects) != wanted:
        yield f"{len(objects)} object{'' if len(objects) == 1 else 's'}, wanted {wanted}"
    found = [sum(_fits(group, o) for o in objects) for group in groups]
    for group, n in zip(groups, found, strict=True):
        if n < group.count:
            yield f"{f'only {n}' if n else 'no'} {_noun(group, n)}: saw {saw}"
    if len(objects) != wanted or any(n < g.count for n, g in zip(found, groups, strict=True)):
        return
    splits = [s for s in _splits(groups, objects) if all(_fits(g, o) for g, part in zip(groups, s, strict=True) for o in part)]
    if not splits:
        yield f"not {replace(statement, background=None)}: saw {saw}"
    elif statement.relation and not any(_related(statement.relation, *s) for s in splits):
        yield f"not {statement.relation}: {groups[0]} and {groups[1]} lie otherwise"


def _fits(group: Group, seen: Seen) -> bool:
    return group.shape == seen.shape and group.color in (None, seen.color) and group.size in (None, seen.size)


def _splits(groups: tuple[Group, ...], objects: tuple[Seen, ...]) -> Iterator[tuple[tuple[Seen, ...], ...]]:
    """Every way to deal the objects out to the groups."""
    for first in itertools.combinations(range(len(objects)), groups[0].count):
        rest = tuple(o for i, o in enumerate(objects) if i not in first)
        yield (tuple(objects[i] for i in first), rest)[: len(groups)]


def _related(relation: str, firsts: tuple[Seen, ...], seconds: tuple[Seen, ...]) -> bool:
    return all(holds(relation, (a.x, a.y), (b.x, b.y)) for a in firsts for b in seconds)


def _noun(group: Group, n: int) -> str:
    return str(replace(group, count=1 if n == 1 else group.count)).split(" ", 1)[1]


def _listing(objects: tuple[Seen, ...], sizes: bool) -> str:
    phrases = []
    for o in objects:
        words = [*([o.size] if sizes else []), o.color or "oddly coloured", o.shape or "blob"]
        phrases.append(f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}")
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if phrases[1:] else phrases) or "nothing"


def _pixels(image: Image.Image | NDArray[Any] | Tensor) -> Floats:
    """(64, 64, 3), 0 to 255."""
    if not isinstance(image, Image.Image):
        if not isinstance(image, np.ndarray):
            image = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
        image = Image.fromarray(_bytes(image))
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32)


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.ndim == 3 and array.dtype == np.uint8 and array.shape[2] == 3:
        return array
    if array.ndim == 3 and array.dtype.kind == "f" and array.shape[0] == 3:
        return np.ascontiguousarray(np.round(np.nan_to_num(array).clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))
    raise ValueError(f"an image is uint8 (H, W, 3) or float (3, H, W), not {array.dtype} {array.shape}")


def _contrast(pixels: Floats, ground: Floats) -> Floats:
    distance: Floats = np.linalg.norm((pixels - ground) @ _RGB_TO_EYE.T, axis=-1)
    return distance


def _pieces(pixels: Floats, ground: Floats) -> list[Mask]:
    """The masks of the objects."""
    visible = np.linalg.norm(pixels - ground, axis=-1) > _VISIBLE
    contrast = _contrast(pixels, ground)
    # Half of what is reached nearby: blur then neither widens an object nor bridges the gap to the next.
    solid = visible & (contrast > 0.5 * _spread(contrast, 3))
    return [part for piece in _connected(solid) for part in _by_color(pixels, piece)]


def _spread(field: NDArray[Any], by: int) -> NDArray[Any]:
    """The maximum over the square of side 2 `by` + 1 around each pixel."""
    padded = np.pad(field, by, mode="edge")
    rows = np.max([padded[k : k + SIDE] for k in range(2 * by + 1)], axis=0)
    most: NDArray[Any] = np.max([rows[:, k : k + SIDE] for k in range(2 * by + 1)], axis=0)
    return most


def _union(masks: list[Mask]) -> Mask:
    union: Mask = np.any(masks, axis=0)
    return union


def _connected(mask: Mask) -> list[Mask]:
    """The 8-connected pieces of a mask, specks left out."""
    width = SIDE + 2
    todo = set(np.flatnonzero(np.pad(mask, 1)).tolist())
    steps = [dy * width + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    pieces = []
    while todo:
        piece = [todo.pop()]
        for at in piece:  # grows while it is read
            near = [at + step for step in steps if at + step in todo]
            todo.difference_update(near)
            piece += near
        if len(piece) >= _SPECK:
            found = np.zeros(width * width, bool)
            found[piece] = True
            pieces.append(found.reshape(width, width)[1:-1, 1:-1])
    return pieces


def _inner(piece: Mask) -> Mask:
    """The piece without its rim, where the background shines through."""
    inner: Mask = ~_spread(~piece, 1)
    return inner if inner.sum() >= _SPECK // 2 else piece


def _by_color(pixels: Floats, piece: Mask) -> list[Mask]:
    """Cut a piece that has clearly different colours into connected pieces of one colour each."""
    inner = pixels[_inner(piece)]
    names = np.argmin(_distances(inner), axis=1)
    shares = [inner[names == i] for i in range(len(COLORS)) if np.sum(names == i) >= max(_SPECK, 0.15 * len(inner))]
    medians = np.array([np.median(share, axis=0) for share in shares])
    if len(shares) < 2 or np.linalg.norm(_oklab(medians[1:]) - _oklab(medians[:1]), axis=1).max() < _TWO_COLORS:
        return [piece]
    nearest = np.argmin(np.linalg.norm(pixels[:, :, None] - medians, axis=3), axis=2)
    return [part for i in range(len(medians)) for part in _connected(piece & (nearest == i))]


def _recognise(pixels: Floats, ground: Floats, piece: Mask, others: Mask) -> Seen:
    contrast = _contrast(pixels[piece], ground)
    color = np.median(pixels[piece][contrast >= np.median(contrast)], axis=0)  # the other half is rim
    axis = _RGB_TO_EYE @ (color - ground)
    share = (pixels - ground) @ _RGB_TO_EYE.T @ axis / max(float(axis @ axis), 1.0)
    soft = share.clip(0, 1) * (_spread(piece, 2) & ~others)
    box = x0, y0, x1, y1 = _box(soft)
    shape, fit, aspect, r_of_box = _best_template(_on_grid(soft, box))
    stretch = (x1 - x0) / (y1 - y0) / aspect
    least_fit, most_stretch = _TOLERANCES.get(shape, (np.inf, 1.0))
    r = r_of_box * (x1 - x0 + y1 - y0)
    return Seen(
        shape=shape if fit >= least_fit and max(stretch, 1 / stretch) <= most_stretch else None,
        color=_name_color(color),
        size="small" if r < _LARGE else "large",
        x=(x0 + x1) / 2,
        y=(y0 + y1) / 2,
        r=r,
        fit=fit,
    )


def _box(soft: Floats) -> Box:
    """Where the mask passes half its height, interpolated between pixels."""
    sides = []
    for axis in (0, 1):
        profile = np.pad(soft.max(axis=axis), 1)
        level = 0.5 * profile.max()
        on = np.flatnonzero(profile[1:-1] >= level) + 1
        first, last = int(on[0]), int(on[-1])
        before = (profile[first] - level) / max(profile[first] - profile[first - 1], 1e-6)
        after = (profile[last] - level) / max(profile[last] - profile[last + 1], 1e-6)
        sides.append((float(max(first - 0.5 - before, 0)), float(min(last - 0.5 + after, SIDE))))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


def _on_grid(soft: Floats, box: Box) -> Floats:
    image = Image.fromarray(soft.astype(np.float32))
    return np.asarray(image.resize((_GRID, _GRID), Image.Resampling.BILINEAR, box=box), np.float32).ravel()


def _best_template(grid: Floats) -> tuple[str, float, float, float]:
    """The name of the template that overlaps best, its overlap, its width / height and its r / (width + height)."""
    templates, facts = _templates()
    overlaps = np.minimum(templates, grid).sum(axis=1) / np.maximum(templates, grid).sum(axis=1)
    best = int(np.argmax(overlaps))
    name, aspect, r_of_box = facts[best]
    return name, float(overlaps[best]), aspect, r_of_box


@cache
def _templates() -> tuple[Floats, list[tuple[str, float, float]]]:
    """Masks on the grid, one a row: every shape small and large, crisp and blurred; and what `_best_template` tells of each."""
    rows, facts = [], []
    for shape, size, blur in itertools.product((*SHAPES, _STRANGER), RADII, (0.0, 1.0)):
        r = sum(RADII[size]) / 2
        mask = Image.new("L", (4 * SIDE, 4 * SIDE))
        draw, middle = ImageDraw.Draw(mask), 2 * SIDE
        if shape == _STRANGER:
            draw.regular_polygon((middle, middle, 4 * r), 4, rotation=45, fill=255)
        else:
            _draw(draw, shape, middle, middle, 4 * r)
        soft = np.asarray(mask.reduce(4).filter(ImageFilter.GaussianBlur(blur)), np.float32) / np.float32(255)
        box = x0, y0, x1, y1 = _box(soft)
        rows.append(_on_grid(soft, box))
        facts.append((shape, (x1 - x0) / (y1 - y0), r / (x1 - x0 + y1 - y0)))
    return np.array(rows), facts


def _name_background(rgb: Floats) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(b))) for name, b in BACKGROUNDS.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= _NEAR_BACKGROUND else None


def _name_color(rgb: Floats) -> str | None:
    distances = _distances(rgb[None])[0]
    best = int(np.argmin(distances))
    chroma = np.linalg.norm(_oklab(rgb[None])[0, 1:])
    # Greys lie between all hues; a colour must stand out from them as clearly as it resembles its name.
    return list(COLORS)[best] if distances[best] <= min(_NEAR_COLOR, 1.5 * chroma) else None


def _distances(rgb: Floats) -> Floats:
    """(N, 3) -> (N, number of colours)."""
    palette = np.array(list(COLORS.values()), np.float32)
    distances: Floats = np.linalg.norm(_oklab(rgb)[:, None] - _oklab(palette), axis=2)
    return distances


def _oklab(rgb: Floats) -> Floats:
    """(N, 3) of sRGB, 0 to 255, in OKLab (Ottosson, 2020), lightness halved: dark green is green."""
    linear = np.where(rgb <= 10.3, rgb / 3294.6, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    lab: Floats = np.cbrt(linear @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T
    return lab * np.array([0.5, 1, 1], np.float32)
