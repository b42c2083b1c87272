"""The shapes world: the grammar reads back what it says, scenes are as described, and the checker agrees with both."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from diffsteer.shapes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    TASKS,
    UNSEEN_PAIRS,
    WORDS,
    Group,
    Scene,
    Statement,
    Thing,
    caption,
    check,
    describes,
    look,
    one_attribute_changed,
    parse,
    render,
    sample_scene,
    scene_of,
    task_of,
)
from diffsteer.shapes.scene import outline

# --- captions ---

sizes, colors = st.none() | st.sampled_from(SIZES), st.none() | st.sampled_from(list(COLORS))
backgrounds, relations = st.none() | st.sampled_from(list(BACKGROUNDS)), st.none() | st.sampled_from(RELATIONS)
groups = st.builds(Group, st.sampled_from(SHAPES), st.integers(1, 4), sizes, colors)
statements = st.builds(Statement, st.tuples(groups), st.none(), backgrounds) | st.builds(
    Statement, st.tuples(groups, groups), relations, backgrounds
)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def pairs_of_things(draw: st.DrawFn) -> Statement:
    """Two things of different shapes, both with a colour or both without, as the tasks have them."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=2, max_size=2, unique=True))
    hues = draw(st.just([None, None]) | st.lists(st.sampled_from(list(COLORS)), min_size=2, max_size=2))
    first, second = (Group(s, 1, draw(sizes), c) for s, c in zip(shapes, hues, strict=True))
    return Statement((first, second), draw(relations), draw(backgrounds))


drawable = st.builds(Statement, st.tuples(groups), st.none(), backgrounds) | pairs_of_things()


@given(statements)
def test_parse_reads_back_every_statement(statement: Statement) -> None:
    assert parse(str(statement)) == statement
    assert set(str(statement).split()) <= set(WORDS)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("a rad star", "'rad'"),
        ("a star near a ring", "'near'"),
        ("a star a ring", "'a' cannot follow 'a star'"),
        ("a star on a red background", "'red' is no background"),
        ("two star", "'star' stands where a shape should"),
        ("a large red", "the end stands where a shape should"),
        ("red star", "an article or a number"),
        ("a star and a ring and a cross", "'and a cross' is left over"),
    ],
)
def test_parse_names_the_word_it_cannot_read(words: str, named: str) -> None:
    for read in (parse, lambda text: check(paint(), text)):
        with pytest.raises(ValueError, match=named):
            read(words)


# --- scenes ---


@settings(deadline=None)
@given(drawable, seeds)
def test_a_statement_describes_its_scene_and_no_changed_one_does(statement: Statement, seed: int) -> None:
    scene = scene_of(statement, np.random.default_rng(seed))
    assert describes(statement, scene)
    changed = one_attribute_changed(statement)
    assert changed
    assert [str(s) for s in changed if describes(s, scene)] == []


@settings(deadline=None)
@given(st.sampled_from(TASKS), seeds)
def test_sampled_scenes_are_of_their_task_and_drawn_apart_and_inside(task: str, seed: int) -> None:
    scene, again = (sample_scene(task, np.random.default_rng(seed)) for _ in range(2))
    image = render(scene)
    pixels = np.asarray(image)
    assert scene == again and image.tobytes() == render(again).tobytes()
    assert (image.size, image.mode) == ((64, 64), "RGB")
    assert task_of(parse(caption(scene))) == task
    frame = np.pad(np.zeros((60, 60), bool), 2, constant_values=True)
    assert (pixels[frame] == scene.background_rgb).all()
    for a, b in itertools.combinations(scene.things, 2):
        assert max(abs(a.x - b.x), abs(a.y - b.y)) - a.r - b.r >= 3.99


@pytest.mark.parametrize("task", TASKS)
def test_sample_scene_keeps_unseen_pairs_apart(task: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        assert not unseen(sample_scene(task, rng, pairs="seen"))
        assert unseen(sample_scene(task, rng, pairs="unseen"))
    assert {bool(unseen(sample_scene(task, rng))) for _ in range(100)} == {True, False}


def unseen(scene: Scene) -> set[tuple[str, str]]:
    return {(t.color, t.shape) for t in scene.things} & UNSEEN_PAIRS


def test_sample_scene_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="unknown task 'colour'"):
        sample_scene("colour", np.random.default_rng(0))
    with pytest.raises(ValueError, match="unknown pairs 'some'"):
        sample_scene("colors", np.random.default_rng(0), pairs="some")


def test_importing_the_shapes_world_imports_no_network_library() -> None:
    code = "import sys, diffsteer.shapes; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout == "[]\n"


# --- the checker: error rates ---

Spoil = Callable[[Image.Image, np.random.Generator], Image.Image]


def as_it_is(image: Image.Image, _: np.random.Generator) -> Image.Image:
    return image


def blurred(image: Image.Image, _: np.random.Generator) -> Image.Image:
    return image.reduce(2).resize(image.size, Image.Resampling.BILINEAR)


def noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return from_floats(np.asarray(image) + rng.normal(0, 0.03 * 255, (64, 64, 3)))


def shifted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return from_floats(np.asarray(image) + 15.0 * rng.choice([-1, 1], 3))


def compressed(image: Image.Image, _: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file)


def from_floats(pixels: NDArray[Any]) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def error_rates(per_task: int, spoil: Spoil) -> tuple[float, float]:
    """How many true captions are rejected, and how many accepted that differ in one attribute."""
    rng = np.random.default_rng(7)
    rejected = accepted = 0
    for task in TASKS:
        for _ in range(per_task):
            scene = sample_scene(task, rng)
            image, changed = spoil(render(scene), rng), one_attribute_changed(scene.statement)
            rejected += not check(image, caption(scene)).correct
            accepted += check(image, str(changed[rng.integers(len(changed))])).correct
    return rejected / (6 * per_task), accepted / (6 * per_task)


RATES = [(as_it_is, 0.005), (blurred, 0.02), (noisy, 0.02), (shifted, 0.02), (compressed, 0.02)]


@pytest.mark.parametrize(("spoil", "most"), RATES)
def test_error_rates(spoil: Spoil, most: float) -> None:
    assert max(error_rates(100 if spoil is as_it_is else 50, spoil)) <= most


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "most"), RATES)
def test_error_rates_on_six_thousand(spoil: Spoil, most: float) -> None:
    assert max(error_rates(1000, spoil)) <= most


@settings(deadline=None)
@given(st.sampled_from(TASKS), seeds)
def test_look_finds_every_thing_where_it_is(task: str, seed: int) -> None:
    scene = sample_scene(task, np.random.default_rng(seed))
    sight = look(render(scene))
    assert sight.background == scene.background
    assert len(sight.objects) == len(scene.things)
    for thing in scene.things:
        seen = min(sight.objects, key=lambda o: abs(o.x - thing.x) + abs(o.y - thing.y))
        assert (seen.shape, seen.color, seen.size) == (thing.shape, thing.color, thing.size)
        assert max(abs(seen.x - thing.x), abs(seen.y - thing.y), abs(seen.r - thing.r)) < 1.1


# --- the checker: images made by hand ---


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
