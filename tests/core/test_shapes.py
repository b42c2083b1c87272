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
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

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
    for read in (parse, lambda text: check(Image.new("RGB", (64, 64), "white"), text)):
        with pytest.raises(ValueError, match=named):
            read(words)


# --- scenes ---


@given(drawable, seeds)
def test_a_statement_describes_its_scene_and_no_changed_one_does(statement: Statement, seed: int) -> None:
    scene = scene_of(statement, np.random.default_rng(seed))
    assert describes(statement, scene)
    changed = one_attribute_changed(statement)
    assert changed
    assert [str(s) for s in changed if describes(s, scene)] == []


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
    assert max(error_rates(50 if spoil is as_it_is else 25, spoil)) <= most


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "most"), RATES)
def test_error_rates_on_six_thousand(spoil: Spoil, most: float) -> None:
    assert max(error_rates(1000, spoil)) <= most


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
