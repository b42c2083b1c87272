"""Do clips move as a reference does? On 60 reference clips of the shapes world, with captions that say nothing of motion.

    python scripts/bench_motion.py run --work DIR [--shard 0/2] [--methods "plain;at x0"]   sample and judge; resumes
    python scripts/bench_motion.py table --work DIR                                    the table, with intervals
    python scripts/bench_motion.py sheet --work DIR --methods "plain;at x0"           a contact sheet of references and clips
    python scripts/bench_motion.py memory                                              what the feature path takes
    all take --development, for other references, on which strengths were chosen

A reference is drawn, and a caption of another scene with as many things goes with it. The judge finds the things of a clip
frame by frame and fits straight lines (`diffsteer.shapes.clips.track`); its error is the angle between the motion seen and
that of the reference, 90 degrees on average for a motion that has nothing to do with it, and 90 for a thing that is lost or
does not move. The caption is checked in every frame. All methods start from the same keyed noise. Intervals are 95 %, by
bootstrap over references.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.guidance import Guidance
from diffsteer.media import as_clip, read_clip, save
from diffsteer.rewards import MotionConsistency
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.shapes import caption, check
from diffsteer.shapes.clips import CLIP_TASKS, direction_error, render_clip, sample_clip, track
from diffsteer.start import ReferenceNoise

REFERENCES = 60


def stream_of(development: bool) -> int:
    return 31 if development else 32


def cases(development: bool) -> list[dict[str, Any]]:
    """Half with one thing, half with two; every reference has something that moves."""
    found: list[dict[str, Any]] = []
    stream = stream_of(development)
    for i in range(REFERENCES):
        task, rng = CLIP_TASKS[i % len(CLIP_TASKS)], np.random.default_rng((stream, i))
        clip = sample_clip(task, rng)
        while not any(math.hypot(*v) > 0 for v in clip.velocities):
            clip = sample_clip(task, rng)
        text = caption(sample_clip(task, rng, pairs="seen").scene)
        found.append({"id": f"{stream}-{i}", "clip": clip, "caption": text, "velocities": clip.velocities})
    return found


def guided(guidance: Guidance, share: float = 0.0, **reward: Any) -> dict[str, Any]:
    return {"sampler": BestOfN(1), "guide": guidance, "reward": reward, "share": share}


THROUGH = Guidance(clean=0.0, network=0.6, lowest=0.7)  # what the command line takes

# sampler, what guides, what the reward differs by, share of the reference in the first noise
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"sampler": BestOfN(1)},
    "through the network": guided(THROUGH),
    "through the network, best of 4": guided(THROUGH) | {"sampler": BestOfN(4)},
    "at x0": guided(Guidance(clean=0.3, lowest=0.65)),
    "best of 8": {"sampler": BestOfN(8)},
    "particles": {"sampler": FeynmanKac(8, events=(0.2, 0.4, 0.6, 0.8))},
    "through the network, by place": guided(Guidance(clean=0.0, network=0.4, lowest=0.8), variant="full"),
    "through the network, features": guided(THROUGH, features="network"),
    "first noise": {"sampler": BestOfN(1), "share": 0.5},
    "first noise, through the network": guided(THROUGH, share=0.5),
}


def run(work: Path, methods: list[str], shard: tuple[int, int], development: bool, count: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    done = {(r["method"], r["id"]) for r in read(work)}
    pipe = load_pipeline("shapes-motion")
    pipe.set_progress_bar_config(disable=True)
    with (work / f"motion.{os.getpid()}.jsonl").open("a") as sink:
        for case in cases(development)[:count][shard[0] :: shard[1]]:
            frames = render_clip(case["clip"])
            for method in methods:
                if (method, case["id"]) in done:
                    continue
                facts = METHODS[method]
                reward = MotionConsistency(frames, **facts.get("reward", {}))
                start = ReferenceNoise(as_clip(frames), facts["share"]) if facts.get("share") else None
                began = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    steered = SteeredPipeline(pipe, facts["sampler"], reward, start=start, guide=facts.get("guide"), chunk=8)
                    out = steered([case["caption"]], seed=0, ids=[case["id"]])
                made = out.images[0]
                tracks = track(made)
                judged = {
                    "method": method,
                    "id": case["id"],
                    "error": direction_error(tracks, case["velocities"]),
                    "right": float(np.mean([check(f, case["caption"]).correct for f in made])),
                    "seen": len(tracks),
                    "reward": float(out.rewards[0, out.chosen[0]]),
                    "evaluations": out.ledger.evaluations,
                    "seconds": time.perf_counter() - began,
                }
                sink.write(json.dumps(judged) + "\n")
                sink.flush()
                folder = work / "clips" / method
                folder.mkdir(parents=True, exist_ok=True)
                save(made, folder / f"{case['id']}.gif")


def read(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for f in sorted(work.glob("motion.*.jsonl")) for line in f.read_text().splitlines()]


def table(work: Path, development: bool, draws: int = 2000) -> None:
    rows = [r for r in read(work) if r["id"].startswith(f"{stream_of(development)}-")]
    by: dict[str, dict[str, dict[str, Any]]] = {}
    for r in rows:
        by.setdefault(r["method"], {})[r["id"]] = r
    rng = np.random.default_rng(0)
    print("| method | clips | direction error | against plain | caption right | against plain | evaluations | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for method in [m for m in METHODS if m in by]:
        ids = sorted(set(by[method]) & set(by["plain"]))
        e, p = (np.array([by[m][i]["error"] for i in ids]) for m in (method, "plain"))
        r, q = (np.array([by[m][i]["right"] for i in ids]) for m in (method, "plain"))
        pick = rng.integers(0, len(ids), (draws, len(ids)))
        ratio = np.percentile(e[pick].mean(1) / p[pick].mean(1), [2.5, 97.5])
        gap = np.percentile((r - q)[pick].mean(1), [2.5, 97.5])
        cost = np.mean([by[method][i]["evaluations"] for i in ids]), np.median([by[method][i]["seconds"] for i in ids])
        print(
            f"| {method} | {len(ids)} | {e.mean():.1f} | x {e.mean() / p.mean():.2f} ({ratio[0]:.2f} to {ratio[1]:.2f}) "
            f"| {r.mean():.3f} | {(r - q).mean():+.3f} ({gap[0]:+.3f} to {gap[1]:+.3f}) | {cost[0]:.0f} | {cost[1]:.1f} |"
        )


def sheet(work: Path, methods: list[str], development: bool, count: int = 8) -> None:
    """Every second frame; a reference, then what each method made of its caption."""
    zoom, gap, shown = 48, 4, cases(development)[:count]
    width = 4 * (zoom + 2) + 3 * gap
    height = (1 + len(methods)) * (zoom + 2) + 3 * gap
    canvas = Image.new("RGB", (4 * width, ((count + 3) // 4) * height), "white")
    for i, case in enumerate(shown):
        rows = [render_clip(case["clip"])]
        for method in methods:
            rows.append(read_clip(work / "clips" / method / f"{case['id']}.gif"))
        for r, frames in enumerate(rows):
            for c, k in enumerate((0, 2, 4, 7)):
                at = (i % 4 * width + c * (zoom + 2), i // 4 * height + r * (zoom + 2) + (gap if r else 0))
                canvas.paste(frames[min(k, len(frames) - 1)].resize((zoom, zoom), Image.Resampling.LANCZOS), at)
        print(case["caption"], [tuple(round(c, 1) for c in v) for v in case["velocities"]])
    canvas.save(work / "motion.png")


def memory() -> None:
    """Peak resident memory of a run of four steps for four clips of 8 frames, in a process of its own each."""
    import subprocess
    import sys

    through = [f"through the network{kind}" for kind in ("", "; checkpointed", ", features", ", features; checkpointed")]
    for name in ("plain", "at x0", *through):
        told = subprocess.run([sys.executable, __file__, "one", "--methods", name], capture_output=True, text=True, check=True)
        print(name, told.stdout.strip().splitlines()[-1], flush=True)


def one(method: str) -> None:
    import resource

    name, _, checkpointed = method.partition("; ")
    pipe, case = load_pipeline("shapes-motion"), cases(True)[0]
    if checkpointed:
        pipe.unet.enable_gradient_checkpointing()
    facts = METHODS[name]
    reward = MotionConsistency(render_clip(case["clip"]), **facts.get("reward", {}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    SteeredPipeline(pipe, facts["sampler"], reward, guide=facts.get("guide"))(
        [case["caption"]] * 4, seed=0, num_inference_steps=4
    )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{grown:.0f} MiB above the loaded pipeline, for four clips")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "sheet", "memory", "one"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--methods", default=";".join(METHODS))
    parser.add_argument("--count", type=int, default=REFERENCES)
    parser.add_argument("--development", action="store_true")
    arguments = parser.parse_args()
    named = arguments.methods.split(";")
    if arguments.what == "run":
        part, whole = (int(v) for v in arguments.shard.split("/"))
        run(arguments.work, named, (part, whole), arguments.development, arguments.count)
    elif arguments.what == "table":
        table(arguments.work, arguments.development)
    elif arguments.what == "sheet":
        sheet(arguments.work, named, arguments.development)
    elif arguments.what == "memory":
        memory()
    else:
        one(arguments.methods)
