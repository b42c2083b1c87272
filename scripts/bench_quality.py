"""Does steering draw what was asked? Plain, best of N and Feynman-Kac on held-out cases of the shapes world, equal budgets.

    python scripts/bench_quality.py run --work DIR [--shard 0/2] [--methods fk8,bon8]   sample and judge; resumes
    python scripts/bench_quality.py table --work DIR                                   the tables, with intervals
    python scripts/bench_quality.py tune                                               guidance and steps, on development cases
    python scripts/bench_quality.py captions --count 6                                 the held-out captions, a line each

All take --model shapes | shapes-flow.

The reward that steers is the miniature CLIP; the judge is the checker, which no reward has seen. A case is a caption and a
seed, and all methods start from the same keyed noises: the draws of best of 4 (and the plain sample) are the first of the draws
of best of 8, which keyed randomness makes the samples, to rounding, that a run of its own would give. Intervals are 95 %, by
bootstrap over captions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffsteer import SteeredPipeline, __version__, load_pipeline
from diffsteer.rewards import ClipScore
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.shapes import TASKS, UNSEEN_PAIRS, caption, check, parse, sample_scene
from diffsteer.shapes.models import DEFAULTS, MODELS, WEIGHTS, digest

CASES_A_TASK, EMPTY_CASES, BATCH = 200, 288, 24
Case = dict[str, Any]


def held_out(count: int, stream: int = 7, tasks: tuple[str, ...] = TASKS) -> list[Case]:
    """Captions by task; `stream` keeps training (1), development (6), held-out (7) and empty-caption (8) cases apart."""
    cases = []
    for i in range(count * len(tasks)):
        task = tasks[i % len(tasks)]
        cases.append(
            {"id": f"{stream}-{i}", "task": task, "caption": caption(sample_scene(task, np.random.default_rng((stream, i))))}
        )
    return cases


def seen(text: str) -> bool:
    return not any((g.color, g.shape) in UNSEEN_PAIRS for g in parse(text).groups)


def judge(samples: torch.Tensor, text: str) -> bool:
    # through 8 bits, as a saved picture is
    return check((samples.permute(1, 2, 0) * 255).round().byte().numpy(), text).correct


EARLY = (0.2, 0.4, 0.6, 0.8)
THREE, FIVE = (0.4, 0.6, 0.8), (0.4, 0.5, 0.6, 0.7, 0.8)
MANY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
METHODS: dict[str, Any] = {
    "bon8": lambda: BestOfN(8),
    "native": lambda: BestOfN(1, eta=0.0),
    "fk4": lambda: FeynmanKac(4),
    "fk8": lambda: FeynmanKac(8),
    "fk4_early": lambda: FeynmanKac(4, events=EARLY),
    "fk8_early": lambda: FeynmanKac(8, events=EARLY),
    "fk4_many": lambda: FeynmanKac(4, events=MANY),
    "fk8_many": lambda: FeynmanKac(8, events=MANY),
    # what was tried on development cases
    "bon4": lambda: BestOfN(4),
    "fk4_three": lambda: FeynmanKac(4, events=THREE),
    "fk4_two": lambda: FeynmanKac(4, events=(0.5, 0.7)),
    "fk4_three_gentle": lambda: FeynmanKac(4, events=THREE, target_ess=0.8, threshold=0.85),
    "fk4_three_at_most_0.3": lambda: FeynmanKac(4, events=THREE, scale=0.3),
    "fk4_three_at_most_0.1": lambda: FeynmanKac(4, events=THREE, scale=0.1),
    "fk4_at_most_0.3": lambda: FeynmanKac(4, scale=0.3),
    "fk8_five_strong": lambda: FeynmanKac(8, events=FIVE, target_ess=0.3, threshold=0.5),
    "fk8_five_gentle": lambda: FeynmanKac(8, events=FIVE, target_ess=0.8, threshold=0.85),
    "fk8_five_at_most_0.3": lambda: FeynmanKac(8, events=FIVE, scale=0.3),
    "fk8_many_strong": lambda: FeynmanKac(8, events=MANY, target_ess=0.3, threshold=0.5),
}
MAIN = ("bon8", "native", "fk4", "fk8")
BLANK = [m for m in METHODS if m not in ("native", "bon4")]  # with the empty caption, too


def run(work: Path, model: str, methods: list[str], shard: tuple[int, int], count: int, empty: int, development: bool) -> None:
    """Append one line a case and method to a file of this process in DIR; what stands in any of them is not done again."""
    work.mkdir(parents=True, exist_ok=True)
    done = {(r["method"], r["id"]) for r in read(work) if r["settings"] == settings_of(model, r["method"])}
    pipe = load_pipeline(model)
    reward, second = ClipScore(), second_reward()
    jobs = [(m, c, False) for m in methods for c in chunks(held_out(count, 6 if development else 7), BATCH)]
    if empty:
        cases = held_out(empty, 18 if development else 8, ("single_object",))
        jobs += [(m, c, True) for m in methods if m in BLANK for c in chunks(cases, BATCH)]
    with (work / f"quality.{os.getpid()}.jsonl").open("a") as sink:
        for method, cases, blank in jobs[shard[0] :: shard[1]]:
            name = f"empty_{method}" if blank else method
            cases = [c for c in cases if (name, c["id"]) not in done]
            if not cases:
                continue
            texts = [c["caption"] for c in cases]
            options: dict[str, Any] = {"guidance_scale": 1.0} if blank else {}
            steered = SteeredPipeline(pipe, METHODS[method](), reward, output="all", chunk=48)
            out = steered(
                [""] * len(texts) if blank else texts, seed=0, ids=[c["id"] for c in cases], reward_prompts=texts, **options
            )
            for i, case in enumerate(cases):
                samples = out.samples[i].float()
                other = second.score(samples, [case["caption"]] * len(samples), EMBEDDED).tolist() if second else None
                record = case | {
                    "model": model,
                    "method": name,
                    "settings": settings_of(model, name),
                    "rewards": out.rewards[i].tolist(),
                    "second": other,
                    "log_weights": out.log_weights[i].tolist(),
                    "right": [judge(s, case["caption"]) for s in samples],
                    "exponent": out.trace.events[-1].exponent[i].item(),
                    "ess": [e.ess[i].item() for e in out.trace.events],
                    "roots": len(set(out.trace.lineage()[-1][i].tolist())),
                    "evaluations": out.ledger.evaluations // len(cases),
                    "decodes": out.ledger.decodes // len(cases),
                    "reward_calls": out.ledger.reward_calls // len(cases),
                }
                sink.write(json.dumps(record) + "\n")
            sink.flush()
            print(f"{name} {cases[-1]['id']} {np.mean([r for c in out.rewards.tolist() for r in c]):.2f}", flush=True)


def settings_of(model: str, method: str) -> str:
    """What a record of a method is made with: its parameters, the weights and defaults of the models, the version."""
    made = METHODS[method.removeprefix("empty_")]()
    return hashlib.sha256(f"{made!r} {digest(model)} {__version__}".encode()).hexdigest()[:16]


def read(work: Path) -> Iterator[Case]:
    """All records in a folder; a line that a stopped run left unfinished is passed over."""
    for f in sorted(work.glob("quality.*.jsonl")):
        whole = f.read_text().rpartition("\n")[0]
        yield from (json.loads(line) for line in whole.splitlines())


def chunks(cases: list[Case], size: int) -> list[list[Case]]:
    return [cases[i : i + size] for i in range(0, len(cases), size)]


# ------------------------------------------------------------------------------------------------------- the tables


def chosen_right(record: Case, first: int | None = None, by: str = "rewards") -> float:
    """Is the particle with the best reward right? `first` keeps only the first draws of best of 8."""
    rewards = record[by] if by != "both" else (np.array(record["rewards"]) + np.array(record["second"])).tolist()
    return float(record["right"][int(np.argmax(rewards[:first]))])


def interval(values: np.ndarray, clusters: list[str], draws: int = 4000) -> tuple[float, float, float]:
    """Mean and 95 % interval by bootstrap over clusters."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster][0] += value
        sums[cluster][1] += 1
    table = np.array(list(sums.values()))
    picks = np.random.default_rng(0).integers(0, len(table), (draws, len(table)))
    totals = table[picks].sum(1)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def columns(records: dict[str, dict[str, Case]], prefix: str = "") -> dict[str, dict[str, float]]:
    """Accuracy by case of every method in the table, derived ones (plain, best of 4, other choices) included."""
    found = {
        m.removeprefix(prefix): r for m, r in records.items() if m.startswith(prefix) and m.startswith("empty_") == bool(prefix)
    }
    table: dict[str, dict[str, float]] = {}
    independent = next((m for m in ("bon8", "bon4") if m in found), "")
    for name, first in (("plain", 1), ("best of 4", 4), ("best of 8", 8)):
        if first <= int(independent[3:] or 0):
            table[name] = {i: chosen_right(r, first) for i, r in found[independent].items()}
    labels = {"native": "plain, native ODE", "fk4": "FK(4)", "fk8": "FK(8)"}
    labels |= {"fk4_early": "FK(4), early events", "fk8_early": "FK(8), early events"}
    labels |= {"fk4_many": "FK(4), eight events", "fk8_many": "FK(8), eight events"}
    for method, by_case in found.items():
        if method not in ("bon4", "bon8"):
            table[labels.get(method, method)] = {i: chosen_right(r) for i, r in by_case.items()}
        if all(r["second"] for r in by_case.values()) and method in ("bon8", "fk8"):
            label = "best of 8" if method == "bon8" else labels.get(method, method)
            table[f"{label}, second CLIP chooses"] = {i: chosen_right(r, by="second") for i, r in by_case.items()}
            table[f"{label}, both choose"] = {i: chosen_right(r, by="both") for i, r in by_case.items()}
    return table


