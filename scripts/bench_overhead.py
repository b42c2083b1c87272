"""What steering costs outside the denoiser: a constant reward, no decode, medians of interleaved pairs.

    python scripts/bench_overhead.py               the embedded model, 16 rows, 20 steps, nine pairs
    python scripts/bench_overhead.py families      six families at toy size (those of the tests), 4 rows, 10 steps

Prints the share of a steered run's time outside the denoiser (from its ledger) and the ratio to the plain pipeline with the
same scheduler and batch. At toy size the denoiser takes milliseconds, so that shares there say little of a real model; the
milliseconds a step that a steered run has more than a plain one are what stays.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.hooks import Watch, watching
from diffsteer.ledger import Ledger
from diffsteer.pipes import denoisers_of
from diffsteer.samplers import FeynmanKac

PROMPTS, PARTICLES, STEPS, PAIRS = ["a red circle", "two stars", "a ring above a cross", "a blue square"], 4, 20, 9


def compare(pipe: Any, prompts: list[str], particles: int, **call: Any) -> list[Any]:
    """((seconds, share outside the denoiser) steered, the same plain) of each pair, with as many rows."""
    rows = [prompt for prompt in prompts for _ in range(particles)]  # some classes ignore their num_videos_per_prompt
    pipe.set_progress_bar_config(disable=True)
    steered = SteeredPipeline(pipe, FeynmanKac(particles, trigger="always"), lambda x, p: torch.zeros(len(x)), decoder="none")

    def run_steered() -> tuple[float, float]:
        start = time.perf_counter()
        out = steered(prompts, seed=0, **call)
        total = time.perf_counter() - start
        return total, 1 - out.ledger.seconds["denoiser"] / total

    def run_plain() -> tuple[float, float]:
        ledger, start = Ledger(), time.perf_counter()
        with watching(Watch(ledger), *denoisers_of(pipe)):
            pipe(rows, output_type="latent", generator=torch.Generator().manual_seed(0), **call)
        total = time.perf_counter() - start
        return total, 1 - ledger.seconds["denoiser"] / total

    run_steered(), run_plain()
    return [(run_steered(), run_plain()) for _ in range(PAIRS)]


def embedded() -> None:
    pairs = compare(load_pipeline("shapes"), PROMPTS, PARTICLES, num_inference_steps=STEPS)
    ratios = sorted(s[0] / p[0] for s, p in pairs)
    print(f"outside the denoiser, steered: {statistics.median(s[1] for s, _ in pairs):.1%} of the time (median of {PAIRS})")
    print(f"outside the denoiser, plain:   {statistics.median(p[1] for _, p in pairs):.1%}")
    print(f"steered / plain: median {statistics.median(ratios):.3f}, range {ratios[0]:.3f} to {ratios[-1]:.3f}")


def families() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from families.toys import SIX, TOYS

    print("| pipeline class, at toy size | steered / plain | outside the denoiser, steered | plain | more a step |")
    print("|---|---|---|---|---|")
    for name in SIX:
        toy = TOYS[name]
        call = {k: v for k, v in toy.call.items() if k != "true_cfg_scale"} | {"num_inference_steps": 10}
        pairs = compare(toy.build(), PROMPTS[:2], 2, **call)
        ratios = sorted(s[0] / p[0] for s, p in pairs)
        outside = [statistics.median(side[i][1] for side in pairs) for i in (0, 1)]
        more = statistics.median((s[0] - p[0]) / 10 for s, p in pairs)
        shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {shown} | {outside[0]:.0%} | {outside[1]:.0%} | {1000 * more:+.1f} ms |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("embedded", "families"), default="embedded")
    torch.set_num_threads(1)
    {"embedded": embedded, "families": families}[parser.parse_args().what]()
