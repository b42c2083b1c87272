"""Schedules on the command line: by name, and in numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.measured import settled
from diffsteer.profiles import gits_schedule, local_deviation, loss_mass, trajectory
from diffsteer.rewards import ClipScore
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.schedules import AYS, Given

PROMPT = "a red circle"


def by_gits(pipe: Any, prompts: list[str]) -> Given:
    teacher = trajectory(pipe, prompts, steps=8)
    return gits_schedule(teacher, local_deviation(teacher), 3)


@pytest.mark.parametrize(
    ("argv", "schedule"),
    [
        (("schedule=ays", "schedule.table=sdxl", "num_inference_steps=4"), AYS("sdxl")),
        (("timesteps=[999,600,300,50]",), Given((999, 600, 300, 50), "timesteps")),
        (("sigmas=[100,5,1,0.1,0]",), Given((100.0, 5.0, 1.0, 0.1))),
    ],
)
def test_it_is_what_python_does(
    command: Callable[..., Any], manifest: Callable[..., Any], tmp_path: Path, argv: tuple[str, ...], schedule: Any
) -> None:
    done = command("generate", f"prompt={PROMPT}", "sampler.particles=2", "out=here", *argv)
    assert done.code == 0, done.err
    assert "16 evaluations" in done.out
    (entry,) = manifest(tmp_path / "here")
    pipe = SteeredPipeline(load_pipeline("shapes"), FeynmanKac(2), ClipScore(), schedule=schedule)
    out = pipe([PROMPT], num_inference_steps=4, seed=0)
    assert entry["reward"] == pytest.approx(float(out.rewards[0, out.chosen[0]]), abs=1e-3)


@pytest.mark.parametrize(
    ("argv", "measure"),
    [
        (
            ("schedule=loss_mass", "schedule.prompts=2", "schedule.cells=4", "schedule.steps=4"),
            lambda pipe, prompts: loss_mass(pipe, prompts, cells=4, steps=4),
        ),
        (("schedule=gits", "schedule.prompts=2", "schedule.teacher=8"), by_gits),
    ],
)
def test_one_that_is_measured_is_measured_once_and_kept(
    command: Callable[..., Any],
    manifest: Callable[..., Any],
    tmp_path: Path,
    argv: tuple[str, ...],
    measure: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = [PROMPT, "a blue star", "three rings"]
    (tmp_path / "some.txt").write_text("\n".join(prompts))
    args = ("prompts=some.txt", "sampler=best_of_n", "sampler.particles=1", "num_inference_steps=3", "out=here", *argv)
    done = command("generate", *args)
    assert done.code == 0, done.err
    pipe = load_pipeline("shapes")
    schedule = measure(pipe, prompts[:2])
    kept = json.loads((tmp_path / "here" / "schedule.json").read_text())
    assert tuple(kept.get("values", kept.get("masses"))) == getattr(schedule, "values", getattr(schedule, "masses", None))
    out = SteeredPipeline(pipe, BestOfN(1), ClipScore(), schedule=schedule)(prompts, num_inference_steps=3, seed=0)
    found = [entry["reward"] for entry in manifest(tmp_path / "here")]
    assert found == pytest.approx([float(r) for r in out.rewards[:, 0]], abs=0.05)
    # prompts that come later walk what was measured before
    (tmp_path / "some.txt").write_text("\n".join([*prompts, "a cross"]))
    monkeypatch.setattr("diffsteer.measured.loss_mass", lambda *a, **k: pytest.fail("measured again"))
    monkeypatch.setattr("diffsteer.measured.trajectory", lambda *a, **k: pytest.fail("measured again"))
    assert command("generate", *args).code == 0
    (tmp_path / "some.txt").write_text("\n".join([*prompts, "a cross", "a ring"]))
    (tmp_path / "here" / "schedule.json").write_text("[]")
    again = command("generate", *args)
    assert again.code == 2 and "schedule.json holds no schedule" in again.err and len(again.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("schedule=aYs",), "did you mean 'ays'?"),
        (("schedule=ays", "schedule.table=sd3"), "table='sd3' is unknown; valid: sd15, sdxl, svd"),
        (("schedule=ays", "schedule.rho=3"), "'schedule.rho'"),
        (("schedule=karras", "sampler=none"), "is the plain chain"),
        (("schedule=karras", "transition=native"), "leave the schedule out"),
        (("schedule=karras", "sigmas=[3,2]"), "give one of sigmas and schedule"),
        (("sigmas=[2,3]",), "sigmas must fall from step to step"),
        (("sigmas=3",), "wanted numbers that fall"),
        (("timesteps=[5000,1]",), "timesteps lie in [0, 999]"),
        (("schedule=",), "schedule= is no option"),
        (("schedule=gits", "schedule.teacher=0"), "gits: teacher=0; at least 1 is needed"),
        (("schedule=loss_mass", "schedule.cells=1"), "loss_mass: cells=1; at least 2 are needed"),
        (
            ("schedule=gits", "schedule.teacher=2", "num_inference_steps=5"),
            "gits: 5 steps are more than its teacher's, schedule.teacher=2",
        ),
    ],
)
def test_what_cannot_be_is_refused(command: Callable[..., Any], tmp_path: Path, argv: tuple[str, ...], said: str) -> None:
    done = command("generate", f"prompt={PROMPT}", "out=here", *argv)
    assert done.code == 2 and said in done.err and len(done.err.splitlines()) == 1, done.err
    assert not (tmp_path / "here" / "images").exists()


def test_a_kept_schedule_is_of_the_same_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Counted:
        name, count, prompts = "counted", 0, 8

        def measured(self, pipe: Any, prompts: Any, steps: int | None, **call: Any) -> Given:
            self.count += 1
            return Given((9.0, float(self.count)))

    schedule, path = Counted(), tmp_path / "schedule.json"
    found = [settled(schedule, None, ["a"], None, path, settings) for settings in ("one", "one", "other", "other", "one")]
    assert [s.values[1] for s in found if isinstance(s, Given)] == [1.0, 1.0, 2.0, 2.0, 3.0]
    assert capsys.readouterr().out.count("schedule counted: measured first, on 1 prompt\n") == 3


def test_it_is_measured_as_it_is_walked(command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the negative prompt, and not before what is wrong has been found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = ("generate", f"prompt={PROMPT}", "sampler=best_of_n", "sampler.particles=1", "num_inference_steps=3")
    measured = ("schedule=loss_mass", "schedule.cells=4", "schedule.steps=4")
    for name, more in (("plain", ()), ("not", ("negative_prompt=a blue square",))):
        done = command(*small, *measured, *more, f"out={name}")
        assert done.code == 0, done.err
    one, other = (json.loads((tmp_path / name / "schedule.json").read_text())["masses"] for name in ("plain", "not"))
    assert one != other
    monkeypatch.setattr("diffsteer.measured.trajectory", lambda *a, **k: pytest.fail("measured"))
    for wrong, said in (
        (("timesteps=[999,1]",), "give one of timesteps and schedule"),
        (("schedule.teacher=2",), "schedule.teacher=2"),
    ):
        refused = command(*small, "schedule=gits", *wrong, "out=wrong")
        assert refused.code == 2 and said in refused.err and refused.err.count("\n") == 1, refused.err
