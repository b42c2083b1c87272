"""The numbers of the embedded models' card: what they score, and how well the checker agrees with an eye.

python scripts/card_shapes.py sheets --out DIR        200 generated pictures on contact sheets, to be labelled by eye
python scripts/card_shapes.py agree --out DIR         the labels (scripts/labels.json) against the checker
python scripts/card_shapes.py model                   600 held-out cases, by task, seen and unseen pairs
python scripts/card_shapes.py clip                    right caption against one changed attribute, 3,000 clean renders
python scripts/card_shapes.py alike                   the few-step model against the first one, from the same noise
python scripts/card_shapes.py autoencoder             the checker after the autoencoder's round trip

The first three take --model shapes | shapes-flow.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import torch
from bench_quality import held_out, interval, judge, seen
from PIL import Image, ImageDraw
from shapes_clips import rearranged
from train_shapes import ENCODED, SCENES

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.rewards import ClipScore
from diffsteer.samplers import BestOfN
from diffsteer.shapes import TASKS, caption, check, one_attribute_changed, render, sample_scene
from diffsteer.shapes.models import MODELS
from diffsteer.types import Context

LABELS = Path(__file__).resolve().parent / "labels.json"
TRAINED_ON = {"shapes": ENCODED, "shapes-flow": SCENES}
LABELLED, COLUMNS, ROWS, CELL = 200, 10, 5, 128


def sheets(out: Path, model: str) -> None:
    """Pictures of the plain chain for captions of a stream that nothing else uses."""
    out.mkdir(parents=True, exist_ok=True)
    cases = held_out(LABELLED // len(TASKS) + 1, 9)[:LABELLED]
    texts = [c["caption"] for c in cases]
    drawn = SteeredPipeline(load_pipeline(model), BestOfN(1), chunk=50)(texts, seed=0, ids=[c["id"] for c in cases])
    np.savez_compressed(out / "pictures.npz", pictures=np.stack([np.asarray(i) for i in drawn.images or []]))
    (out / "captions.json").write_text(json.dumps(texts, indent=0))
    for s in range(0, LABELLED, COLUMNS * ROWS):
        sheet = Image.new("RGB", (COLUMNS * (CELL + 6), ROWS * (CELL + 30)), "white")
        draw = ImageDraw.Draw(sheet)
        for i in range(s, min(s + COLUMNS * ROWS, LABELLED)):
            x, y = (i - s) % COLUMNS * (CELL + 6), (i - s) // COLUMNS * (CELL + 30)
            sheet.paste((drawn.images or [])[i].resize((CELL, CELL), Image.Resampling.NEAREST), (x, y + 27))
            words = f"{i} {texts[i]}".split()
            draw.text((x, y), " ".join(words[:5]), fill="black", font_size=11)
            draw.text((x, y + 12), " ".join(words[5:]), fill="black", font_size=11)
        sheet.save(out / f"sheet_{s // (COLUMNS * ROWS)}.png")


def agree(out: Path, model: str) -> None:
    """The confusion table of the checker against the eye."""
    labels = json.loads(LABELS.read_text())[model]
    texts = json.loads((out / "captions.json").read_text())
    wrong = set(labels["wrong"])
    eye = np.array([i not in wrong for i in range(LABELLED)])
    verdicts = [check(p, t) for p, t in zip(np.load(out / "pictures.npz")["pictures"], texts, strict=True)]
    said = np.array([v.correct for v in verdicts])
    print("| | checker: right | checker: wrong |\n|---|---|---|")
    for name, row in (("eye: right", eye), ("eye: wrong", ~eye)):
        print(f"| {name} | {(row & said).sum()} | {(row & ~said).sum()} |")
    print(f"\nagreement {np.mean(eye == said):.3f}")
    for i in np.flatnonzero(eye != said):
        print(f"{i} {texts[i]!r}: eye {'right' if eye[i] else 'wrong'}, checker {verdicts[i].reasons or 'right'}")


def scores(out: Path, model: str) -> None:
    """Accuracy of the plain chain and of the native solver by the checker."""
    pipe, cases = load_pipeline(model), held_out(100, 7)
    texts = [c["caption"] for c in cases]
    trained = training_captions(TRAINED_ON[model])
    for name, eta in (("plain chain (eta 1)", 1.0), ("native ODE solver", 0.0)):
        drawn = SteeredPipeline(pipe, BestOfN(1, eta=eta), chunk=50)(texts, seed=0, ids=[c["id"] for c in cases])
        right = np.array([judge(s[0].float(), t) for s, t in zip(drawn.samples, texts, strict=True)], dtype=float)
        mean, low, high = interval(right, texts)
        print(f"{name}: {mean:.3f} ({low:.3f}, {high:.3f})")
        for task in TASKS:
            mine = np.array([c["task"] == task for c in cases])
            print(f"  {task}: {right[mine].mean():.2f}")
        known = np.array([seen(t) for t in texts])
        print(f"  seen pairs {right[known].mean():.2f} ({known.sum()}), unseen {right[~known].mean():.2f} ({(~known).sum()})")
        new = np.array([t not in trained for t in texts])
        print(f"  {new.sum()} of the {len(texts)} captions are unseen themselves: {right[new].mean() if new.any() else 0:.2f}")


@functools.cache
def training_captions(count: int) -> set[str]:
    """Every caption that a painter was trained on, drawn again."""
    rngs = (np.random.default_rng((1, i)) for i in range(count))
    return {caption(sample_scene(TASKS[i % len(TASKS)], rng, pairs="seen")) for i, rng in enumerate(rngs)}


def clip(out: Path, model: str, count: int = 3000) -> None:
    """How often the right caption scores above one with a single attribute changed."""
    reward, wins, by_pair = ClipScore(), [], []
    for start in range(0, count, 100):
        rngs = [np.random.default_rng((10, i)) for i in range(start, start + 100)]
        scenes = [sample_scene(TASKS[i % len(TASKS)], rng) for i, rng in enumerate(rngs)]
        x = torch.stack([torch.from_numpy(np.array(render(s))).permute(2, 0, 1) / 255 for s in scenes])
        right = [caption(s) for s in scenes]
        changed = [one_attribute_changed(s.statement) for s in scenes]
        wrong = [str(c[rng.integers(len(c))]) for c, rng in zip(changed, rngs, strict=True)]
        with torch.no_grad():
            higher = reward.score(x, right, Context(embedded=True)) > reward.score(x, wrong, Context(embedded=True))
        wins += higher.tolist()
        by_pair += [seen(t) for t in right]
    won, known = np.array(wins), np.array(by_pair)
    print(f"right caption preferred: {won.mean():.3f}; seen pairs {won[known].mean():.3f}, unseen {won[~known].mean():.3f}")
    for task, name in (("position", "another relation, or the two in another order"), ("color_attr", "colours swapped")):
        scenes = [sample_scene(task, np.random.default_rng((12, i))) for i in range(count // 10)]
        shown = [(s, str(other)) for s in scenes for other in rearranged(s.statement)]
        x = torch.stack([torch.from_numpy(np.array(render(s))).permute(2, 0, 1) / 255 for s, _ in shown])
        right = [caption(s) for s, _ in shown]
        with torch.no_grad():
            higher = reward.score(x, right, Context(embedded=True)) > reward.score(
                x, [o for _, o in shown], Context(embedded=True)
            )
        print(f"{name}: {higher.float().mean():.3f} of {len(shown)}")


def alike(out: Path, model: str) -> None:
    """The few-step model's pictures and the first model's deterministic ones, of the same noise: how alike, and how right."""
    cases = held_out(20, 7)
    texts, ids, drawn = [c["caption"] for c in cases], [c["id"] for c in cases], {}
    for name in ("shapes", "shapes-turbo"):
        made = SteeredPipeline(load_pipeline(name), BestOfN(1, eta=0.0), ClipScore(), chunk=48)(texts, seed=0, ids=ids)
        right = np.array([judge(s[0].float(), t) for s, t in zip(made.samples, texts, strict=True)], dtype=float)
        print(f"{name}: right {{:.3f}} ({{:.3f}}, {{:.3f}})".format(*interval(right, texts)))
        drawn[name] = made
    one, other = drawn["shapes"], drawn["shapes-turbo"]
    squares = (one.latents - other.latents).square().flatten(1).mean(1).numpy()
    pixels = (one.samples - other.samples).abs().flatten(1).mean(1).numpy()
    print(
        "squared difference of latents {:.3f} ({:.3f}, {:.3f})".format(*interval(squares, texts)), f"of {one.latents.var():.2f}"
    )
    print("difference of pixels {:.3f} ({:.3f}, {:.3f})".format(*interval(pixels, texts)))
    scores = torch.stack([one.rewards[:, 0], other.rewards[:, 0]])
    picks = np.random.default_rng(0).integers(0, len(texts), (4000, len(texts)))
    low, high = np.quantile([np.corrcoef(scores[:, p].numpy())[0, 1] for p in picks], [0.025, 0.975])
    print(f"correlation of CLIP's scores {float(torch.corrcoef(scores)[0, 1]):.3f} ({low:.3f}, {high:.3f})")


def autoencoder(out: Path, model: str, count: int = 3000) -> None:
    """Rejected right captions and accepted wrong ones after encoding and decoding clean renders."""
    pipe, rejected, accepted = load_pipeline("shapes"), 0, 0
    for start in range(0, count, 100):
        rngs = [np.random.default_rng((11, i)) for i in range(start, start + 100)]
        scenes = [sample_scene(TASKS[i % len(TASKS)], rng) for i, rng in enumerate(rngs)]
        x = torch.stack([torch.from_numpy(np.array(render(s))).permute(2, 0, 1) / 255 for s in scenes])
        with torch.no_grad():
            y = pipe.vae.decode(pipe.vae.encode(x * 2 - 1).latent_dist.mode()).sample
        for scene, image, rng in zip(scenes, (y / 2 + 0.5).clamp(0, 1), rngs, strict=True):
            changed = one_attribute_changed(scene.statement)
            rejected += not judge(image, caption(scene))
            accepted += judge(image, str(changed[rng.integers(len(changed))]))
    print(f"after the round trip: {rejected}/{count} right captions rejected, {accepted}/{count} changed captions accepted")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"sheets": sheets, "agree": agree, "model": scores, "clip": clip, "alike": alike, "autoencoder": autoencoder}
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--out", type=Path, default=Path("outputs/card"))
    parser.add_argument("--model", choices=MODELS, default="shapes")
    arguments = parser.parse_args()
    stages[arguments.stage](arguments.out, arguments.model)
