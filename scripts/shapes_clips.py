"""How the miniature CLIPs are trained: contrastively, with hard negatives, and the one that steers on painted pictures too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from shapes_networks import CLIPS, SCHEDULE, Painter, make_clip, make_vae
from shapes_training import pixels, tokenize, train
from torch import Tensor, nn

from diffsteer.shapes.grammar import COLORS, SHAPES, TASKS, Statement, one_attribute_changed, parse
from diffsteer.shapes.scene import Scene, caption, describes, render, sample_scene, scene_of

CLIP_STEPS = 5_000


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
