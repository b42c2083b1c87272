"""What is worth an evaluation? Searches of noise against best of N on the shapes world, at equal budgets.

    python scripts/bench_search.py run --work DIR [--development] [--methods a,b] [--budgets 2,4] [--shard 0/2]   resumes
    python scripts/bench_search.py pack --work DIR                                         keeps DIR's records, too
    python scripts/bench_search.py table [--work DIR] [--development] [--plot FILE]        accuracy by budget, and the plot

The reward that searches is the miniature CLIP; the judge is the checker, and `clip2`, which never steers, the held-out reward.
A budget is a multiple of the plain run's evaluations (30 steps with guidance: 60); what else a method costs is told beside. A
case is a caption and a seed; all methods draw their noises from the same keys, so that best of N is nested: one pool tells all
N. Seconds are told in plain runs: divided by what 60 rows took the bare denoiser just before, 48 at a time. Intervals are 95 %,
by bootstrap over captions. Methods and settings were chosen on development captions alone. The records behind docs/results.md
are kept in docs/measured/search.jsonl.gz; what stands there is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_quality import Case, chunks, held_out, interval, judge, second_reward
from kept import keep, kept

from diffsteer import SteeredPipeline, __version__, load_pipeline
from diffsteer.budget import Budget
from diffsteer.draft import Draft
from diffsteer.rewards import ClipScore
from diffsteer.samplers import (
    Beam,
    BestOfN,
    DepthFirst,
    Evolutionary,
    FeynmanKac,
    RandomSearch,
    ReNO,
    Rollover,
    SearchOverPaths,
    Stages,
    SuccessiveHalving,
    ZeroOrder,
)
from diffsteer.shapes.models import MODELS, digest
from diffsteer.types import Context

CAPTIONS_A_TASK, SEEDS, BATCH, MOST, PLAIN = 20, 2, 12, 32, 60
BUDGETS = (2, 4, 8, 16)
EMBEDDED = Context(1, 1, True)
Made = tuple[Any, Any]  # a sampler, and its drafts
Interval = tuple[float, float, float]  # mean, low, high
Point = tuple[float, float, Interval, Interval, Interval]  # evaluations, time, and by them right, reward, held-out reward


def halving(share: float, **options: Any) -> Callable[[int], Made]:
    """As many candidates as make one pass cost the budget."""
    return lambda u: (SuccessiveHalving(max(1, int(u / share)), **options), None)


def drafted(share: float, part: float = 0.5) -> Callable[[int], Made]:
    """Random search on shorter chains; a part of the budget goes to finals."""
    return lambda u: (RandomSearch(64), Draft(share=share, finalists=max(1, int(part * u))))


def turbo(part: float = 0.5) -> Callable[[int], Made]:
    return lambda u: (RandomSearch(64), Draft(model=fast(), finalists=max(1, int(part * u))))


def fast() -> Any:
    global _fast
    if _fast is None:
        _fast = load_pipeline("shapes-turbo")
        _fast.set_progress_bar_config(disable=True)
    return _fast


_fast: Any = None
PATHS = {2: (1, 1), 4: (1, 1), 8: (1, 3), 16: (2, 3), 32: (2, 7)}
EVOLUTION = {2: (1, 1, 1, 1), 4: (2, 1, 1, 1), 8: (4, 2, 2, 2), 16: (8, 4, 4, 4), 32: (16, 8, 8, 8)}
BEAMS = {2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8)}
METHODS: dict[str, Callable[[int], Made]] = {
    "draft_third": drafted(1 / 3),
    "draft_third_few": drafted(1 / 3, 0.25),
    "draft_fifth": drafted(1 / 5),
    "turbo": turbo(),
    "turbo_few": turbo(0.25),
    "halving": halving(0.525),
    "halving_4": halving(0.4, rate=4, events=(0.3, 0.6)),
    "halving_late": halving(0.65, events=(0.4, 0.6)),
    "halving_noisy": halving(0.525, eta=1.0),
    "zero_order": lambda u: (ZeroOrder(), None),
    "paths": lambda u: (SearchOverPaths(*PATHS[u]), None),
    "evolutionary": lambda u: (Evolutionary(populations=EVOLUTION[u], elites=int(u >= 8)), None),
    "beam": lambda u: (Beam(*BEAMS[u]), None),
    "depth_first": lambda u: (DepthFirst(), None),
    "rollover": lambda u: (Rollover(4 * u, max(1, u - 2), batch=2), None),
    "fk": lambda u: (FeynmanKac(u), None),
    "fk_many": lambda u: (FeynmanKac(u, events=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8)), None),
    "fk_short": lambda u: (FeynmanKac(2 * u), None),  # on half of the steps
    "fk_third": lambda u: (FeynmanKac(3 * u), None),
    "beam_late": lambda u: (Beam(*BEAMS[u], events=(0.6, 0.8)), None),
    "halving_fk": lambda u: (Stages([SuccessiveHalving(u), FeynmanKac(max(2, u // 2))]), None),
    "reno_turbo": lambda u: (ReNO(iterations=30, rate=2.0), Draft(model=fast(), finalists=max(1, u // 4))),
}

STEPS_OF = {"fk_short": 15, "fk_third": 10, "pool_short": 15, "pool_third": 10}
LABELS = {
    "fk_short": "FK(2N), 15 steps",
    "fk_third": "FK(3N), 10 steps",
    "fk": "FK(N)",
    "turbo": "drafts on shapes-turbo",
    "draft_third": "drafts of a third of the steps",
    "halving_noisy": "successive halving, with noise",
    "zero_order": "zero-order",
    "paths": "search over paths",
    "depth_first": "depth-first",
}
POOLS: dict[str, tuple[str, Any]] = {
    "pool": ("best of N", BestOfN(MOST)),
    "pool_ode": ("best of N, no noise", BestOfN(MOST, eta=0.0)),
    "pool_short": ("best of 2N, 15 steps", BestOfN(2 * MOST)),
    "pool_third": ("best of 3N, 10 steps", BestOfN(3 * MOST)),
}


def cases_of(development: bool) -> list[Case]:
    captions = held_out(CAPTIONS_A_TASK, 6 if development else 7)
    seeds = 1 if development else SEEDS
    return [c | {"id": f"{c['id']}-{s}", "seed": s} for c in captions for s in range(seeds)]


def settings_of(method: str, units: int) -> str:
    sampler, draft = (POOLS[method][1], None) if method in POOLS else METHODS[method](units)
    models = [digest(m) for m in ("shapes", "shapes-turbo") if m in MODELS and (m == "shapes" or "turbo" in method)]
    told = f"{sampler!r} {draft and (draft.share, draft.finalists)} {STEPS_OF.get(method)}"
    return hashlib.sha256(f"{told} {models}".encode()).hexdigest()[:16]


def read(work: Path | None, development: bool) -> list[Case]:
    """What is kept and what stands in a folder, of what was made with the methods as they are."""
    records = kept("search")
    for f in sorted(work.glob("search.*.jsonl")) if work else []:
        records += map(json.loads, f.read_text().rpartition("\n")[0].splitlines())
    found = {(r["method"], r["units"], r["id"]): r for r in records}
    ours = [r for r in found.values() if r["method"] in POOLS or r["method"] in METHODS]
    ours = [r for r in ours if r["settings"] == settings_of(r["method"], r["units"])]
    return [r for r in ours if r["id"].startswith("6-" if development else "7-")]


def pack(work: Path) -> None:
    """Keep a folder's records."""
    keep("search", sorted(read(work, False) + read(work, True), key=lambda r: (r["method"], r["units"], r["id"])))


