"""Trains the noise network of the embedded few-step model: a low-rank change of the frozen generator that moves first noises.

    python scripts/train_noise.py scores --work DIR [--steps N]    N noises, and what CLIP says of their pictures (40 min)
    python scripts/train_noise.py predict --work DIR [--steps N]   a predictor of that from noise and caption
    python scripts/train_noise.py train --work DIR [--steps N]     the noise network, for the predicted reward (20 min)
    python scripts/train_noise.py probe                            is there anything to learn? (15 min)
    python scripts/train_noise.py export --work DIR                into diffsteer/shapes/weights
    python scripts/train_noise.py show --work DIR                  its gain, and that of optimising each image

The objective is 0.5 |delta|^2 - SCALE reward, the reward being the miniature CLIP's score of what the few-step model makes of
the moved noise. Its gradient through generator, decoder and CLIP has lengths between 1 and 600 and says little of what lies
more than a tenth away: training on it directly moved nothing in 560 steps (a mean |delta|^2 of 0.5, rewards as before). So a
predictor learns the reward from noise and caption first, and the network follows the predictor's gradient, which is smooth.
A second round of scores, predict and train has noises that the first network moved, by up to half more than it wants to: the
predictor learns where it was too hopeful.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_quality import held_out, interval, judge, second_reward
from shapes_training import train
from torch import Tensor, nn

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.noise_network import GRID, noise_network_of
from diffsteer.rewards import ClipScore
from diffsteer.samplers import RandomSearch, ReNO
from diffsteer.shapes.models import NOISE
from diffsteer.types import Context

BATCH, RATE, SCALE, RANK = 32, 2e-3, 5.0, 16
SPREAD, PREDICT = 8.0, 128
PER_FILE, NOISES = 1024, 8
EMBEDDED = Context(1, 1, True)


def fast() -> Any:
    pipe = load_pipeline("shapes-turbo")
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    return pipe


class Chain:
    """The few-step model as one differentiable function of noise and texts: the steps of its own scheduler."""

    def __init__(self, pipe: Any) -> None:
        from diffsteer.backend import DiffusersSession

        self.pipe = pipe
        session = DiffusersSession(pipe, ["a star"], particles=1, seed=0, eta=0.0, own=True)
        self.levels, self.steps = session.levels, session.steps

    def __call__(self, z: Tensor, words: Tensor) -> Tensor:
        x = z
        for at, to in zip(self.levels[:-1], self.levels[1:], strict=True):
            s, t = float(at.sigma / (at.alpha + at.sigma)), float(to.sigma / (to.alpha + to.sigma))
            velocity = self.pipe.unet(x, torch.full((len(x),), 1000 * s), encoder_hidden_states=words).sample
            x = x + (t - s) * velocity
        decoded: Tensor = self.pipe.vae.decode(x).sample
        return (decoded / 2 + 0.5).clamp(0, 1)


class Predictor(nn.Module):
    """What reward a noise gets under a caption, from the mean, in SPREADs: a transformer over the cells of a coarse grid of the
    noise, where layout is decided, and the caption's words. It knows nothing finer, as the network that follows it."""

    def __init__(self, words: int, grid: int = GRID, width: int = 96, layers: int = 3) -> None:
        super().__init__()
        self.cells, self.words = nn.Linear(4, width), nn.Linear(words, width)
        self.places = nn.Parameter(0.1 * torch.randn(grid * grid, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.read = nn.Linear(width, 1)

    def forward(self, cells: Tensor, words: Tensor) -> Tensor:
        places = self.cells(cells.flatten(2).transpose(1, 2)) + self.places
        seen: Tensor = self.body(torch.cat([places, self.words(words)], 1))
        found: Tensor = self.read(seen[:, : places.shape[1]].mean(1))[:, 0]
        return found


def cells_of(z: Tensor) -> Tensor:
    """The coarse noise, of unit deviation."""
    return F.adaptive_avg_pool2d(z, GRID) * (z.shape[-1] / GRID)


def words_of(network: Any, captions: list[str]) -> Tensor:
    """What the few-step model attends to, (N, L, D)."""
    with torch.no_grad():
        return torch.cat([network.encode(captions[i : i + 512]) for i in range(0, len(captions), 512)])


def stage_predict(work: Path, steps: int) -> None:
    """Rewards, less their mean, and (with more weight) less the mean of their caption, from noises and captions."""
    torch.manual_seed(11)
    files = sorted((work / "scores").glob("*.pt"))
    parts = [torch.load(f, weights_only=True) for f in files]
    cells = torch.cat([p["cells"] for p in parts])
    rows, rewards = torch.cat([p["rows"] for p in parts]), torch.cat([p["rewards"] for p in parts])
    texts = (work / "captions.txt").read_text().split("\n")
    used, index = rows.unique(return_inverse=True)
    words = words_of(noise_network_of(fast()), [texts[int(r)] for r in used]).half()
    groups = len(cells) // NOISES
    held = groups // 20
    predictor = Predictor(words.shape[-1])

    def batch(chosen: Tensor) -> tuple[Tensor, Tensor]:
        mine = (chosen[:, None] * NOISES + torch.arange(NOISES)).flatten()
        return predictor(cells[mine].float(), words[index[mine]].float()), (rewards[mine] - rewards.mean()) / SPREAD

    def loss_of(step: int) -> Tensor:
        chosen = torch.randint(groups - held, (PREDICT // NOISES,), generator=torch.Generator().manual_seed(11 * 10**6 + step))
        said, true = (v.view(-1, NOISES) for v in batch(chosen))
        centred = (said - said.mean(1, keepdim=True)) - (true - true.mean(1, keepdim=True))
        return 0.3 * (said - true).square().mean() + centred.square().mean()

    predictor.load_state_dict(train(f"predict-{len(files)}", work, predictor, loss_of, steps, 1e-3).state_dict())
    predictor.eval()
    with torch.no_grad():
        found = [batch(chosen) for chosen in torch.arange(groups - held, groups).split(16)]
    said, true = (torch.cat([f[k] for f in found]).view(-1, NOISES) for k in (0, 1))
    inside = [(v - v.mean(1, keepdim=True)).flatten() for v in (said, true)]
    print("held out: correlation", float(torch.corrcoef(torch.stack([said.flatten(), true.flatten()]))[0, 1]),
          "within captions", float(torch.corrcoef(torch.stack(inside))[0, 1]))  # fmt: skip
    torch.save({"files": len(files), "model": predictor.state_dict()}, work / "predict.pt")


def stage_train(work: Path, steps: int) -> None:
    torch.manual_seed(9)
    pipe = fast()
    network = noise_network_of(pipe, rank=RANK)
    predictor = Predictor(words_of(network, ["a star"]).shape[-1])
    learned = torch.load(work / "predict.pt", weights_only=True)
    predictor.load_state_dict(learned["model"])
    predictor.requires_grad_(False).eval()
    captions = (work / "captions.txt").read_text().split("\n")[:40_000]

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((9, step))
        texts = [captions[i] for i in rng.integers(0, len(captions), BATCH)]
        z = torch.randn(BATCH, 4, 16, 16, generator=torch.Generator().manual_seed(9 * 10**6 + step))
        delta = network.delta(z, texts)
        words = words_of(network, texts)
        said, square = SPREAD * predictor(cells_of(z + delta), words), delta.square().flatten(1).sum(1)
        if step % 50 == 0:
            print(f"step {step}: predicted {said.mean().item():.2f}, |delta|^2 {square.mean().item():.2f}", flush=True)
        return (0.5 * square - SCALE * said).mean()

    name = f"noise-{learned['files']}"
    train(name, work, network, loss_of, steps, RATE)
    network.load_state_dict(torch.load(work / f"{name}.ckpt", weights_only=True)["average"])
    network.save(work / "noise.safetensors")


@torch.no_grad()
def stage_scores(work: Path, count: int) -> None:
    """Rewards of the few-step model's pictures, NOISES of them a caption; of moved noises where there is a network already."""
    out, moved_by = work / "scores", work / "noise.safetensors"
    out.mkdir(exist_ok=True)
    pipe = fast()
    network = noise_network_of(pipe, moved_by if moved_by.exists() else None)
    chain, reward = Chain(pipe), ClipScore("shapes")
    captions = (work / "captions.txt").read_text().split("\n")[:40_000]
    for n in range(count // PER_FILE):
        path = out / f"{n:04d}.pt"
        if path.exists():
            continue
        rows = np.random.default_rng((10, n)).integers(0, len(captions), PER_FILE // NOISES).repeat(NOISES)
        generator = torch.Generator().manual_seed(10**7 + n)
        z, found = torch.randn(PER_FILE, 4, 16, 16, generator=generator), []
        shares = 1.5 * torch.rand(PER_FILE, 1, 1, 1, generator=generator)
        for i in range(0, PER_FILE, 64):
            texts = [captions[r] for r in rows[i : i + 64]]
            if moved_by.exists():
                z[i : i + 64] += shares[i : i + 64] * network.delta(z[i : i + 64], texts)
            found.append(reward.score(chain(z[i : i + 64], words_of(network, texts)), texts, EMBEDDED))
        torch.save({"rows": torch.from_numpy(rows), "cells": cells_of(z).half(), "rewards": torch.cat(found)}, path)
        print(f"scores {(n + 1) * PER_FILE}/{count}", flush=True)


@torch.no_grad()
def stage_probe() -> None:
    """Is there anything to learn? Of some captions the direction that rewards of 768 noises tell by ridge regression on the
    coarse noise, tried on 192 others; and of 192 captions a move along the clean estimate that the model makes of the noise."""
    pipe, reward = fast(), ClipScore("shapes")
    network, chain = noise_network_of(pipe), Chain(pipe)
    made, fresh = (torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(12 + n)) for n in (768, 192))

    def scores(z: Tensor, texts: list[str]) -> Tensor:
        words = words_of(network, texts)
        parts = [
            reward.score(chain(z[i : i + 64], words[i : i + 64]), texts[i : i + 64], EMBEDDED) for i in range(0, len(z), 64)
        ]
        return torch.cat(parts).double()

    texts = [c["caption"] for c in held_out(32, 6)]
    print("| caption, or move | length | gain (95 %) |")
    print("|---|---|---|")
    for caption in texts[:6]:
        rewards, x = scores(made, [caption] * len(made)), cells_of(made).flatten(1).double()
        slope = torch.linalg.solve(x.T @ x + 300 * torch.eye(x.shape[1]).double(), x.T @ (rewards - rewards.mean()))
        shift = F.interpolate((slope / slope.norm()).view(1, 4, GRID, GRID) * GRID / 16, (16, 16)).float()  # of length one
        before = scores(fresh, [caption] * len(fresh))
        for length in (2.0, 4.0, 6.0):
            gain = (scores(fresh + length * shift, [caption] * len(fresh)) - before).numpy()
            print(f"| {caption} | {length:.0f} | {gains_of(gain)} |", flush=True)
    before, words = scores(fresh, texts), words_of(network, texts)
    estimate = fresh - pipe.unet(fresh, torch.full((len(fresh),), 1000.0), encoder_hidden_states=words).sample
    for share in (-0.1, 0.1, 0.25):
        move = share * (estimate - estimate.mean(0))
        gain = (scores(fresh + move, texts) - before).numpy()
        length = float(move.square().flatten(1).sum(1).mean().sqrt())
        print(f"| {share:+.2f} of the clean estimate | {length:.1f} | {gains_of(gain)} |", flush=True)


def gains_of(gain: np.ndarray) -> str:
    mean, low, high = interval(gain, [str(i) for i in range(len(gain))])
    return f"{mean:+.2f} ({low:+.2f}, {high:+.2f})"


def stage_export(work: Path) -> None:
    NOISE.parent.mkdir(parents=True, exist_ok=True)
    NOISE.write_bytes((work / "noise.safetensors").read_bytes())
    print(NOISE.stat().st_size / 1e6, "MB")


def stage_show(work: Path, iterations: int, captions: int) -> None:
    """Plain, one further evaluation (where there is a network), and optimisation of each image; same captions and noises."""
    pipe, reward, second = fast(), ClipScore(), second_reward()
    cases = held_out(captions, 7)
    texts, ids = [c["caption"] for c in cases], [c["id"] for c in cases]
    path = work / "noise.safetensors" if (work / "noise.safetensors").exists() else NOISE
    runs: dict[str, tuple[Any, Any]] = {
        "plain": (RandomSearch(1), None),
        **({"noise network": (RandomSearch(1), noise_network_of(pipe, path))} if path.exists() else {}),
        f"ReNO, {iterations} iterations": (ReNO(iterations=iterations, rate=2.0), None),
    }
    found: dict[str, np.ndarray] = {}
    print("| | reward | held-out reward | right | evaluations | seconds a case | share of the gain |")
    print("|---|---|---|---|---|---|---|")
    for name, (sampler, start) in runs.items():
        began = time.perf_counter()
        out = SteeredPipeline(pipe, sampler, reward, start=start, draft=False, chunk=24)(texts, seed=0, ids=ids)
        if out.interrupted:
            raise KeyboardInterrupt
        seconds = (time.perf_counter() - began) / len(texts)
        best = out.samples[torch.arange(len(texts)), out.chosen].float()
        scores = out.rewards[torch.arange(len(texts)), out.chosen].numpy()
        found[name] = scores
        held = second.score(best, texts, EMBEDDED).numpy() if second else np.zeros(len(texts))
        right = np.array([float(judge(s, t)) for s, t in zip(best, texts, strict=True)])
        cells = ["{:.2f} ({:.2f}, {:.2f})".format(*interval(v, texts)) for v in (scores, held)]
        cells.append("{:.3f} ({:.3f}, {:.3f})".format(*interval(right, texts)))
        print(f"| {name} | {' | '.join(cells)} | {out.ledger.evaluations / len(texts):.1f} | {seconds:.2f} | "
              f"{share(found, name)} |", flush=True)  # fmt: skip


def share(found: dict[str, np.ndarray], name: str) -> str:
    names = list(found)
    if name != names[-1] or len(names) < 3:
        return ""
    plain, network, optimised = (found[n] for n in names)
    draws = np.random.default_rng(0).integers(0, len(plain), (4000, len(plain)))
    ratios = (network - plain)[draws].mean(1) / (optimised - plain)[draws].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return f"network {(network - plain).mean() / (optimised - plain).mean():.2f} ({low:.2f}, {high:.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["scores", "predict", "train", "probe", "export", "show"])
    parser.add_argument("--work", type=Path, default=Path("outputs/noise"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--captions", type=int, default=20, help="a task")
    a = parser.parse_args()
    if a.command == "scores":
        stage_scores(a.work, a.steps)
    elif a.command == "predict":
        stage_predict(a.work, a.steps)
    elif a.command == "train":
        stage_train(a.work, a.steps)
    elif a.command == "probe":
        stage_probe()
    elif a.command == "export":
        stage_export(a.work)
    else:
        stage_show(a.work, a.iterations, a.captions)