def show(table: dict[str, dict[str, float]], cases: dict[str, Case], pairs: list[tuple[str, str]]) -> None:
    print("| method | " + " | ".join(["accuracy (95 %)", "seen pairs", "unseen pairs", *TASKS]) + " |")
    print("|" + "---|" * (4 + len(TASKS)))
    for name, by_case in table.items():
        ids = list(by_case)
        mean, low, high = interval(np.array([by_case[i] for i in ids]), [cases[i]["caption"] for i in ids])
        cells = [f"{mean:.3f} ({low:.3f}, {high:.3f})"]
        groups = [[i for i in ids if seen(cases[i]["caption"]) == s] for s in (True, False)]
        groups += [[i for i in ids if cases[i]["task"] == task] for task in TASKS]
        cells += [f"{np.mean([by_case[i] for i in g]):.2f}" if g else "" for g in groups]
        print(f"| {name} (n={len(ids)}) | " + " | ".join(cells) + " |")
    print("\n| paired difference | mean (95 %) |\n|---|---|")
    for a, b in pairs:
        ids = [i for i in table.get(a, {}) if i in table.get(b, {})]
        if ids:
            mean, low, high = interval(np.array([table[a][i] - table[b][i] for i in ids]), [cases[i]["caption"] for i in ids])
            print(f"| {a} minus {b} | {mean:+.3f} ({low:+.3f}, {high:+.3f}) |")
    print()


