"""Does a gradient help, and what does it cost? Guidance on the embedded `shapes` model, and search with as much time.

    python scripts/bench_guidance.py tune --work DIR                       strengths, on development captions
    python scripts/bench_guidance.py run --work DIR [--shard 0/2] [--methods mpgd,dps]     sample and judge; resumes
    python scripts/bench_guidance.py table --work DIR                      both tables, with intervals

The reward that steers is the miniature CLIP. Two judges look on that no method sees: the checker, and a second miniature CLIP
with other weights. 120 held-out captions with two noises each, the same keyed noises for all methods. A strength is the one
with the most right pictures on 36 development captions (of equals the one that the second CLIP likes better); all that were
tried are in the first table. Methods take turns batch by batch, and a method's time is quoted by the plain chain's in the same
batch. Intervals are 95 %, by bootstrap over captions (for times over batches).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_quality import chunks, held_out, interval, judge, second_reward

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.rewards import ClipScore
from diffsteer.samplers import DPS, LGD, MPGD, TFG, BestOfN, FeynmanKac, FreeDoM, UniversalGuidance
from diffsteer.types import Context

CASES_A_TASK, DEVELOPMENT_A_TASK, SEEDS, BATCH = 20, 6, (0, 1), 24
HELD_OUT, DEVELOPMENT = 9, 6  # streams of captions
SHARES = (0.05, 0.15, 0.4)
EVEN = {"normaliser": "uncertainty"}  # where the authors' strengths are for raw gradients of other losses

# name -> (strengths to try, from one of them to what a `SteeredPipeline` is made of)
METHODS: dict[str, tuple[tuple[float, ...], Callable[[float], dict[str, Any]]]] = {
    "plain": ((0.0,), lambda s: {"sampler": BestOfN(1)}),
    "best of 4": ((0.0,), lambda s: {"sampler": BestOfN(4)}),
    "best of 8": ((0.0,), lambda s: {"sampler": BestOfN(8)}),
    "FK(4)": ((0.0,), lambda s: {"sampler": FeynmanKac(4)}),
    "mpgd": ((0.1, 0.2, 0.4), lambda s: {"sampler": MPGD(strength=s)}),
    "mpgd adam": ((0.02, 0.05, 0.15), lambda s: {"sampler": MPGD(strength=s, normaliser="adam")}),
    "dps": (SHARES, lambda s: {"sampler": DPS(strength=s, **EVEN)}),
    "lgd": (SHARES, lambda s: {"sampler": LGD(strength=s, draws=4)}),
    "freedom": ((0.07, 0.2, 0.5), lambda s: {"sampler": FreeDoM(strength=s)}),
    "universal": ((0.03, 0.1, 0.2), lambda s: {"sampler": UniversalGuidance(forward=s, backward=s / 2)}),
    "tfg": (SHARES, lambda s: {"sampler": TFG(network=s, clean=s, draws=1, smoothing=0.0, **EVEN)}),
    "best of 4 + mpgd": ((0.1, 0.2, 0.4), lambda s: {"sampler": BestOfN(4), "guide": MPGD(strength=s)}),
    "FK(4) + mpgd": ((0.01, 0.03, 0.1), lambda s: {"sampler": FeynmanKac(4), "guide": MPGD(strength=s)}),
}
Record = dict[str, Any]


def sample(work: Path, name: str, jobs: list[tuple[str, float, int, list[Record]]]) -> None:
    """Append a line a picture to a file of this process; what stands in any of them is not done again."""
    work.mkdir(parents=True, exist_ok=True)
    done = {(r["method"], r["strength"], r["seed"], r["id"]) for r in read(work, name)}
    pipe, reward, second = load_pipeline("shapes"), ClipScore(), second_reward()
    with (work / f"{name}.{os.getpid()}.jsonl").open("a") as sink:
        for method, strength, seed, cases in jobs:
            if all((method, strength, seed, c["id"]) in done for c in cases):
                continue
            texts = [c["caption"] for c in cases]
            steered = SteeredPipeline(pipe, reward=reward, chunk=24, output="all", **METHODS[method][1](strength))
            began = time.perf_counter()
            out = steered(texts, seed=seed, ids=[c["id"] for c in cases])
            seconds = (time.perf_counter() - began) / len(cases)
            for i, case in enumerate(cases):
                picture = out.samples[i, out.chosen[i]]
                record = case | {
                    "method": method,
                    "strength": strength,
                    "seed": seed,
                    "batch": f"{seed} {cases[0]['id']}",
                    "right": float(judge(picture.float(), case["caption"])),
                    "steered": float(out.rewards[i, out.chosen[i]]),
                    "second": float(second.score(picture[None].float(), [case["caption"]], Context(1, 1, True))[0]),
                    "seconds": seconds,
                    "evaluations": out.ledger.evaluations / len(cases),
                    "backwards": out.ledger.backwards / len(cases),
                    "decodes": out.ledger.decodes / len(cases),
                    "reward_calls": out.ledger.reward_calls / len(cases),
                }
                sink.write(json.dumps(record) + "\n")
            sink.flush()
            print(name, method, strength, seed, cases[0]["id"], f"{seconds:.2f} s a picture", flush=True)


def read(work: Path, name: str) -> list[Record]:
    found = (json.loads(line) for f in sorted(work.glob(f"{name}.*.jsonl")) for line in f.read_text().splitlines())
    return list({(r["method"], r["strength"], r["seed"], r["id"]): r for r in found}.values())


def tune(work: Path, methods: list[str], shard: tuple[int, int]) -> None:
    batches = chunks(held_out(DEVELOPMENT_A_TASK, DEVELOPMENT), BATCH)
    jobs = [(m, s, 0, batch) for m in methods for s in METHODS[m][0] for batch in batches if len(METHODS[m][0]) > 1]
    sample(work, "tune", jobs[shard[0] :: shard[1]])


def chosen(work: Path) -> dict[str, float]:
    """The best strength of each method on development captions."""
    rows = read(work, "tune")
    best = {}
    for method, (strengths, _) in METHODS.items():
        scores = {
            s: tuple(np.mean([[r["right"], r["second"]] for r in mine], 0))
            for s in strengths
            if (mine := [r for r in rows if (r["method"], r["strength"]) == (method, s)])
        }
        if scores or len(strengths) == 1:
            best[method] = max(scores, key=lambda s: scores[s]) if scores else strengths[0]
    return best


def run(work: Path, methods: list[str], shard: tuple[int, int]) -> None:
    best = chosen(work)
    batches = [(seed, b) for b in chunks(held_out(CASES_A_TASK, HELD_OUT), BATCH) for seed in SEEDS]
    sample(work, "run", [(m, best[m], seed, b) for seed, b in batches[shard[0] :: shard[1]] for m in methods if m in best])


def tables(work: Path) -> None:
    rows = read(work, "tune")
    print("| method | strength | right | steering CLIP | second CLIP |\n|---|---|---|---|---|")
    for method, (strengths, _) in METHODS.items():
        for s in strengths:
            mine = [r for r in rows if (r["method"], r["strength"]) == (method, s)]
            if mine:
                right, steered, second = np.mean([[r["right"], r["steered"], r["second"]] for r in mine], 0)
                print(f"| {method} | {s:g} | {right:.2f} | {steered:.1f} | {second:.1f} |")
    best = chosen(work)
    by: dict[str, dict[tuple[str, int], Record]] = {}
    for r in read(work, "run"):
        if r["strength"] == best.get(r["method"]):
            by.setdefault(r["method"], {})[r["id"], r["seed"]] = r
    plain = by["plain"]
    heads = ("method", "strength", "pictures", "right", "against plain", "steering CLIP", "second CLIP, against plain")
    heads += ("time", "evaluations, backwards, decodes, reward calls")
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for method in [m for m in METHODS if m in by]:
        keys = sorted(set(by[method]) & set(plain))
        own, other = [by[method][k] for k in keys], [plain[k] for k in keys]
        texts = [r["caption"] for r in own]

        def gap(field: str, own: list[Record] = own, other: list[Record] = other, texts: list[str] = texts) -> str:
            values = np.array([a[field] - b[field] for a, b in zip(own, other, strict=True)])
            mean, low, high = interval(values, texts)
            return (
                f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" if field == "right" else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
            )

        ratios = {a["batch"]: a["seconds"] / b["seconds"] for a, b in zip(own, other, strict=True)}
        ratio, low, high = interval(np.array(list(ratios.values())), list(ratios))
        cost = ", ".join(f"{own[0][k]:.0f}" for k in ("evaluations", "backwards", "decodes", "reward_calls"))
        cells = [
            method,
            f"{best[method]:g}" if best[method] else "",
            str(len(keys)),
            f"{np.mean([r['right'] for r in own]):.3f}",
        ]
        cells += [gap("right"), f"{np.mean([r['steered'] for r in own]):.1f}", gap("second")]
        cells += [f"x {ratio:.1f} ({low:.1f} to {high:.1f})", cost]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "run", "table"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shard", default="0/1", help="i/n: take every n-th batch")
    parser.add_argument("--methods", default=",".join(METHODS))
    arguments = parser.parse_args()
    part, whole = (int(v) for v in arguments.shard.split("/"))
    if arguments.what == "tune":
        tune(arguments.work, arguments.methods.split(","), (part, whole))
    elif arguments.what == "run":
        run(arguments.work, arguments.methods.split(","), (part, whole))
    else:
        tables(arguments.work)
