"""What the nodes cost and gain in a real ComfyUI, on the embedded model. Run by ComfyUI's Python, in its folder:

python PATH-TO-DIFFSTEER/scripts/bench_comfy.py overhead       # beside euler_ancestral, eleven interleaved runs
python PATH-TO-DIFFSTEER/scripts/bench_comfy.py guidance       # some 25 minutes on a core; judged by the checker
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

STEPS, CFG, RUNS, CAPTIONS, ROWS = 30, 4.0, 13, 48, 4
GUIDED: list[dict[str, float]] = [{"clean": 0.0}]
GUIDED += [{"clean": s, "lowest": low, "highest": 0.98} for s in (0.1, 0.3, 0.6) for low in (0.25, 0.0)]
GUIDED += [{"clean": 0.0, "network": s, "lowest": 0.25, "highest": 0.98} for s in (0.1, 0.3, 0.6)]


@torch.inference_mode()
def overhead() -> None:
    import comfy.samplers

    from diffsteer.comfy import shapes
    from diffsteer.comfy.host import HOST
    from diffsteer.comfy.noise import keyed
    from diffsteer.comfy.steering import Steering
    from diffsteer.rewards import Compressibility
    from diffsteer.samplers import BestOfN, FeynmanKac

    model, clip, vae = shapes.load("shapes")
    positive, negative = ([[clip.encode(text), {}]] for text in ("three red circles", ""))
    sigmas, latent = HOST.sigmas(model, "simple", STEPS, 1.0), shapes.empty_latent(8)["samples"]
    noise = keyed(1, 8, 8, latent)

    def seconds(sampler: Any) -> float:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(CFG)
        started = time.perf_counter()
        guider.sample(noise, latent, sampler, sigmas, seed=1, disable_pbar=True)
        return time.perf_counter() - started

    plain = comfy.samplers.sampler_object("euler_ancestral")
    ours = [HOST.sampler(Steering(m, {}, 0, Compressibility(), "", vae)) for m in (BestOfN, FeynmanKac)]
    taken = [[seconds(s) for s in (plain, *ours)] for _ in range(RUNS)][2:]
    for name, i in (("one look", 1), ("three looks", 2)):
        ratios = [run[i] / run[0] for run in taken]
        print(f"{name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


@torch.inference_mode()
def guidance() -> None:
    import comfy.samplers
    import numpy as np
    from PIL import Image

    from diffsteer.comfy import shapes
    from diffsteer.comfy.guider import Pull, pulled
    from diffsteer.comfy.host import HOST
    from diffsteer.comfy.noise import keyed
    from diffsteer.guidance import Guidance
    from diffsteer.rewards import ClipScore
    from diffsteer.shapes.check import check
    from diffsteer.shapes.scene import caption, sample_scene
    from diffsteer.types import Context

    draw, tasks = np.random.default_rng(777), ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    captions = [caption(sample_scene(tasks[i % 6], draw)) for i in range(CAPTIONS)]
    model, clip, vae = shapes.load("shapes")
    sigmas, latent = HOST.sigmas(model, "simple", STEPS, 1.0), shapes.empty_latent(ROWS)["samples"]
    euler = comfy.samplers.sampler_object("euler_ancestral")
    for settings in GUIDED:
        right, scores = [], []
        for seed, text in enumerate(captions):
            reward = ClipScore("shapes")
            guider = pulled(comfy.samplers.CFGGuider, model, Pull(Guidance(**settings), reward, text, vae))  # type: ignore[arg-type]
            guider.set_conds([[clip.encode(text), {}]], [[clip.encode(""), {}]])
            guider.set_cfg(CFG)
            made = guider.sample(keyed(seed, ROWS, ROWS, latent), latent, euler, sigmas, seed=seed, disable_pbar=True)
            images = vae.decode(made)
            scores += reward.score(images.movedim(-1, 1), [text] * ROWS, Context()).tolist()
            arrays = (images.numpy() * 255).round().clip(0, 255).astype(np.uint8)
            right.append(sum(check(Image.fromarray(a), text).correct for a in arrays) / ROWS)
        again = np.random.default_rng(0).choice(right, (2000, len(right))).mean(1)  # captions drawn anew
        low, high = np.quantile(again, (0.025, 0.975))
        told = {"right": round(sum(right) / len(right), 3), "interval": [round(float(low), 3), round(float(high), 3)]}
        print(json.dumps(settings | told | {"clip": round(sum(scores) / len(scores), 1)}), flush=True)


if __name__ == "__main__":
    command = {"overhead": overhead, "guidance": guidance}[sys.argv[1]]
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["bench_comfy", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    command()
