"""How the few-step model of the shapes world is distilled: the flow's networks learn the first model's chain in four steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from shapes_flow import FLOW, TOKENIZER, export_painter, first_painter
from shapes_training import tokenize, train
from torch import Tensor

from diffsteer.shapes.models import WEIGHTS, recommended_for

CHAINS, PER_FILE, BATCH, RATE, STEPS = 16_000, 640, 64, 1e-3, 5_000
# The scheduler's four steps of shift 3, on the scale s = sigma / (alpha + sigma), and what lies between them.
SHIFT, GRID = 3.0, (1.0, 0.9, 0.75, 0.5, 0.0)
LEVELS = (1.0, 0.97, 0.9, 0.83, 0.75, 0.62, 0.5, 0.35, 0.25, 0.0)
TURBO: dict[str, Any] = FLOW | {"flow_shift": SHIFT, "solver_order": 1}


@torch.no_grad()
def stage_chains(work: Path) -> None:
    """Deterministic chains of the first model as it is recommended (DDIM, guidance), seen at `LEVELS`, as a flow's states."""
    from diffusers import DDIMScheduler

    out = work / "chains"
    out.mkdir(exist_ok=True)
    painter, scheduler = first_painter().eval(), DDIMScheduler.from_pretrained(WEIGHTS / "sd" / "scheduler")
    captions = (work / "captions.txt").read_text().split("\n")
    ids, empty = tokenize(TOKENIZER, captions[:CHAINS]), tokenize(TOKENIZER, [""])
    advised = recommended_for("shapes")
    scheduler.set_timesteps(advised["num_inference_steps"])
    bars = scheduler.alphas_cumprod[scheduler.timesteps]
    at = [(float(b.sqrt()), float((1 - b).sqrt())) for b in bars] + [(1.0, 0.0)]
    for first in range(0, CHAINS, PER_FILE):
        path = out / f"{first:06d}.pt"
        if path.exists():
            continue
        mine, seen = ids[first : first + PER_FILE], []
        z = torch.randn(len(mine), 4, 16, 16, generator=torch.Generator().manual_seed(6 * 10**6 + first))
        for x, words in zip(z.split(BATCH), mine.split(BATCH), strict=True):
            text = torch.cat([painter.text_encoder(w).last_hidden_state for w in (empty.expand_as(words), words)])
            states, wanted = [x], list(LEVELS[1:])
            for k, t in enumerate(scheduler.timesteps):
                without, with_ = painter.unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample.chunk(2)
                eps = without + advised["guidance_scale"] * (with_ - without)
                (alpha, sigma), (next_alpha, next_sigma) = at[k], at[k + 1]
                clean = (x - sigma * eps) / alpha
                while wanted and wanted[0] >= next_sigma / (next_alpha + next_sigma):
                    states.append((1 - wanted[0]) * clean + wanted.pop(0) * eps)
                x = next_alpha * clean + next_sigma * eps
            seen.append(torch.stack(states, 1).half())
        torch.save(torch.cat(seen), path)
        print(f"chains {first + len(z)}/{CHAINS}", flush=True)


def stage_turbo(work: Path) -> None:
    """From each of the four levels the velocity that leads straight to where the chain is at the next (Salimans & Ho, 2022,
    arXiv 2202.00512, here all halvings at once; guidance goes into the weights)."""
    torch.manual_seed(7)
    files = sorted((work / "chains").glob("*.pt"))
    chains = torch.cat([torch.load(f, weights_only=True) for f in files])[:, [LEVELS.index(s) for s in GRID]]
    ids = tokenize(TOKENIZER, (work / "captions.txt").read_text().split("\n")[: len(chains)])
    painter = first_painter()
    painter.load_state_dict(torch.load(work / "flow.pt", weights_only=True))
    grid = torch.tensor(GRID)

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(7 * 10**6 + step)
        rows = torch.randint(len(chains), (BATCH,), generator=rng)
        k = torch.randint(len(GRID) - 1, (BATCH,), generator=rng)
        x, following = chains[rows, k].float(), chains[rows, k + 1].float()
        s, then = (grid[j][:, None, None, None] for j in (k, k + 1))
        wanted = (x - following) / (s - then)
        error = (painter(x, 1000 * s.flatten(), ids[rows]) - wanted).square().mean((1, 2, 3))
        return (error * ((s - then) / 0.25).flatten() ** 0.5).mean()

    torch.save(train("turbo", work, painter, loss_of, STEPS, RATE).state_dict(), work / "turbo.pt")


def stage_export_turbo(work: Path, out: Path = WEIGHTS / "sd-turbo") -> None:
    export_painter(work / "turbo.pt", TURBO, out)
