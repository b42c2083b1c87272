"""Schedules on the command line: by name, and in numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.rewards import ClipScore
from diffsteer.samplers import FeynmanKac
from diffsteer.schedules import AYS, Given

PROMPT = "a red circle"


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
    ("argv", "said"),
    [
        (("schedule=aYs",), "did you mean 'ays'?"),
        (("schedule=ays", "schedule.table=sd3"), "table='sd3' is unknown; valid: sd15, sdxl, svd"),
        (("schedule=ays", "schedule.rho=3"), "'schedule.rho'"),
        (("schedule=karras", "sampler=none"), "take BestOfN(1, eta=0)"),
        (("schedule=karras", "transition=native"), "leave the schedule out"),
        (("schedule=karras", "sigmas=[3,2]"), "give one of sigmas and schedule"),
        (("sigmas=[2,3]",), "sigmas must fall from step to step"),
        (("sigmas=3",), "wanted numbers that fall"),
        (("timesteps=[5000,1]",), "timesteps lie in [0, 999]"),
        (("schedule=",), "schedule= is no option"),
    ],
)
def test_what_cannot_be_is_refused(command: Callable[..., Any], tmp_path: Path, argv: tuple[str, ...], said: str) -> None:
    done = command("generate", f"prompt={PROMPT}", "out=here", *argv)
    assert done.code == 2 and said in done.err and len(done.err.splitlines()) == 1, done.err
    assert not (tmp_path / "here" / "images").exists()