def plain_seconds(pipe: Any) -> float:
    """What the rows of a plain run take the denoiser alone, 48 at a time: the median of three calls."""
    times, x, words = [], torch.randn(48, 4, 16, 16), torch.zeros(48, 1, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        for _ in range(3):
            began = time.perf_counter()
            pipe.unet(x, torch.full((48,), 500.0), encoder_hidden_states=words)
            times.append(time.perf_counter() - began)
    return PLAIN / 48 * sorted(times)[1]


def run(work: Path, methods: list[str], budgets: list[int], shard: tuple[int, int], development: bool) -> None:
    """Append a line a case, method and budget; what is there is not done again."""
    work.mkdir(parents=True, exist_ok=True)
    done = {(r["method"], r["units"], r["id"]) for r in read(work, development)}
    pipe = load_pipeline("shapes")
    pipe.set_progress_bar_config(disable=True)
    reward, second = ClipScore(), second_reward()
    jobs = [(m, u, c) for m in methods for u in ([MOST] if m in POOLS else budgets)
            for c in chunks(cases_of(development), BATCH)]  # fmt: skip
    with (work / f"search.{os.getpid()}.jsonl").open("a") as sink:
        for method, units, cases in jobs[shard[0] :: shard[1]]:
            cases = [c for c in cases if (method, units, c["id"]) not in done]
            if not cases:
                continue
            texts, ids = [c["caption"] for c in cases], [c["id"] for c in cases]
            sampler, draft = (POOLS[method][1], None) if method in POOLS else METHODS[method](units)
            budget = None if isinstance(sampler, FeynmanKac | BestOfN) else Budget(evals=units * PLAIN)
            steps = {"num_inference_steps": STEPS_OF[method]} if method in STEPS_OF else {}
            unit = plain_seconds(pipe)
            searching = {} if budget is None else {"budget": budget, "draft": draft if draft is not None else False}
            out = SteeredPipeline(pipe, sampler, reward, output="all", chunk=64, **searching)(texts, seed=0, ids=ids, **steps)
            if out.interrupted:  # no result of the method
                raise KeyboardInterrupt
            for i, case in enumerate(cases):
                samples = out.samples[i].float()
                shown = samples if method in POOLS else samples[out.chosen[i]][None]
                held = second.score(shown, [case["caption"]] * len(shown), EMBEDDED).tolist() if second else None
                found = out.trace.searches[i] if out.trace.searches else None
                spent = found.spent if found else None
                record = case | {
                    "method": method,
                    "units": units,
                    "settings": settings_of(method, units),
                    "version": __version__,
                    "rewards": out.rewards[i].tolist() if method in POOLS else [out.rewards[i, out.chosen[i]].item()],
                    "second": held,
                    "right": [judge(s, case["caption"]) for s in shown],
                    "evaluations": spent.evals if spent else out.ledger.evaluations // len(cases),
                    "decodes": spent.decodes if spent else out.ledger.decodes // len(cases),
                    "reward_calls": spent.reward_calls if spent else out.ledger.reward_calls // len(cases),
                    "backwards": out.ledger.backwards // len(cases),
                    "seconds": out.ledger.seconds["total"] / len(cases),
                    "plain_seconds": unit,
                    "gap": found.gap.mean if found and found.gap else None,
                    "kept_first": found.gap.kept_first if found and found.gap else None,
                }
                sink.write(json.dumps(record) + "\n")
            sink.flush()
            print(f"{method} {units} {ids[-1]} {np.mean(out.rewards.max(1).values.tolist()):.2f}", flush=True)


# ------------------------------------------------------------------------------------------------------- the tables


def by_method(records: list[Case]) -> dict[tuple[str, int], dict[str, Case]]:
    """Records by (method, units) and case; of the pools every nested best of N."""
    table: dict[tuple[str, int], dict[str, Case]] = defaultdict(dict)
    for r in records:
        if r["method"] not in POOLS:
            table[r["method"], r["units"]][r["id"]] = r
            continue
        name, size = POOLS[r["method"]][0], len(r["rewards"])
        for n in (1, 2, 4, 8, 16, 32):
            k = int(np.argmax(r["rewards"][: size * n // MOST]))
            counts = {c: round(r[c] * n / MOST) for c in ("evaluations", "decodes", "reward_calls")}
            mine = {c: [r[c][k]] for c in ("rewards", "second", "right")}
            table[name, n][r["id"]] = r | mine | counts | {"seconds": r["seconds"] * n / MOST, "units": n}
    return table


def show(work: Path | None, development: bool, plot: Path | None) -> None:
    table = by_method(read(work, development))
    heads = ["method", "budget", "right (95 %)", "against best of N at the same budget", "reward (95 %)", "held-out (95 %)"]
    print("| " + " | ".join([*heads, "evaluations", "decodes", "reward calls", "time, in plain runs"]) + " |")
    print("|" + "---|" * 10)
    points: dict[str, list[Point]] = defaultdict(list)
    for (method, units), by_case in sorted(table.items(), key=lambda kv: (kv[0][0] != "best of N", kv[0])):
        ids = sorted(by_case)
        if len(ids) < len(cases_of(development)):  # under way
            continue
        clusters = [by_case[i]["caption"] for i in ids]
        right = np.array([float(by_case[i]["right"][0]) for i in ids])
        mean, low, high = interval(right, clusters)
        base = table.get(("best of N", units), {})
        same = [i for i in ids if i in base]
        gain = "" if method == "best of N" or not same else signed(
            interval(np.array([float(by_case[i]["right"][0]) - float(base[i]["right"][0]) for i in same]),
                     [by_case[i]["caption"] for i in same])
        )  # fmt: skip
        averages = [np.mean([by_case[i][k] for i in ids]) for k in ("evaluations", "decodes", "reward_calls")]
        averages.append(np.mean([by_case[i]["seconds"] / by_case[i]["plain_seconds"] for i in ids]))
        scores = [interval(np.array([by_case[i][k][0] for i in ids]), clusters) for k in ("rewards", "second")]
        reward, held = (f"{m:.1f} ({a:.1f}, {b:.1f})" for m, a, b in scores)
        label = LABELS.get(method, method)
        points[label].append((averages[0], averages[3], (mean, low, high), *scores))
        print(f"| {label} | {units} | {mean:.3f} ({low:.3f}, {high:.3f}) | {gain} | {reward} | {held} | "
              f"{averages[0]:.0f} | {averages[1]:.0f} | {averages[2]:.0f} | {averages[3]:.2f} |")  # fmt: skip
    if plot is not None:
        draw(points, plot)


def signed(values: tuple[float, float, float]) -> str:
    return f"{values[0]:+.3f} ({values[1]:+.3f}, {values[2]:+.3f})"


def draw(points: dict[str, list[Point]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 2, figsize=(12.5, 11), sharex="col", sharey="row")
    for line, what in enumerate(("right, by the checker", "the reward that searches", "held-out reward")):
        for column, against in enumerate(("evaluations", "time, in plain runs")):
            axis = axes[line, column]
            for n, (name, values) in enumerate(points.items()):
                rows = sorted(values)
                bold = name == "best of N"
                at, means = [r[column] for r in rows], [r[2 + line][0] for r in rows]
                axis.plot(at, means, "o--" if n > 9 else "o-", ms=4, lw=2.5 if bold else 1.2,
                          color="black" if bold else f"C{n % 10}", label=name)  # fmt: skip
                if bold:
                    axis.fill_between(at, *zip(*(r[2 + line][1:] for r in rows), strict=True), color="black", alpha=0.12, lw=0)
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
            axes[2, column].set_xlabel(against)
        axes[line, 0].set_ylabel(what)
    axes[0, 1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "pack", "table"])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--methods", default=",".join([*POOLS, *METHODS]))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args()
    if a.command == "table":
        show(a.work, a.development, a.plot)
    elif a.command == "pack":
        pack(a.work)
    else:
        part, of = map(int, a.shard.split("/"))
        run(a.work, a.methods.split(","), [int(b) for b in a.budgets.split(",")], (part, of), a.development)