def rivals(table: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    """Every method with particles, and best of as many."""
    return [(name, f"best of {k}") for k in (4, 8) for name in table if name.startswith((f"FK({k})", f"fk{k}"))]


def tables(work: Path, model: str) -> None:
    """Print what stands in DIR and was made with the models and methods as they are."""
    records: dict[str, dict[str, Case]] = defaultdict(dict)
    for record in read(work):
        if record["settings"] == settings_of(model, record["method"]):
            records[record["method"]][record["id"]] = record
    cases = {i: r for by_case in records.values() for i, r in by_case.items()}
    table = columns(records)
    show(table, cases, [("FK(4)", "plain"), ("best of 4", "plain"), *rivals(table)])
    blank = columns(records, "empty_")
    if blank:
        print("Empty caption, the reward alone asks for a single object:\n")
        show(blank, cases, rivals(blank))
    print(
        "| method | best reward | surviving first particles | evaluations | decodes | reward calls |\n|---|---|---|---|---|---|"
    )
    for method, by_case in records.items():
        values = list(by_case.values())
        best, roots = np.mean([max(r["rewards"]) for r in values]), np.mean([r["roots"] for r in values])
        print(
            f"| {method} | {best:.2f} | {roots:.2f} | "
            + " | ".join(str(values[0][k]) for k in ("evaluations", "decodes", "reward_calls"))
            + " |"
        )


def tune(model: str, count: int = 40) -> None:
    """Accuracy of the plain chain on development captions, by guidance and steps; the best become the model's defaults."""
    pipe, cases = load_pipeline(model), held_out(count, 6)
    found: dict[tuple[int, float], float] = {}
    texts = [c["caption"] for c in cases]
    for steps in (20, 30, 50):
        for scale in (2.0, 3.0, 4.0, 6.0):
            steered = SteeredPipeline(pipe, BestOfN(1), chunk=48)
            out = steered(texts, num_inference_steps=steps, guidance_scale=scale, seed=0)
            right = np.array([judge(s[0].float(), t) for s, t in zip(out.samples, texts, strict=True)], dtype=float)
            mean, low, high = interval(right, texts)
            found[steps, scale] = mean
            print(f"{steps} steps, guidance {scale}: {mean:.3f} ({low:.3f}, {high:.3f})", flush=True)
    steps, scale = max(found, key=lambda key: found[key])
    defaults = json.loads(DEFAULTS.read_text())
    defaults[model] |= {"num_inference_steps": steps, "guidance_scale": scale}
    DEFAULTS.write_text(json.dumps(defaults, indent=1) + "\n")


def second_reward() -> Any:
    """The second miniature CLIP, where there is one: it never steers."""
    folder = WEIGHTS / "clip2"
    return ClipScore(model_name=f"local-dir:{folder}") if folder.exists() else None


if __name__ == "__main__":
    from diffsteer.types import Context

    EMBEDDED = Context(1, 1, True)
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", default="all", choices=("run", "table", "tune", "captions", "all"))
    parser.add_argument("--model", default="shapes", choices=MODELS)
    parser.add_argument("--work", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--methods", default=",".join(MAIN), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--shard", default="0/1", help="i/n: take every n-th batch")
    parser.add_argument("--count", type=int, default=CASES_A_TASK, help="cases a task")
    parser.add_argument("--empty", type=int, default=EMPTY_CASES, help="cases with the empty caption")
    parser.add_argument("--development", action="store_true", help="cases that settings are chosen on")
    arguments = parser.parse_args()
    if arguments.stage == "tune":
        tune(arguments.model)
    if arguments.stage == "captions":
        print("\n".join(c["caption"] for c in held_out(arguments.count, 6 if arguments.development else 7)))
    if arguments.stage in ("run", "all"):
        i, n = (int(v) for v in arguments.shard.split("/"))
        methods, sizes = arguments.methods.split(","), (arguments.count, arguments.empty)
        run(arguments.work, arguments.model, methods, (i, n), *sizes, arguments.development)
    if arguments.stage in ("table", "all"):
        tables(arguments.work, arguments.model)
