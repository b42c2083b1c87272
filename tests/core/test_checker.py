"""The checker, on images made by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from core.test_shapes import blurred, from_floats
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from diffsteer.shapes import (
    BACKGROUNDS,
    COLORS,
    Scene,
    Statement,
    Thing,
    check,
    look,
    render,
)
from diffsteer.shapes.scene import outline


def thing(shape: str, color: str = "red", x: float = 32, y: float = 32, r: float = 9.0) -> Thing:
    return Thing(shape, color, "", x, y, r, COLORS[color])


def paint(*things: Thing, background: str = "white") -> Image.Image:
    return render(Scene("", Statement(()), things, background, BACKGROUNDS[background]))


def polygon(corners: list[tuple[float, float]], r: float = 11.0, color: str = "red") -> Image.Image:
    image = Image.new("RGB", (256, 256), BACKGROUNDS["white"])
    ImageDraw.Draw(image).polygon([(128 + 4 * r * u, 128 + 4 * r * v) for u, v in corners], fill=COLORS[color])
    return image.reduce(4)


STAR, RING = thing("star", x=16), thing("ring", "blue", x=48)


def test_a_right_image_has_no_reasons_against_it() -> None:
    for words in ("a star and a ring", "a blue ring right of a red star on a white background", "a red star left of a ring"):
        assert check(paint(STAR, RING), words).reasons == ()


@pytest.mark.parametrize(
    ("things", "words", "reasons"),
    [
        ((), "a star", ("0 objects, wanted 1", "no star: saw nothing")),
        ((STAR,), "a star and a ring", ("1 object, wanted 2", "no ring: saw a red star")),
        ((STAR, RING), "a star", ("2 objects, wanted 1",)),
        ((STAR, RING), "two red stars", ("only 1 red star: saw a red star and a blue ring",)),
        (
            (STAR, RING),
            "a blue star and a red ring",
            ("no blue star: saw a red star and a blue ring", "no red ring: saw a red star and a blue ring"),
        ),
        ((STAR, RING), "a star right of a ring", ("not right of: a star and a ring lie otherwise",)),
        ((STAR, RING), "a star above a ring", ("not above: a star and a ring lie otherwise",)),
        ((STAR, RING), "a star and a star", ("not a star and a star: saw a red star and a blue ring",)),
        ((STAR,), "a star on a black background", ("the background is white, wanted black",)),
        ((thing("star", r=7.5),), "a large star", ("no large star: saw a small red star",)),
        ((thing("circle", "orange"),), "a red circle", ("no red circle: saw an orange circle",)),
    ],
)
def test_a_wrong_image_is_told_why(things: tuple[Thing, ...], words: str, reasons: tuple[str, ...]) -> None:
    verdict = check(paint(*things), words)
    assert (verdict.correct, verdict.reasons) == (False, reasons)


def test_numbers_and_relations_hold_for_whole_groups() -> None:
    image = paint(thing("star", x=16, y=14, r=7), thing("star", x=16, y=50, r=7), thing("ring", x=50))
    assert check(image, "two stars left of a ring").correct
    assert not check(image, "two stars above a ring").correct
    assert not check(image, "a star left of two rings").correct


@pytest.mark.parametrize("overlap", [0, 5, 10])
def test_two_fused_squares_are_not_two_squares(overlap: float) -> None:
    apart, fused = (paint(thing("square", x=20, r=10), thing("square", x=38 + by, r=10)) for by in (5, -overlap))
    assert check(apart, "two squares").correct
    assert not check(fused, "two squares").correct
    assert not check(fused, "a square").correct


def test_touching_squares_of_two_colours_are_two() -> None:
    image = paint(thing("square", x=22, r=10), thing("square", "blue", x=40, r=10))
    assert check(image, "a red square left of a blue square").correct


def test_a_ring_with_its_hole_filled_is_a_circle() -> None:
    image = paint(thing("ring", r=12), thing("circle", r=8))
    assert check(image, "a circle").correct
    assert check(image, "a ring").reasons == ("no ring: saw a red circle",)


@pytest.mark.parametrize("words", ["a star", "a star on a gray background"])
def test_a_gradient_is_no_background(words: str) -> None:
    ramp = np.repeat(np.linspace(245, 18, 64)[None, :, None], 64, axis=0).repeat(3, axis=2)
    star = np.asarray(paint(thing("star")), float)
    is_star = np.abs(star - 245).max(axis=2, keepdims=True) > 60
    assert not check(from_floats(np.where(is_star, star, ramp)), words).correct


@pytest.mark.parametrize(("strength", "counts"), [(0.1, False), (0.5, True)])
def test_a_ghost_counts_when_it_can_be_seen(strength: float, counts: bool) -> None:
    for background, color in itertools.product(BACKGROUNDS, COLORS):
        extra = thing("circle", color, x=48)
        image = Image.blend(paint(STAR, background=background), paint(STAR, extra, background=background), strength)
        assert check(image, "a star").correct is not counts, f"{color} on {background}"


@pytest.mark.parametrize(("side", "counts"), [(3, False), (6, True)])
def test_a_fragment_counts_and_a_speck_does_not(side: int, counts: bool) -> None:
    image = paint(STAR)
    image.paste(COLORS["blue"], (48, 20, 48 + side, 20 + side))
    assert check(image, "a star").correct is not counts


@pytest.mark.parametrize(
    "corners",
    [
        pytest.param([(-0.9, -0.9), (-0.2, -0.9), (-0.2, 0.3), (0.9, 0.3), (0.9, 0.9), (-0.9, 0.9)], id="L"),
        pytest.param([(0, -1), (1, 0), (0, 1), (-1, 0)], id="diamond"),
        pytest.param([(-0.9, -0.5), (0.9, -0.5), (0.9, 0.5), (-0.9, 0.5)], id="oblong"),
        pytest.param([(1, -0.5), (0.2, 0.1), (0.6, 0.9), (-0.3, 0.5), (-0.9, 0.8), (-0.5, -0.2), (-0.2, -0.9)], id="splat"),
        pytest.param([(-1, -1), (1, -1), (1, -0.4), (0.3, -0.4), (0.3, 1), (-0.3, 1), (-0.3, -0.4), (-1, -0.4)], id="T"),
    ],
)
def test_what_has_no_name_here_has_no_shape(corners: list[tuple[float, float]]) -> None:
    assert [(o.shape, o.color) for o in look(polygon(corners)).objects] == [(None, "red")]


@pytest.mark.parametrize("shape", ["square", "triangle", "star", "cross"])
def test_a_lumpy_shape_keeps_its_name(shape: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lumpy = [(u + rng.uniform(-0.1, 0.1), v + rng.uniform(-0.1, 0.1)) for u, v in outline(shape)]
        assert check(blurred(polygon(lumpy), rng), f"a red {shape}").correct


def test_half_a_circle_is_no_circle() -> None:
    image = paint(thing("circle", r=12))
    image.paste(BACKGROUNDS["white"], (0, 32, 64, 64))
    assert not check(image, "a circle").correct


def test_a_brown_circle_is_a_circle_of_no_known_colour() -> None:
    image = paint(Thing("circle", "", "", 32, 32, 9.0, (110, 90, 75)))
    assert check(image, "a circle").correct
    assert [o.color for o in look(image).objects] == [None]
    assert check(image, "a red circle").reasons == ("no red circle: saw an oddly coloured circle",)


# --- the checker: what it takes ---


def test_every_form_of_an_image_is_read_alike() -> None:
    torch = pytest.importorskip("torch")
    image = paint(STAR, RING)
    array = np.asarray(image)
    floats = array.transpose(2, 0, 1).astype(np.float32) / 255
    sight = look(image)
    for same in (array, floats, torch.tensor(floats, requires_grad=True), image.convert("RGBA")):
        assert look(same) == sight
    for alike in (image.resize((256, 256)), torch.tensor(floats).bfloat16()):
        assert check(alike, "a red star left of a blue ring").correct


def test_a_diverged_image_is_wrong_and_no_error() -> None:
    assert not check(np.full((3, 64, 64), np.nan, np.float32), "a star").correct


@pytest.mark.parametrize("array", [np.zeros((3, 64, 64), np.uint8), np.zeros((64, 64), np.uint8), np.zeros((1, 3, 64, 64))])
def test_what_is_no_image_is_refused(array: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="an image is uint8"):
        check(array, "a star")
