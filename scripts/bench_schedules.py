"""Where few deterministic steps stand: own grid, even spacings, Karras, log-SNR, AYS, loss mass, GITS; right pictures, and
distance to the solution of 200 steps from the same noise.

    python scripts/bench_schedules.py run --work DIR [--model shapes] [--captions 120]   sample and judge; resumes
    python scripts/bench_schedules.py table --work DIR                                   the tables, with intervals, and a JSON
    python scripts/bench_schedules.py run --work OTHER --stream 10 --only "AYS (sd15)"   some schedules again, on other captions

Profiles and costs are measured on development captions, the table is of held-out ones. Batches of captions go through all
schedules in turn. Intervals are 95 %, by bootstrap over captions, of the paired difference from the model's own grid.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_quality import chunks, held_out, interval, judge

from diffsteer import SteeredPipeline, __version__, load_pipeline
from diffsteer.profiles import (
    gits_schedule,
    local_deviation,
    loss_mass,
    own_grid,
    reward_change,
    reward_error,
    trajectory,
)
from diffsteer.rewards import ClipScore
from diffsteer.samplers import BestOfN
from diffsteer.schedules import AYS, FlowTime, Given, Karras, LogSNR, Schedule
from diffsteer.shapes.models import MODELS, digest

STEPS, REFERENCE, BATCH, DEVELOPMENT = (6, 10), 200, 24, 48
OWN = "own grid"


def grids(pipe: Any, model: str, steps: int) -> dict[str, Schedule]:
    """The schedules of the table."""
    texts = [c["caption"] for c in held_out(-(-DEVELOPMENT // 6), 6)][:DEVELOPMENT]
    teacher = trajectory(pipe, texts, steps=60)
    deviation = local_deviation(teacher)
    found: dict[str, Schedule] = {OWN: own_grid(pipe, steps)}
    if model == "shapes":
        found["leading"] = Given(tuple(float(1 + k * (1000 // steps)) for k in reversed(range(steps))), "timesteps")
        found["linspace"] = Given(tuple(np.linspace(999, 0, steps).round().tolist()), "timesteps")
    else:
        found["even t, no shift"] = Given(tuple((0.999 * (1 - k / steps)) for k in range(steps)), "sigmas")
        found["even t to the end"] = FlowTime()
    found |= {"Karras": Karras(), "log-SNR": LogSNR(), "AYS (sd15)": AYS("sd15"), "AYS (sdxl)": AYS("sdxl")}
    first = found[OWN].ratios(steps, 0, 0)[:1]  # where the model's noise is all there is
    found["AYS (sd15), from the top"] = Given((*first.tolist(), *AYS("sd15").ratios(steps, 1e3, 1e-3)[1:].tolist()))
    found["loss mass"] = loss_mass(pipe, texts)
    found["GITS, deviation"] = gits_schedule(teacher, deviation, steps)
    found["GITS, deviation, 1.15"] = gits_schedule(teacher, deviation, steps, 1.15)
    found["GITS, reward change"] = gits_schedule(teacher, reward_change(teacher, ClipScore()), steps)
    found["GITS, reward error"] = gits_schedule(teacher, reward_error(teacher, ClipScore()), steps)
    return found


def settings_of(model: str) -> str:
    return hashlib.sha256(f"{digest(model)} {__version__} {Path(__file__).read_text()}".encode()).hexdigest()[:16]


def run(work: Path, model: str, captions: int, stream: int = 7, only: Sequence[str] = ()) -> None:
    """One line a caption, schedule and number of steps; whole batches that stand there are not done again."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"schedules.{model}.jsonl"
    now, pipe = settings_of(model), load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    done = {(r["name"], r["steps"], r["id"]) for r in read(path) if r["settings"] == now}
    walks = {
        (name, steps): s for steps in STEPS for name, s in grids(pipe, model, steps).items() if not only or name in (OWN, *only)
    }
    with path.open("a") as sink:
        for cases in chunks(held_out(-(-captions // 6), stream)[:captions], BATCH):
            texts, ids = [c["caption"] for c in cases], [c["id"] for c in cases]
            if all((*walk, i) in done for walk in [*walks, (f"{REFERENCE} steps", REFERENCE)] for i in ids):
                continue

            def sampled(
                schedule: Schedule, steps: int, texts: list[str] = texts, ids: list[str] = ids
            ) -> tuple[Any, list[bool]]:
                steered = SteeredPipeline(pipe, BestOfN(1, eta=0.0), schedule=schedule, chunk=48)
                out = steered(texts, num_inference_steps=steps, seed=0, ids=ids)
                return out.latents[:, 0].double(), [judge(s[0].float(), t) for s, t in zip(out.samples, texts, strict=True)]

            solution, right = sampled(own_grid(pipe, REFERENCE), REFERENCE)
            results = {(f"{REFERENCE} steps", REFERENCE): (solution, right)}
            results |= {walk: sampled(schedule, walk[1]) for walk, schedule in walks.items()}
            for (name, steps), (latents, verdicts) in results.items():
                far = (latents - solution).square().flatten(1).mean(1).sqrt().tolist()
                for case, verdict, distance in zip(cases, verdicts, far, strict=True):
                    record = case | {"model": model, "name": name, "steps": steps, "right": verdict, "distance": distance}
                    sink.write(json.dumps(record | {"settings": now}) + "\n")
            sink.flush()
            print(model, ids[-1], flush=True)
    shown = {f"{name}, {steps}": [round(v, 4) for v in levels_of(pipe, s, steps)] for (name, steps), s in walks.items()}
    (work / f"grids.{model}.json").write_text(json.dumps(shown, indent=1) + "\n")


def levels_of(pipe: Any, schedule: Schedule, steps: int) -> list[float]:
    """The ratios that are walked."""
    from diffsteer.segments import grid_of

    return [float(at.sigma) / max(float(at.alpha), 1e-12) for at in grid_of(pipe, steps, {}, 0.0, schedule)[1][:-1]]


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]


def table(work: Path) -> None:
    """Print a table a model, and keep it as a JSON beside the records."""
    kept: dict[str, Any] = {}
    for model in MODELS:
        records = {(r["name"], r["steps"], r["id"]): r for r in read(work / f"schedules.{model}.jsonl")}
        walks = list(dict.fromkeys((name, steps) for name, steps, _ in records))
        if not walks:
            continue
        print(f"\n`{model}`:\n\n| steps | schedule | right | minus own grid | distance | minus own grid |\n" + "|---" * 6 + "|")
        for name, steps in sorted(walks, key=lambda w: w[1]):
            ids = [i for n, s, i in records if (n, s) == (name, steps)]
            mine = [records[name, steps, i] for i in ids]
            row: dict[str, Any] = {"n": len(ids)}
            for what in ("right", "distance"):
                values = np.array([float(r[what]) for r in mine])
                row[what] = float(values.mean())
                if name != OWN and steps != REFERENCE:
                    own = np.array([float(records[OWN, steps, i][what]) for i in ids])
                    row[f"{what} minus own"] = interval(values - own, [r["caption"] for r in mine])
            kept.setdefault(model, {})[f"{name}, {steps}"] = row
            cells = []
            for what in ("right", "distance"):
                cells.append(f"{row[what]:.3f}")
                said = row.get(f"{what} minus own")
                cells.append("" if said is None else "{:+.3f} ({:+.3f}, {:+.3f})".format(*said))
            print(f"| {steps} | {name} | " + " | ".join(cells) + " |")
    (work / "schedules.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", default="all", choices=("run", "table", "all"))
    parser.add_argument("--model", default="shapes,shapes-flow", help="one or several")
    parser.add_argument("--work", type=Path, default=Path("outputs/bench_schedules"))
    parser.add_argument("--captions", type=int, default=120)
    parser.add_argument("--stream", type=int, default=7, help="of captions")
    parser.add_argument("--only", default="", help="schedules beside the own grid, with ; between them")
    arguments = parser.parse_args()
    if arguments.stage in ("run", "all"):
        for one in arguments.model.split(","):
            run(arguments.work, one, arguments.captions, arguments.stream, [n for n in arguments.only.split(";") if n])
    if arguments.stage in ("table", "all"):
        table(arguments.work)
