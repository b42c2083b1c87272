"""Is there exposure bias to cure, and does shifting times cure it? On the pixel-space model of the shapes world, 32 x 32.

    python scripts/bench_timing.py drift --work DIR                    the variance of states against the training marginal
    python scripts/bench_timing.py tune --work DIR                     window, cut-off and scale, on development seeds
    python scripts/bench_timing.py run --work DIR [--shard 0/2] [--samples 2000]     a file of features a cell; resumes
    python scripts/bench_timing.py table --work DIR                    Frechet distances with intervals

Samplers are DDPM, DDIM and F-PNDM, alone, with time-shift ("shifted": the reference is given the variance of the training
pictures; "calibrated", the default: it is measured on a plain run; and as published), and with epsilon scaling. The window and
the cut-off of all three are those that were tuned for the first. All start from the same keyed noises. The judge is the Frechet
distance to all 80,000 training pictures in the 64 penultimate features of a classifier that no sampler sees; intervals are
95 %, by bootstrap over noises, the same for both of a pair.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from shapes_pixels import PIXELS, PixelJudge

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.callable import CallableSession
from diffsteer.samplers import BestOfN, EpsilonScaling, TimeShift
from diffsteer.timing import reference_variance, sample_variance

STEPS, BATCH, DEVELOPMENT, HELD_OUT = (10, 5, 20, 50), 100, 1, 0
BASES: dict[str, dict[str, Any]] = {"ddim": {"eta": 0.0}, "ddpm": {"eta": 1.0}, "f-pndm": {"order": 4}}
WINDOWS, CUTOFFS = (20.0, 60.0, 120.0), (100.0, 200.0, 500.0)
SCALES = (0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975, 1.0025, 1.005, 1.02)
FIGURES = Path(__file__).with_name("timing.json")  # what was tuned
REAL = load_file(PIXELS / "real.safetensors")


def sampler_of(base: str, kind: str, tuned: dict[str, Any]) -> Any:
    facts = BASES[base]
    if kind == "plain":
        return BestOfN(1, eta=facts["eta"]) if "eta" in facts else TimeShift(window=0.0, **facts)
    if kind == "scaled":
        return EpsilonScaling(scale=tuned["scale"], **facts)
    own: dict[str, Any] = {"published": {"reference": "noise"}, "calibrated": {"reference": "calibrated"}}.get(
        kind, {"reference": "data_var", "data_variance": float(REAL["variance"])}
    )
    return TimeShift(window=tuned["window"], cutoff=tuned["cutoff"], **own, **facts)


def features(sampler: Any, steps: int, seed: int, first: int, count: int) -> tuple[np.ndarray, float]:
    """(count, 64), and the share of looked-at rows at the window's edge."""
    model, judge, edges = load_pipeline("shapes-pixels"), load_judge(), []
    parts = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # what is degenerate is in the table
        for start in range(first, first + count, BATCH):
            ids = list(range(start, min(start + BATCH, first + count)))
            out = SteeredPipeline(model, sampler)([""] * len(ids), num_inference_steps=steps, seed=seed, ids=ids)
            parts.append(judge.features(out.latents[:, 0].clamp(-1, 1)).numpy())
            edges += [float(s.edge.double().mean()) for s in out.trace.shifts]
    return np.concatenate(parts), float(np.mean(edges)) if edges else 0.0


def load_judge() -> PixelJudge:
    judge = PixelJudge().eval()
    judge.load_state_dict({k: v.float() for k, v in load_file(PIXELS / "judge.safetensors").items()}, strict=False)
    return judge


def frechet(found: np.ndarray) -> float:
    """The squared 2-Wasserstein distance of Gaussians with the moments of the features and of those of real pictures."""
    mean, covariance = REAL["mean"].numpy(), REAL["covariance"].numpy()
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    other = np.cov(found.T)
    middle = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()  # the trace of the root of the product
    return float(((found.mean(0) - mean) ** 2).sum() + np.trace(covariance + other) - 2 * middle)


def drift() -> None:
    """Per step: the mean variance of states over 200 samples, divided by that of noised training pictures at the same level."""
    print("| sampler | steps | mean variance of the states / training marginal, step by step | of the end |")
    print("|---|---|---|---|")
    for base in ("ddim", "ddpm"):
        for steps in STEPS:
            session = CallableSession(
                load_pipeline("shapes-pixels"),
                [""] * 200,
                num_inference_steps=steps,
                particles=1,
                seed=DEVELOPMENT,
                eta=BASES[base]["eta"],
            )
            x, ratios = session.noise(), []
            for k in range(steps):
                x = session.segment(x, k, k + 1).x
                wanted = reference_variance(session.levels[k + 1], REAL["variance"])
                ratios.append(float(sample_variance(x).mean() / wanted))
            shown = [f"{ratios[round(q * (steps - 1))]:.3f}" for q in np.linspace(0, 1, min(steps, 10))]
            print(f"| {base} | {steps} | {', '.join(shown)} | {ratios[-1]:.3f} |", flush=True)


