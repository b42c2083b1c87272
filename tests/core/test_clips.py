"""Clips of the shapes world, what they show to move, and clips as files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsteer import media
from diffsteer.shapes import caption, check
from diffsteer.shapes.clips import CLIP_TASKS, SPEEDS, Clip, direction_error, render_clip, sample_clip, track
from diffsteer.types import DiffsteerError


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(CLIP_TASKS))
def test_what_is_drawn_is_what_is_seen_to_move(seed: int, task: str) -> None:
    clip = sample_clip(task, np.random.default_rng(seed))
    frames = render_clip(clip)
    seen = track(frames)
    assert len(seen) == len(clip.velocities)
    assert all(t.straight < 0.6 for t in seen)
    assert all(check(f, caption(clip.scene)).correct for f in (frames[0], frames[-1]))
    if any(v != (0.0, 0.0) for v in clip.velocities):
        assert direction_error(seen, clip.velocities) < 2
    for speed in (math.hypot(*v) for v in clip.velocities):
        assert speed == 0 or SPEEDS[0] <= speed <= SPEEDS[1]


def test_the_error_of_a_direction() -> None:
    clip = next(c for c in (sample_clip("colors", np.random.default_rng(i)) for i in range(9)) if any(c.velocities[0]))
    frames, (dx, dy) = render_clip(clip), clip.velocities[0]
    assert direction_error(track(frames), [(-dx, -dy)]) == pytest.approx(180, abs=2)
    assert direction_error(track(frames[::-1]), [(dx, dy)]) == pytest.approx(180, abs=2)
    assert direction_error(track(frames), [(-dy, dx)]) == pytest.approx(90, abs=2)
    assert direction_error([], [(dx, dy)]) == 90
    assert direction_error(track([frames[0]] * 8), [(dx, dy)]) == 90  # at rest
    assert direction_error(track(frames), [(dx, dy), (2.0, 0.0)]) == pytest.approx(45, abs=2)  # one of two is missing
    assert math.isnan(direction_error(track(frames), [(0.0, 0.0)]))


def test_wrong_clips_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="valid: single_object"):
        sample_clip("counting", rng)
    with pytest.raises(ValueError, match="at least 1"):
        sample_clip("colors", rng, frames=0)
    with pytest.raises(ValueError, match="at least 2"):
        track(render_clip(Clip(sample_clip("colors", rng).scene, ((0.0, 0.0),), 1)))


@pytest.mark.parametrize(("suffix", "worst"), [(".gif", 40), (".mp4", 40)])
def test_a_clip_is_read_as_it_was_written(suffix: str, worst: int, tmp_path: Path) -> None:
    clip = sample_clip("color_attr", np.random.default_rng(3))
    frames = render_clip(clip)
    media.save(frames, tmp_path / f"clip{suffix}")
    again = media.as_clip(tmp_path / f"clip{suffix}")
    assert again.shape == (8, 3, 64, 64) and 0 <= float(again.min()) <= float(again.max()) <= 1
    assert float((again - media.as_clip(frames)).abs().mean()) < 0.03
    assert len(track(media.read_clip(tmp_path / f"clip{suffix}"))) == len(clip.velocities)


def test_a_folder_of_pictures_is_a_clip(tmp_path: Path) -> None:
    frames = render_clip(sample_clip("colors", np.random.default_rng(1)))
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i:02d}.png")
    assert torch.equal(media.as_clip(tmp_path), media.as_clip(frames))


def test_what_is_no_clip_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.gif").write_text("no picture")
    render_clip(sample_clip("colors", np.random.default_rng(1)))[0].save(tmp_path / "one.png")
    for name, said in (
        ("absent.gif", "no such clip"),
        ("text.gif", "cannot be read|can be read"),
        ("one.png", "at least 2 frames"),
    ):
        with pytest.raises(DiffsteerError, match=said):
            media.read_clip(tmp_path / name)
    with pytest.raises(DiffsteerError, match="valid: gif, mp4"):
        media.check_video("avi")
    with pytest.raises(DiffsteerError, match="is a tensor"):
        media.as_clip(torch.zeros(3, 8, 8))


@pytest.mark.parametrize("ours", [True, False])
def test_frames_that_stand_are_frames(ours: bool, tmp_path: Path) -> None:
    """Equal frames become one that stands longer; read back, a pause is a pause, and a slow clip as long as it was."""
    things = sample_clip("colors", np.random.default_rng(4)).scene
    moving = render_clip(Clip(things, ((0.5, 0.0),), 8))
    for frames in ([moving[0]] * 8 + moving, [f for f in moving for _ in range(2)]):
        if ours:
            media.save(frames, tmp_path / "clip.gif")
        else:
            frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=40)
        read = media.read_clip(tmp_path / "clip.gif")
        doubled = frames[0] == frames[1] and frames[2] != frames[1] and not ours  # nothing says that all of it is slow
        wanted = frames[::2] if doubled else frames
        assert len(read) == len(wanted)
        assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() < 40 for a, b in zip(read, wanted, strict=True))
    moving[0].save(tmp_path / "long.gif", save_all=True, append_images=moving[1:], duration=[20, 60_000, *[20] * 6])
    with pytest.raises(DiffsteerError, match="at most 2048"):
        media.read_clip(tmp_path / "long.gif")
