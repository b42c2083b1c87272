"""Trains the noise network of the embedded few-step model: a low-rank change of the frozen generator that moves first noises.

    python scripts/train_noise.py train --work DIR [--steps N]     the network (70 min on a core); resumes
    python scripts/train_noise.py train --work DIR2 --steps 900 --start DIR/noise.safetensors      the second round (20 min)
    python scripts/train_noise.py show --work DIR                  its gain, and that of optimising each image, on 1, 2, 4 steps
    python scripts/train_noise.py show --development --iterations 0 --captions 32      its gain alone, on other captions
    python scripts/train_noise.py export --work DIR                into diffsteer/shapes/weights
    python scripts/train_noise.py probe                            what does the gradient tell, and what one direction? (20 min)

The objective is 0.5 |delta|^2 - scale reward, the reward being the miniature CLIP's score of what the few-step model makes of
the moved noise in one step. Its gradient through all four steps is of no use: it is up to 400 long and says little of what lies
a tenth away; along that of one step the reward rises for a way of two. Long ones are cut all the same: in the first round where
they are rare, in the second nearly all, so that every picture counts the same.
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
from torch import Tensor

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.noise_network import noise_network_of
from diffsteer.rewards import ClipScore
from diffsteer.samplers import RandomSearch, ReNO
from diffsteer.shapes.grammar import TASKS
from diffsteer.shapes.models import NOISE
from diffsteer.shapes.scene import caption, sample_scene
from diffsteer.types import Context

BATCH, RATE, RANK = 32, 2e-3, 16
FIRST, SECOND = (9, 5.0, 30.0), (13, 75.0, 1.0)  # seed, what the reward counts, the longest gradient
CAPTIONS, GRID = 40_000, 4
EMBEDDED = Context(1, 1, True)


def fast() -> Any:
    pipe = load_pipeline("shapes-turbo")
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    return pipe


class Chain:
    """The few-step model as one differentiable function of noise and texts: so many steps of its own scheduler, or its four."""

    def __init__(self, pipe: Any, steps: int | None = None) -> None:
        from diffsteer.backend import DiffusersSession

        self.pipe, options = pipe, {} if steps is None else {"num_inference_steps": steps}
        session = DiffusersSession(pipe, ["a star"], particles=1, seed=0, eta=0.0, own=True, **options)
        self.levels, self.steps = session.levels, session.steps

    def __call__(self, z: Tensor, words: Tensor) -> Tensor:
        x = z
        for at, to in zip(self.levels[:-1], self.levels[1:], strict=True):
            s, t = float(at.sigma / (at.alpha + at.sigma)), float(to.sigma / (to.alpha + to.sigma))
            velocity = self.pipe.unet(x, torch.full((len(x),), 1000 * s), encoder_hidden_states=words).sample
            x = x + (t - s) * velocity
        decoded: Tensor = self.pipe.vae.decode(x).sample
        return (decoded / 2 + 0.5).clamp(0, 1)


def cells_of(z: Tensor) -> Tensor:
    """The coarse noise, of unit deviation."""
    return F.adaptive_avg_pool2d(z, GRID) * (z.shape[-1] / GRID)


def words_of(network: Any, texts: list[str]) -> Tensor:
    """What the few-step model attends to, (N, L, D)."""
    with torch.no_grad():
        return torch.cat([network.encode(texts[i : i + 512]) for i in range(0, len(texts), 512)])


def captions() -> list[str]:
    """Those of the first scenes that the models were trained on."""
    return [caption(sample_scene(TASKS[i % len(TASKS)], np.random.default_rng((1, i)), pairs="seen")) for i in range(CAPTIONS)]


def stage_train(work: Path, steps: int, start: Path | None) -> None:
    """Follows the reward's gradient at the moved noise, which is cut where it is long, and none through the generator's own
    weights."""
    work.mkdir(parents=True, exist_ok=True)
    seed, scale, longest = FIRST if start is None else SECOND
    torch.manual_seed(seed)
    pipe, reward, texts = fast(), ClipScore("shapes"), captions()
    network = noise_network_of(pipe, start, RANK)
    network.changes.requires_grad_(True)
    chain = Chain(pipe, 1)

    def loss_of(step: int) -> Tensor:
        rows = np.random.default_rng((seed, step)).integers(0, len(texts), BATCH)
        mine = [texts[i] for i in rows]
        z = torch.randn(BATCH, 4, 16, 16, generator=torch.Generator().manual_seed(seed * 10**6 + step))
        delta = network.delta(z, mine)
        moved = (z + delta).detach().requires_grad_(True)
        rewards = reward.score(chain(moved, words_of(network, mine)), mine, EMBEDDED)
        (slope,) = torch.autograd.grad(rewards.sum(), moved)
        slope *= (longest / slope.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
        square = delta.square().flatten(1).sum(1)
        if step % 25 == 0:
            print(f"step {step}: reward {rewards.mean().item():.2f}, |delta|^2 {square.mean().item():.2f}", flush=True)
        return (0.5 * square - scale * (slope * delta).flatten(1).sum(1)).mean()

    train("noise", work, network, loss_of, steps, RATE)
    network.load_state_dict(torch.load(work / "noise.ckpt", weights_only=True)["average"])
    network.save(work / "noise.safetensors")


def stage_slopes() -> None:
    """How far does the gradient at a noise tell the reward, through 1, 2 and 4 steps? 64 captions, steps along it."""
    pipe, reward = fast(), ClipScore("shapes")
    texts = [c["caption"] for c in held_out(11, 6)][:64]
    words = words_of(noise_network_of(pipe), texts)
    z = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(5)).requires_grad_(True)
    print("| through | length of the gradient: median (5 %, 95 %) | length of the step | gain (95 %) |")
    print("|---|---|---|---|")
    for steps in (1, 2, 4):
        chain = Chain(pipe, steps)
        before = reward.score(chain(z, words), texts, EMBEDDED)
        (slope,) = torch.autograd.grad(before.sum(), z)
        lengths = slope.flatten(1).norm(dim=1)
        low, middle, high = lengths.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        for length in (0.1, 1.0, 2.0):
            with torch.no_grad():
                after = reward.score(chain(z + length * slope / lengths.view(-1, 1, 1, 1), words), texts, EMBEDDED)
            told = gains_of((after - before.detach()).double().numpy())
            print(f"| {steps} | {middle:.0f} ({low:.0f}, {high:.0f}) | {length} | {told} |", flush=True)


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
    for text in texts[:6]:
        rewards, x = scores(made, [text] * len(made)), cells_of(made).flatten(1).double()
        slope = torch.linalg.solve(x.T @ x + 300 * torch.eye(x.shape[1]).double(), x.T @ (rewards - rewards.mean()))
        shift = F.interpolate((slope / slope.norm()).view(1, 4, GRID, GRID) * GRID / 16, (16, 16)).float()  # of length one
        before = scores(fresh, [text] * len(fresh))
        for length in (2.0, 4.0, 6.0):
            gain = (scores(fresh + length * shift, [text] * len(fresh)) - before).numpy()
            print(f"| {text} | {length:.0f} | {gains_of(gain)} |", flush=True)
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


def stage_show(work: Path, iterations: int, captions: int, development: bool) -> None:
    """Plain, one further evaluation (where there is a network), and optimisation of each image; same captions and noises."""
    pipe, reward, second = fast(), ClipScore(), second_reward()
    cases = held_out(captions, 6 if development else 7)
    texts, ids = [c["caption"] for c in cases], [c["id"] for c in cases]
    path = work / "noise.safetensors" if (work / "noise.safetensors").exists() else NOISE
    runs: dict[str, tuple[Any, Any]] = {
        "plain": (RandomSearch(1), None),
        **({"noise network": (RandomSearch(1), noise_network_of(pipe, path))} if path.exists() else {}),
        **({f"ReNO, {iterations} iterations": (ReNO(iterations=iterations, rate=2.0), None)} if iterations else {}),
    }
    print("| steps | | reward | held-out reward | right | gain | held-out gain | evaluations | seconds a case | share |")
    print("|" + "---|" * 10)
    for steps in (1, 2, 4):
        found: dict[str, np.ndarray] = {}
        found_held: dict[str, np.ndarray] = {}
        for name, (sampler, start) in runs.items():
            began = time.perf_counter()
            steered = SteeredPipeline(pipe, sampler, reward, start=start, draft=False, chunk=24)
            out = steered(texts, num_inference_steps=steps, seed=0, ids=ids)
            if out.interrupted:
                raise KeyboardInterrupt
            seconds = (time.perf_counter() - began) / len(texts)
            best = out.samples[torch.arange(len(texts)), out.chosen].float()
            scores = out.rewards[torch.arange(len(texts)), out.chosen].numpy()
            found[name] = scores
            held = second.score(best, texts, EMBEDDED).numpy() if second else np.zeros(len(texts))
            found_held[name] = held
            right = np.array([float(judge(s, t)) for s, t in zip(best, texts, strict=True)])
            cells = ["{:.2f} ({:.2f}, {:.2f})".format(*interval(v, texts)) for v in (scores, held)]
            cells.append("{:.3f} ({:.3f}, {:.3f})".format(*interval(right, texts)))
            cells += [gains_of(f[name] - f["plain"]) for f in (found, found_held)]
            print(f"| {steps} | {name} | {' | '.join(cells)} | {out.ledger.evaluations / len(texts):.1f} | {seconds:.2f} | "
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
    parser.add_argument("command", choices=["train", "show", "export", "probe"])
    parser.add_argument("--work", type=Path, default=Path("outputs/noise"))
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--captions", type=int, default=5, help="a task")
    a = parser.parse_args()
    if a.command == "train":
        stage_train(a.work, a.steps, a.start)
    elif a.command == "show":
        stage_show(a.work, a.iterations, a.captions, a.development)
    elif a.command == "export":
        stage_export(a.work)
    else:
        stage_slopes()
        stage_probe()