def tune(work: Path, count: int = 400) -> None:
    """Of every base at 5 and 10 steps; more steps take what 10 have."""
    work.mkdir(parents=True, exist_ok=True)
    best: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for steps in (10, 5):
        for base in BASES:
            entry = best.setdefault(f"{base} {steps}", {"tried": {}})
            asked: list[tuple[str, dict[str, float]]] = [("plain", {})]
            asked += [("shifted", {"window": w, "cutoff": c}) for w in WINDOWS for c in CUTOFFS]
            asked += [("scaled", {"scale": s}) for s in SCALES]
            for kind, facts in asked:
                name = " ".join([kind, *(f"{k}={v:g}" for k, v in facts.items())])
                if name not in entry["tried"]:
                    found, _ = features(sampler_of(base, kind, facts), steps, DEVELOPMENT, 0, count)
                    entry["tried"][name] = round(frechet(found), 1)
                    FIGURES.write_text(json.dumps(best, indent=1) + "\n")
            for wanted in ("shifted", "scaled"):
                entry |= min(
                    (facts for kind, facts in asked if kind == wanted),
                    key=lambda f: entry["tried"][" ".join([wanted, *(f"{k}={v:g}" for k, v in f.items())])],
                )
            print(base, steps, entry, flush=True)
            FIGURES.write_text(json.dumps(best, indent=1) + "\n")


def cells() -> list[tuple[str, int, str]]:
    """The most telling first."""
    main = [(base, steps, kind) for steps in STEPS for base in BASES for kind in ("plain", "shifted")]
    more = [(base, steps, kind) for steps in (10, 5) for base in BASES for kind in ("scaled", "published")]
    default = [(base, 10, "calibrated") for base in ("ddim", "f-pndm", "ddpm")]
    return main[:12] + more + main[12:] + default


def run(work: Path, shard: tuple[int, int], samples: int, only: str) -> None:
    work.mkdir(parents=True, exist_ok=True)
    best = json.loads(FIGURES.read_text())
    wanted = [c for c in cells() if not only or f"{c[0]} {c[1]}" in only.split(",") and c[2] in ("plain", "shifted")]
    for base, steps, kind in wanted[shard[0] :: shard[1]]:
        for first in range(0, samples, 1000):
            path = work / f"{base}.{steps}.{kind}.{first}.npz"
            if path.exists():
                continue
            tuned = best[f"{base} {min(steps, 10)}"]
            found, edge = features(sampler_of(base, kind, tuned), steps, HELD_OUT, first, min(1000, samples - first))
            np.savez(path.with_suffix(".part.npz"), features=found.astype(np.float32), edge=edge)
            path.with_suffix(".part.npz").replace(path)
            print(path.name, f"{frechet(found):.3f}", flush=True)


def table(work: Path, draws: int = 300) -> None:
    rng = np.random.default_rng(0)
    found: dict[tuple[str, int, str], np.ndarray] = {}
    edges: dict[tuple[str, int, str], float] = {}
    for cell in cells():
        files = sorted(work.glob(f"{cell[0]}.{cell[1]}.{cell[2]}.*[0-9].npz"), key=lambda p: int(p.name.split(".")[-2]))
        if files:
            loaded = [np.load(f) for f in files]
            found[cell] = np.concatenate([f["features"] for f in loaded]).astype(np.float64)
            edges[cell] = float(np.mean([f["edge"] for f in loaded]))
    heads = ("steps", "sampler", "samples", "plain", "kind", "with it", "gain", "at the window's edge")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for (base, steps, kind), own in sorted(found.items(), key=lambda item: (item[0][1], item[0][0], item[0][2])):
        plain = found.get((base, steps, "plain"))
        if kind == "plain" or plain is None:
            continue
        n = min(len(own), len(plain))
        a, b = frechet(plain[:n]), frechet(own[:n])
        gains = []
        for _ in range(draws):
            rows = rng.integers(0, n, n)
            x = frechet(plain[rows])
            gains.append((x - frechet(own[rows])) / x)
        low, high = np.percentile(gains, [2.5, 97.5])
        print(
            f"| {steps} | {base} | {n:,} | {a:.3f} | {kind} | {b:.3f} | {(a - b) / a:+.1%} ({low:+.1%} to {high:+.1%}) "
            f"| {edges[base, steps, kind]:.0%} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("drift", "tune", "run", "table"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--only", default="", help='cells for more samples, such as "f-pndm 10,ddim 10"')
    arguments = parser.parse_args()
    if arguments.what == "drift":
        drift()
    elif arguments.what == "tune":
        tune(arguments.work)
    elif arguments.what == "run":
        part, whole = (int(v) for v in arguments.shard.split("/"))
        run(arguments.work, (part, whole), arguments.samples, arguments.only)
    else:
        table(arguments.work)
