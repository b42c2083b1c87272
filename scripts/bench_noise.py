"""Optimise on the fast model, render on the full one: does it reach the score of optimising the full model, in what time?

    python scripts/bench_noise.py run --work DIR [--cases 30] [--iterations 50]      resumes
    python scripts/bench_noise.py pack --work DIR                                    keeps its records
    python scripts/bench_noise.py table [--work DIR]                                 without DIR of those that are kept

ReNO maximises the miniature CLIP's score of each case, once through all steps of the full model, once through the few steps of
`shapes-turbo`, whose best noises are rendered on the full model and ranked there. Both start from the same noise. What is
compared is the score of the full model's picture and the seconds that it took, renders in them; in further rows the fast model
optimises four noises, only takes the best of 24, or optimises the best two of those. `clip2` and the checker look on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_quality import held_out, interval, judge, second_reward
from kept import keep, kept

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.draft import Draft
from diffsteer.found import Progress
from diffsteer.rewards import ClipScore
from diffsteer.samplers import RandomSearch, ReNO, Stages
from diffsteer.types import Context

EMBEDDED = Context(1, 1, True)


def run(work: Path, cases: int, iterations: int, rate: float, development: bool) -> None:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "noise.jsonl"
    done = {(r["method"], r["id"]) for r in map(json.loads, path.read_text().splitlines())} if path.exists() else set()
    full, fast = load_pipeline("shapes"), load_pipeline("shapes-turbo")
    for pipe in (full, fast):
        pipe.set_progress_bar_config(disable=True)
    reward, second = ClipScore(), second_reward()
    runs: dict[str, tuple[Any, Any]] = {"plain": (RandomSearch(1), False)}
    shared: dict[str, Any] = {"rate": rate, "patience": 0, "checkpoint": False}

    def few(finalists: int) -> Draft:
        return Draft(model=fast, finalists=finalists)

    runs["fast, 12"] = (ReNO(iterations=12, **shared), few(4))
    runs["fast, 12, four noises"] = (ReNO(iterations=12, noises=4, **shared), few(6))
    runs["fast, best of 24 noises"] = (RandomSearch(24), few(8))
    runs["fast, best 2 of 24 noises, 10"] = (Stages([RandomSearch(24), ReNO(iterations=10, noises=2, **shared)]), few(5))
    runs[f"full, {iterations}"] = (ReNO(iterations=iterations, **shared), False)
    with path.open("a") as sink:
        for case in held_out(-(-cases // 6), 6 if development else 7)[:cases]:
            for method, (sampler, drafts) in runs.items():
                if (method, case["id"]) in done:
                    continue
                marks: list[tuple[float, float]] = []
                began = time.perf_counter()

                def watch(p: Progress, marks: list[tuple[float, float]] = marks, began: float = began) -> None:
                    marks.append((time.perf_counter() - began, p.best[0]))

                steered = SteeredPipeline(full, sampler, reward, draft=drafts)
                out = steered([case["caption"]], seed=0, ids=[case["id"]], watch=watch)
                if out.interrupted:  # no result of the method
                    raise KeyboardInterrupt
                best = out.samples[:, 0].float()
                record = case | {
                    "method": method,
                    "seconds": out.ledger.seconds["total"],
                    "reward": out.rewards[0, 0].item(),
                    "second": second.score(best, [case["caption"]], EMBEDDED).item() if second else None,
                    "right": judge(best[0], case["caption"]),
                    "evaluations": out.ledger.evaluations,
                    "backwards": out.ledger.backwards,
                    "marks": marks,
                    "off": out.trace.searches[0].diagnoses[0].worst,
                    "gap": out.trace.searches[0].gap.mean if out.trace.searches[0].gap else None,
                }
                sink.write(json.dumps(record) + "\n")
                sink.flush()
                print(method, case["id"], f"{record['reward']:.2f} {record['seconds']:.2f} s", flush=True)


def in_folder(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "noise.jsonl").read_text().splitlines()]


def table(work: Path | None) -> None:
    records = kept("noise") if work is None else in_folder(work)
    by: dict[str, dict[str, Any]] = {}
    for r in records:
        by.setdefault(r["method"], {})[r["id"]] = r
    whole = next(m for m in by if m.startswith("full"))
    ids = [i for i in by[whole] if all(i in rows for rows in by.values())]
    texts = [by[whole][i]["caption"] for i in ids]
    print(f"{len(ids)} cases; seconds are medians")
    heads = [
        "",
        "score (95 %)",
        "held-out",
        "right",
        "seconds",
        "of the full one's",
        "ahead of its score",
        "time to the same score",
    ]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for method, rows in by.items():
        score = np.array([rows[i]["reward"] for i in ids])
        ratio = np.array([rows[i]["seconds"] / by[whole][i]["seconds"] for i in ids])
        ahead = score - np.array([by[whole][i]["reward"] for i in ids])
        cells = [
            "{:.2f} ({:.2f}, {:.2f})".format(*interval(score, texts)),
            f"{np.mean([rows[i]['second'] for i in ids]):.2f}",
            f"{np.mean([rows[i]['right'] for i in ids]):.2f}",
            f"{np.median([rows[i]['seconds'] for i in ids]):.2f}",
            f"{np.median(ratio):.3f}",
            "{:+.2f} ({:+.2f}, {:+.2f})".format(*interval(ahead, texts)),
            same_score(rows, by[whole], ids) if method.startswith("fast") else "",
        ]
        print(f"| {method} | {' | '.join(cells)} |")


def same_score(rows: dict[str, Any], full: dict[str, Any], ids: list[str]) -> str:
    """The median ratio of a fast run's time to the time after which the full optimisation's best was as good; where it never
    was, that is its whole time (so that the ratio is too large)."""
    ratios = []
    for i in ids:
        there = [t for t, best in full[i]["marks"] if best >= rows[i]["reward"]]
        ratios.append(rows[i]["seconds"] / (there[0] if there else full[i]["seconds"]))
    never = sum(full[i]["marks"][-1][1] < rows[i]["reward"] for i in ids)
    return f"{np.median(ratios):.2f} (never in {never})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "pack", "table"])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--rate", type=float, default=2.0)
    parser.add_argument("--development", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.command != "table" and a.work is None:
        parser.error(f"{a.command} wants --work DIR")
    if a.command == "run":
        run(a.work, a.cases, a.iterations, a.rate, a.development)
    elif a.command == "pack":
        keep("noise", in_folder(a.work))
    else:
        table(a.work)
