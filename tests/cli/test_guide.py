"""Gradient guidance on the command line: as a sampler, and beside one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.media import save
from diffsteer.rewards import ClipScore
from diffsteer.samplers import MPGD, FeynmanKac
from diffsteer.shapes.clips import render_clip, sample_clip

PROMPT, STEPS = "a red circle", 4


def test_it_is_what_python_does(command: Callable[..., Any], manifest: Callable[..., Any], tmp_path: Path) -> None:
    steps = f"num_inference_steps={STEPS}"
    done = command("generate", f"prompt={PROMPT}", steps, "guide=mpgd", "guide.strength=0.2", "sampler.particles=2", "out=both")
    assert done.code == 0, done.err
    (entry,) = manifest(tmp_path / "both")
    pipe = SteeredPipeline(load_pipeline("shapes"), FeynmanKac(2), ClipScore(), guide=MPGD(strength=0.2))
    out = pipe([PROMPT], num_inference_steps=STEPS, seed=0)
    assert entry["reward"] == pytest.approx(float(out.rewards[0, out.chosen[0]]), abs=1e-3)
    done = command("generate", f"prompt={PROMPT}", steps, "sampler=dps", "out=one")
    assert done.code == 0 and "8 evaluations, 4 of them backwards" in done.out
    (entry,) = manifest(tmp_path / "one")
    assert entry["ledger"]["backwards"] == STEPS


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("guide=mpdg",), "did you mean 'mpgd'?"),
        (("guide=mpgd", "sampler=dps"), "methods that guide stand alone"),
        (("guide=mpgd", "sampler=none"), "methods that guide stand alone"),
        (("guide=universal",), "recurrence goes with no weighted particles"),
        (("guide=mpgd", "reward=compressibility"), "compressibility has none"),
        (("guide=mpgd", "guide.strength=-1"), "strength=-1; it must be at least 0"),
        (("guide=",), "guide= is no option"),
        (("guide=mpgd", "guide.particles=7"), "guide.particles=7 has no effect: give sampler.particles"),
        (("guide=mpgd", "guide.eta=0"), "guide.eta=0.0 has no effect"),
        (("+guide.every=2",), "guide=none has no every"),
        (("guide=mpgd", "guide.every=0"), "every=0"),
        (("sampler=freedom", "guidance_scale=1"), "normaliser=cfg wants a pipeline under classifier-free guidance"),
        (("reward=motion_consistency", "reference=clip.gif"), "looks at clips, but this pipeline makes images"),
    ],
)
def test_what_cannot_be_is_refused(command: Callable[..., Any], tmp_path: Path, argv: tuple[str, ...], said: str) -> None:
    save(render_clip(sample_clip("colors", np.random.default_rng(4))), tmp_path / "clip.gif")
    done = command("generate", f"prompt={PROMPT}", "num_inference_steps=2", "out=here", *argv)
    assert done.code == 2 and said in done.err and len(done.err.splitlines()) == 1
    assert not done.out
    assert not (tmp_path / "here" / "images").exists()


def test_what_was_left_out_is_counted_for_every_prompt(command: Any, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red circle\na blue ring\na star")
    done = command("generate", "prompts=p.txt", "sampler=mpgd", "sampler.strength=1e30", "num_inference_steps=3", "out=o")
    lines = [line for line in done.err.splitlines() if "updates were skipped" in line]
    assert done.code == 0 and len(lines) == 2, done.err
    assert lines[1] == lines[0] + " (so, or nearly, 2 times more)"
    counted = [json.loads(line)["skipped"] for line in (tmp_path / "o/timings.jsonl").read_text().splitlines()]
    assert len(counted) == 3 and min(counted) > 0
