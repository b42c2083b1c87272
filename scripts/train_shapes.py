"""Trains the embedded shapes models, stage by stage, and saves them in diffusers' and open_clip's own formats.

    python scripts/train_shapes.py data --work DIR      render the training scenes          (2 min)
    python scripts/train_shapes.py vae --work DIR       the autoencoder                     (15 min on one core)
    python scripts/train_shapes.py latents --work DIR   encode the scenes, fold the scaling (3 min)
    python scripts/train_shapes.py decoder --work DIR   polish the decoder                  (10 min on one core)
    python scripts/train_shapes.py unet --work DIR      text encoder and UNet               (60 min on one core)
    python scripts/train_shapes.py clip --work DIR      the miniature CLIP                  (40 min on one core)
    python scripts/train_shapes.py clip2 --work DIR     a second, smaller one              (30 min on one core)
    python scripts/train_shapes.py export --work DIR    fp16 safetensors into diffsteer/shapes/weights

Every stage keeps a checkpoint in DIR and goes on from it when it is started again; batches are keyed by the step, so an
interrupted training sees what an undisturbed one sees. Set OMP_NUM_THREADS=1 and run `vae` and `clip` side by side.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from shapes_networks import CLIPS, SCHEDULE, Painter, make_clip, make_vae
from torch import Tensor, nn

from diffsteer.shapes.grammar import COLORS, SHAPES, TASKS, Statement, one_attribute_changed, parse
from diffsteer.shapes.models import WEIGHTS
from diffsteer.shapes.scene import Scene, caption, describes, render, sample_scene, scene_of
from diffsteer.shapes.tokenizer import CONTEXT, make_tokenizer

SCENES, ENCODED = 80_000, 48_000  # the autoencoder sees all, the painter the first of them
VAE_STEPS, SHARP_STEPS, DECODER_STEPS = 3_000, 4_500, 3_000
CLIP_STEPS = 5_000


@functools.cache
def load_tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def tokenize(folder: Path, captions: list[str]) -> Tensor:
    batch = load_tokenizer(folder)(captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    return batch.input_ids


# ----------------------------------------------------------------------------------------------------- the training


def train(
    name: str, work: Path, model: nn.Module, loss_of: Callable[[int], Tensor], steps: int, lr: float, decay: float = 0.999
) -> nn.Module:
    """AdamW with a one-cycle rate; returns the weights averaged (exponentially) over the second half."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    average, path = copy.deepcopy(model), work / f"{name}.ckpt"
    start, seconds = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start, seconds = saved["step"], saved["seconds"]
    model.train()
    clock, recent, saved_at = time.time() - seconds, [], time.time()
    for step in range(start, steps):
        torch.manual_seed(step)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            keep = decay if step > steps // 2 else 0.0
            for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                a.lerp_(b, 1 - keep) if a.is_floating_point() else a.copy_(b)
        recent = [*recent[-99:], loss.item()]
        if step % 100 == 99 or step + 1 == steps:
            print(f"{name} {step + 1}/{steps} loss {np.mean(recent):.4f} {time.time() - clock:.0f} s", flush=True)
        if time.time() - saved_at > 120 or step + 1 == steps:
            saved_at = time.time()
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "step": step + 1,
                "seconds": time.time() - clock,
            }
            torch.save(
                state | {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, path.with_suffix(".new")
            )
            path.with_suffix(".new").replace(path)
    return average.eval()


def pixels(images: list[np.ndarray] | np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).float() / 255


def stage_data(work: Path) -> None:
    images = np.lib.format.open_memmap(work / "images.npy", "w+", np.uint8, (SCENES, 64, 64, 3))
    captions = []
    for i in range(SCENES):
        scene = sample_scene(TASKS[i % len(TASKS)], np.random.default_rng((1, i)), pairs="seen")
        images[i] = np.asarray(render(scene))
        captions.append(caption(scene))
    (work / "captions.txt").write_text("\n".join(captions))


def stage_vae(work: Path) -> None:
    """Two rounds: all pixels alike, then smaller batches in which objects weigh more than the plain background."""
    torch.manual_seed(1)
    images, vae = np.load(work / "images.npy", mmap_mode="r"), make_vae()

    def loss_with(batch: int, emphasis: float, kl_weight: float) -> Callable[[int], Tensor]:
        def loss_of(step: int) -> Tensor:
            rows = np.random.default_rng((2, batch, step)).integers(0, len(images), batch)
            x = pixels(images[np.sort(rows)]) * 2 - 1
            with torch.autocast("cpu", dtype=torch.bfloat16):
                posterior = vae.encode(x).latent_dist
                y = vae.decode(posterior.sample()).sample
            error = y.float() - x
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
            background = x.flatten(2).median(2).values[:, :, None, None]
            weight = 1 + emphasis * ((x - background).abs().amax(1, keepdim=True) > 0.1)
            return (weight * (error.abs() + error.square())).mean() + kl_weight * kl.mean()

        return loss_of

    vae.load_state_dict(train("vae", work, vae, loss_with(16, 0.0, 5e-4), VAE_STEPS, 2e-3).state_dict())
    torch.save(train("vae_sharp", work, vae, loss_with(8, 4.0, 1e-4), SHARP_STEPS, 1.5e-3).state_dict(), work / "vae.pt")


@torch.no_grad()
def stage_latents(work: Path) -> None:
    """Encode all scenes; then fold the per-channel normalisation into the 1x1 convolutions around the latents."""
    images, vae = np.load(work / "images.npy", mmap_mode="r"), make_vae().eval()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
    chunks = [images[i : i + 100] for i in range(0, ENCODED, 100)]
    z = torch.cat([vae.encode(pixels(c) * 2 - 1).latent_dist.mean for c in chunks])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    print("latent mean", mean.tolist(), "std", std.tolist())
    w, b = vae.quant_conv.weight, vae.quant_conv.bias
    w[:4] /= std[:, None, None, None]
    b[:4] = (b[:4] - mean) / std
    b[4:] -= 2 * std.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
    torch.save(vae.state_dict(), work / "vae_folded.pt")
    torch.save(((z - mean[:, None, None]) / std[:, None, None]).half(), work / "latents.pt")


def stage_decoder(work: Path) -> None:
    """Polish the decoder alone; the latents are frozen. Gray backgrounds, which have the least contrast, come more often."""
    latents, vae = torch.load(work / "latents.pt", weights_only=True), make_vae()
    images = np.load(work / "images.npy", mmap_mode="r")[: len(latents)]
    vae.load_state_dict(torch.load(work / "vae_folded.pt", weights_only=True))
    gray = np.flatnonzero((images[:, 0, 0].astype(int).mean(1) > 100) & (images[:, 0, 0].astype(int).mean(1) < 160))
    reader = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((4, step))
        rows = np.sort(np.concatenate([rng.choice(gray, 5), rng.integers(0, len(latents), 3)]))
        x = pixels(images[rows]) * 2 - 1
        z = latents[torch.from_numpy(rows)].float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = reader["decoder"](reader["post_quant_conv"](z + 0.02 * torch.randn_like(z)))
        error = y.float() - x
        weight = 1 + 6 * ((x - x.flatten(2).median(2).values[:, :, None, None]).abs().amax(1, keepdim=True) > 0.1)
        return (weight * (error.abs() + error.square())).mean()

    weights = train("decoder", work, reader, loss_of, DECODER_STEPS, 1e-3).state_dict()
    torch.save(vae.state_dict() | weights, work / "vae_final.pt")


def stage_unet(work: Path) -> None:
    """Four rounds. Backgrounds, colours and places are decided at the highest noise levels, of which Stable Diffusion's
    schedule has few and which count little in the loss of the noise: the later rounds take DDPM's and let them count more."""
    from diffusers import DDIMScheduler

    torch.manual_seed(2)
    if not (work / "tokenizer").exists():
        make_tokenizer().save_pretrained(work / "tokenizer")
    ids = tokenize(work / "tokenizer", (work / "captions.txt").read_text().split("\n")[:ENCODED])
    empty = tokenize(work / "tokenizer", [""])
    latents, painter = torch.load(work / "latents.pt", weights_only=True), Painter(int(ids.max()) + 1)

    def loss_with(schedule: dict[str, Any], heaviest: float, batch: int, offset: int) -> Callable[[int], Tensor]:
        noising = DDIMScheduler(**schedule)
        weights = (1 / noising.alphas_cumprod).clamp(max=heaviest)
        weights /= weights.mean()

        def loss_of(step: int) -> Tensor:
            rng = torch.Generator().manual_seed(offset + step)
            rows = torch.randint(len(latents), (batch,), generator=rng)
            x, noise = latents[rows].float(), torch.randn(batch, 4, 16, 16, generator=rng)
            t = torch.randint(1000, (batch,), generator=rng)
            words = torch.where(torch.rand(batch, 1, generator=rng) < 0.1, empty, ids[rows])
            error = painter(noising.add_noise(x, noise, t), t, words) - noise
            return (weights[t] * error.square().mean((1, 2, 3))).mean()

        return loss_of

    stable = SCHEDULE | {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for name, loss_of, steps, lr in (
        ("unet", loss_with(stable, 1.0, 48, 0), 7_000, 2e-3),
        ("unet_noisy", loss_with(SCHEDULE, 30.0, 48, 10**6), 4_000, 1.5e-3),
        ("unet_long", loss_with(SCHEDULE, 30.0, 64, 2 * 10**6), 9_000, 1.5e-3),
        ("unet_dark", loss_with(SCHEDULE, 300.0, 64, 3 * 10**6), 3_000, 1e-3),
    ):
        painter.load_state_dict(train(name, work, painter, loss_of, steps, lr).state_dict())
        torch.save(painter.state_dict(), work / f"{name}.pt")


def degrade(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the images blurred, faded and noised, as halfway through a sampling. (N, 3, 64, 64) in [0, 1]."""
    out = []
    for image in x:
        if rng.random() < 0.4:
            small = int(rng.choice([12, 16, 24, 32]))
            image = F.interpolate(F.interpolate(image[None], size=small, mode="area"), size=64, mode="bilinear")[0]
        if rng.random() < 0.3:
            image = image.mean((1, 2), keepdim=True).lerp(image, float(rng.uniform(0.5, 1)))
        if rng.random() < 0.4:
            grain = torch.randn(1, 3, *(int(rng.choice([16, 32, 64])),) * 2)
            image = image + float(rng.uniform(0.02, 0.15)) * F.interpolate(grain, size=64, mode="bilinear")[0]
        out.append(image.clamp(0, 1))
    return torch.stack(out)


def rearranged(statement: Statement) -> list[Statement]:
    """What says something else in nearly the same words, which a bag of words cannot tell: another relation, or a swap."""
    words = sorted(str(statement).split())
    others = one_attribute_changed(statement)
    found = [o for o in others if o.relation != statement.relation or sorted(str(o).split()) == words]
    return [*found, replace(statement, groups=statement.groups[::-1])] if statement.relation else found


def with_negatives(scenes: list[Scene], rng: np.random.Generator, hard: bool = False) -> list[str]:
    """The scenes' captions, then for each scene three that differ from its own in one attribute; with `hard` up to two of them
    rearranged, and a fourth."""
    texts = [caption(s) for s in scenes]
    for scene in scenes:
        others, moved = one_attribute_changed(scene.statement), rearranged(scene.statement) if hard else []
        chosen = [str(moved[i]) for i in rng.permutation(len(moved))[:2]]
        texts += chosen + [str(others[i]) for i in rng.permutation(len(others))[: 3 + hard - len(chosen)]]
    return texts


def twins(pairs: int, rng: np.random.Generator, hard: bool = False, tasks: Sequence[str] = TASKS) -> list[Scene]:
    """`pairs` scenes, each followed by one that differs in a single attribute; with `hard` every other one is rearranged."""
    scenes = []
    for i in range(pairs):
        scene = sample_scene(tasks[i % len(tasks)], rng, pairs="seen")
        moved = rearranged(scene.statement) if hard and rng.random() < 0.5 else []
        others = moved or one_attribute_changed(scene.statement)
        scenes += [scene, scene_of(others[rng.integers(len(others))], rng)]
    return scenes


def described(statements: list[Statement], scenes: list[Scene]) -> Tensor:
    """(scenes, statements): which statements are true of which scenes."""
    named = [frozenset(g.shape for g in s.groups) for s in statements]
    rows = []
    for scene in scenes:
        there = frozenset(t.shape for t in scene.things)
        rows.append([n <= there and describes(s, scene) for s, n in zip(statements, named, strict=True)])
    return torch.tensor(rows)


PLACED = (*SHAPES, *COLORS)
LIES = {"left of": (-0.4, None), "right of": (0.4, None), "above": (None, -0.4), "below": (None, 0.4)}


def places(said: list[tuple[str, str | None, tuple[float | None, float | None]]]) -> list[list[tuple[float, float]]]:
    """Where each shape and each colour lies, x and y in [-1, 1]; nan where that is unknown or there are several."""
    found: dict[str, list[tuple[float | None, float | None]]] = {}
    for shape, color, place in said:
        for word in (shape, color):
            found.setdefault(word or "", []).append(place)
    nan = float("nan")
    return [tuple(nan if v is None else v for v in found[w][0]) if len(found.get(w, ())) == 1 else (nan, nan) for w in PLACED]


def places_of(scene: Scene) -> list[list[tuple[float, float]]]:
    return places([(t.shape, t.color, (t.x / 32 - 1, t.y / 32 - 1)) for t in scene.things])


def places_told(statement: Statement) -> list[list[tuple[float, float]]]:
    if not statement.relation:
        return places([])
    first, second = statement.groups
    lies = LIES[statement.relation]
    return places([(first.shape, first.color, lies), (second.shape, second.color, tuple(v and -v for v in lies))])


def misplaced(head: nn.Module, embeddings: Tensor, at: list[list[tuple[float, float]]]) -> Tensor:
    """The squared error of where `head` reads the shapes and colours in the embeddings."""
    told = torch.tensor(at).flatten(1)
    known = ~told.isnan()
    return (head(10 * embeddings) - told)[known].square().mean()


def contrast(
    clip: nn.Module,
    folder: Path,
    images: Tensor,
    scenes: list[Scene],
    texts: list[str],
    own: float = 0.0,
    where: nn.Module | None = None,
) -> Tensor:
    """CLIP's loss; `images` (N, 3, 64, 64) in [0, 1] show `scenes`, whose captions lead `texts`, then come as many negatives of
    each. `own` weighs a loss of its own for each caption among its negatives alone, where order and relation decide; `where` is
    a head that must read from either embedding what lies where, without which the images' embedding never learns it."""
    statements = [parse(text) for text in texts]
    true = described(statements, scenes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image = clip.encode_image((images - 0.5) / 0.5).float()
    image, text = F.normalize(image, dim=-1), F.normalize(clip.encode_text(tokenize(folder, texts)), dim=-1)
    logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
    logits = logits.masked_fill(true & ~torch.eye(*logits.shape, dtype=torch.bool), -1e4)  # another true caption is no negative
    n = len(scenes)
    loss = (F.cross_entropy(logits, torch.arange(n)) + F.cross_entropy(logits[:, :n].T, torch.arange(n))) / 2
    if own:
        row = torch.arange(n)
        among = torch.cat([logits[row, row][:, None], logits[:, n:].view(n, n, -1)[row, row]], 1)
        loss = loss + own * F.cross_entropy(among, torch.zeros(n, dtype=torch.long))
    if where is not None:
        loss = loss + 4 * misplaced(where, image, [places_of(s) for s in scenes])
        loss = loss + 4 * misplaced(where, text, [places_told(s) for s in statements])
    return loss


def stage_clip(work: Path, name: str = "clip") -> None:
    torch.manual_seed(CLIPS[name]["stream"])
    clip = make_clip(work / name, name)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((CLIPS[name]["stream"], step))
        scenes = twins(32, rng)
        texts = with_negatives(scenes, rng)
        images = degrade(pixels([np.asarray(render(s)) for s in scenes]), rng)
        return contrast(clip, work / name, images, scenes, texts)

    torch.save(train(name, work, clip, loss_of, CLIP_STEPS, 1e-3).state_dict(), work / f"{name}.pt")


def stage_clip_halfway(work: Path) -> None:
    """The CLIP that steers also learns to read what it will be shown: a painter's decoded estimates of x0 from noised latents.

    The painter is asked for the scene's caption, for one with an attribute changed, or for nothing; the right answer stays the
    scene. Four rounds, and one between: with the painter as it is after its second round; with that of the third, and with
    negatives that a bag of words cannot tell from the caption; with a loss for those alone, more clean pictures and more of the
    captions that have an order, which taught it whose colour is whose. Since it stayed blind to left and right, both towers
    then learn to tell a throw-away head where things lie, at first that alone, and then beside the third round's loss.
    """
    from diffusers import DDIMScheduler

    clip, vae = make_clip(work / "clip", "clip"), make_vae().eval()
    clip.load_state_dict(torch.load(work / "clip.pt", weights_only=True))
    vae.load_state_dict(torch.load(work / "vae_final.pt", weights_only=True))
    latents, alphas = torch.load(work / "latents.pt", weights_only=True), DDIMScheduler(**SCHEDULE).alphas_cumprod

    @torch.no_grad()
    def halfway(painter: nn.Module, rows: list[int], scenes: list[Scene], rng: np.random.Generator) -> Tensor:
        asked = []
        for scene, kind in zip(scenes, rng.integers(3, size=len(scenes)), strict=True):
            others = one_attribute_changed(scene.statement)
            asked.append(("", caption(scene), str(others[rng.integers(len(others))]))[kind])
        t = torch.from_numpy(rng.integers(0, 700, len(rows)))
        a, x = alphas[t][:, None, None, None], latents[rows].float()
        x = a.sqrt() * x + (1 - a).sqrt() * torch.randn_like(x)
        x0 = (x - (1 - a).sqrt() * painter(x, t, tokenize(work / "tokenizer", asked))) / a.sqrt()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (vae.decode(x0).sample.float() / 2 + 0.5).clamp(0, 1)

    def loss_with(
        painter_of: str, stream: int, hard: bool, painted: int = 40, own: float = 0.0, where: nn.Module | None = None
    ) -> Callable[[int], Tensor]:
        weights = torch.load(work / f"{painter_of}.pt", weights_only=True)
        painter = Painter(len(weights["text_encoder.embeddings.token_embedding.weight"])).eval()
        painter.load_state_dict(weights)

        def loss_of(step: int) -> Tensor:
            rng = np.random.default_rng((stream, step))
            rows = rng.integers(0, len(latents), painted).tolist()
            if own:  # two of three of the tasks whose captions have an order
                rows = [i - i % 6 + int(rng.integers(4, 6)) if rng.random() < 0.6 else i for i in rows if i < len(latents) - 6]
            drawn = [sample_scene(TASKS[i % len(TASKS)], np.random.default_rng((1, i)), pairs="seen") for i in rows]
            scenes = twins((64 - painted) // 2, rng, hard, ("position", "color_attr", *TASKS) if own else TASKS)
            clean = degrade(pixels([np.asarray(render(s)) for s in scenes]), rng)
            texts = with_negatives([*drawn, *scenes], rng, hard)
            images = torch.cat([halfway(painter, rows, drawn, rng), clean])
            return contrast(clip, work / "clip", images, [*drawn, *scenes], texts, own, where)

        return loss_of

    for name, loss_of, steps, lr in (
        ("clip_halfway", loss_with("unet_noisy", 13, False), 2_000, 5e-4),
        ("clip_hard", loss_with("unet_long", 14, True), 3_000, 5e-4),
        ("clip_order", loss_with("unet_dark", 15, True, 24, 1.0), 5_000, 1e-3),
    ):
        clip.load_state_dict(train(name, work, clip, loss_of, steps, lr).state_dict())
        torch.save(clip.state_dict(), work / f"{name}.pt")
    parts = nn.ModuleDict({"clip": clip, "where": nn.Linear(96, 2 * len(PLACED))})

    def loss_of_places(step: int) -> Tensor:
        rng = np.random.default_rng((17, step))
        scenes = [sample_scene("position", rng, pairs="seen") for _ in range(64)]
        image = F.normalize(clip.encode_image((pixels([np.asarray(render(s)) for s in scenes]) - 0.5) / 0.5), dim=-1)
        text = F.normalize(clip.encode_text(tokenize(work / "clip", [caption(s) for s in scenes])), dim=-1)
        seen = misplaced(parts["where"], image, [places_of(s) for s in scenes])
        return 8 * seen + 4 * misplaced(parts["where"], text, [places_told(s.statement) for s in scenes])

    parts.load_state_dict(train("clip_where", work, parts, loss_of_places, 1_200, 1e-3).state_dict())
    parts.load_state_dict(
        train("clip_place", work, parts, loss_with("unet_dark", 16, True, 24, 1.0, parts["where"]), 1_500, 1e-3).state_dict()
    )
    torch.save(clip.state_dict(), work / "clip_place.pt")


def stage_clip2(work: Path) -> None:
    stage_clip(work, "clip2")


# ------------------------------------------------------------------------------------------------------- the saving


def stage_export(work: Path, out: Path = WEIGHTS) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from safetensors.torch import save_file
    from transformers import CLIPTokenizer

    vae, ids = make_vae(), tokenize(work / "tokenizer", [""])
    vae.load_state_dict(torch.load(work / "vae_final.pt", weights_only=True))
    painter = Painter(int(ids.max()) + 1)
    painter.load_state_dict(torch.load(work / "unet_dark.pt", weights_only=True))
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=painter.text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=painter.unet,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(out / "sd", ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(out / "sd", safe_serialization=True)
    config = out / "sd" / "text_encoder" / "config.json"
    # A plain load would keep the stored half precision of this part alone, and crash beside a float32 UNet.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2))
    for name, trained in (("clip", "clip_place.pt"), ("clip2", "clip2.pt")):
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(work / name, out / name)
        weights = {k: v.half().contiguous() for k, v in torch.load(work / trained, weights_only=True).items()}
        save_file(weights, out / name / "open_clip_model.safetensors")
    print(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6, "MB")


STAGES = {
    f.__name__.removeprefix("stage_"): f
    for f in (
        stage_data,
        stage_vae,
        stage_latents,
        stage_decoder,
        stage_unet,
        stage_clip,
        stage_clip_halfway,
        stage_clip2,
        stage_export,
    )
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    STAGES[arguments.stage](arguments.work)
