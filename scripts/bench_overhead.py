"""What steering costs outside the denoiser: a constant reward, no decode, 16 rows, 20 steps, on the embedded model.

    python scripts/bench_overhead.py

Prints the share of a steered run's time outside the denoiser (from its ledger) and the ratio to the plain
pipeline with the same scheduler and batch, medians of nine interleaved pairs.
"""

from __future__ import annotations

import statistics
import time

import torch

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.hooks import Watch, watching
from diffsteer.ledger import Ledger
from diffsteer.samplers import FeynmanKac

PROMPTS, PARTICLES, STEPS, PAIRS = ["a red circle", "two stars", "a ring above a cross", "a blue square"], 4, 20, 9


def main() -> None:
    torch.set_num_threads(1)
    pipe = load_pipeline("shapes")
    pipe.set_progress_bar_config(disable=True)
    steered = SteeredPipeline(pipe, FeynmanKac(PARTICLES, trigger="always"), lambda x, p: torch.zeros(len(x)), decoder="none")

    def run_steered() -> tuple[float, float]:
        start = time.perf_counter()
        out = steered(PROMPTS, num_inference_steps=STEPS, seed=0)
        total = time.perf_counter() - start
        return total, 1 - out.ledger.seconds["denoiser"] / total

    def run_plain() -> tuple[float, float]:
        ledger, start = Ledger(), time.perf_counter()
        with watching(Watch(ledger), pipe.unet):
            generator = torch.Generator().manual_seed(0)
            pipe(PROMPTS, num_images_per_prompt=PARTICLES, num_inference_steps=STEPS, output_type="latent", generator=generator)
        total = time.perf_counter() - start
        return total, 1 - ledger.seconds["denoiser"] / total

    run_steered(), run_plain()
    pairs = [(run_steered(), run_plain()) for _ in range(PAIRS)]
    ratios = sorted(s[0] / p[0] for s, p in pairs)
    print(f"outside the denoiser, steered: {statistics.median(s[1] for s, _ in pairs):.1%} of the time (median of {PAIRS})")
    print(f"outside the denoiser, plain:   {statistics.median(p[1] for _, p in pairs):.1%}")
    print(f"steered / plain: median {statistics.median(ratios):.3f}, range {ratios[0]:.3f} to {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
