"""The nodes around a run: the embedded models, rewards added up, images scored, particles selected, and what a run was like."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffsteer import __version__, lineage
from diffsteer.blocks import Blocks
from diffsteer.comfy.host import HOST, Host
from diffsteer.comfy.node import REWARD, RUN, STEERING, Input, Node, Shown
from diffsteer.comfy.registered import PROMPT
from diffsteer.comfy.steering import Record, Steering, indexed, to_samples
from diffsteer.ledger import Ledger
from diffsteer.reward import Reward, prepare
from diffsteer.run import OUTPUTS
from diffsteer.selection import Scorer, check_inputs
from diffsteer.shapes.models import MODELS
from diffsteer.types import Context, DiffsteerError

AT_A_TIME = 8  # images in a reward
OUTPUT = Input(
    "output",
    "COMBO",
    "best: one an image, by the reward. draw: one an image, drawn by the weights. all: every particle, the best first.",
    "best",
    choices=OUTPUTS,
)


def load_shapes(model: str, batch_size: int) -> tuple[Any, Any, Any, dict[str, Any]]:
    from diffsteer.comfy import shapes

    return (*shapes.load(model), shapes.empty_latent(batch_size))


def add_rewards(a: Reward, weight_a: float, weight_b: float, b: Reward | None = None) -> tuple[Reward]:
    return (weight_a * a if b is None else weight_a * a + weight_b * b,)


def score_images(images: Tensor, reward: Reward, prompt: str, keep: int) -> tuple[Tensor, str]:
    """Images (N, H, W, C) from the best to the worst, those without a score last, and a line for each."""
    check_inputs(True, reward)
    prepare(reward, [prompt], Context())
    scorer = Scorer(reward, None, [prompt], Ledger(), cut=Blocks(AT_A_TIME))
    scores = scorer.score(to_samples(images).float(), 1, 1)[0]
    order = scores.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)[: keep or None].tolist()
    return images[order], "\n".join(f"image {i + 1}: {float(scores[i]):.4g}" for i in order)


def select(latent: dict[str, Any], steering: Steering, output: str) -> tuple[dict[str, Any], Record]:
    record = steering.record_of(latent["samples"])
    return indexed(latent, record.rows(output), record.origin.tolist()), record


def lineage_picture(run: Record) -> tuple[Tensor]:
    """(1, H, W, 3) in [0, 1]."""
    picture = lineage.draw(run.trace, run.chosen)
    return (torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None],)


def ledger_text(run: Record) -> tuple[str]:
    said = [f"{key}: {value}" for key, value in run.settings.items() if value is not None]
    events = [
        f"after step {e.done}: ess {', '.join(f'{float(v):.2f}' for v in e.ess)} of {e.rewards.shape[1]}"
        + (", resampled" if bool(e.resampled.any()) else "")
        for e in run.trace.events
    ]
    rewards = [
        f"image {p + 1}: "
        + ", ".join(f"{float(r):.4g}{' (best)' if k == int(run.chosen[p]) else ''}" for k, r in enumerate(row))
        for p, row in enumerate(run.rewards)
    ]
    return ("\n".join([*said, "", *events, "", "rewards", *rewards, "", str(run.ledger)]),)


def guidance_text(latent: dict[str, Any], guider: Any) -> tuple[str]:
    pull = getattr(guider, "pull", None)
    run = None if pull is None else pull.runs.find(latent["samples"])
    if run is None:
        raise DiffsteerError("these latents are of no run of this guider: connect both of one sampling node, unchanged")
    return (str(run),)


def saver(host: Host) -> Any:
    def save_images(
        images: Tensor,
        filename_prefix: str,
        run: Record | None = None,
        notes: str = "",
        graph: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Shown:
        """Write PNG files with the graph, the run's settings and what it cost in their metadata."""
        height, width = images.shape[1:3]
        folder, name, number, subfolder = host.output_folder(filename_prefix, width, height)
        info = PngInfo()
        if host.metadata():
            told = {"prompt": graph, **(extra or {}), "diffsteer": about(run, notes)}
            for key, value in told.items():
                if value is not None:
                    info.add_text(key, json.dumps(value))
        files = []
        for image in images:
            pixels = (image.cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8)
            file = f"{name}_{number:05}_.png"
            Image.fromarray(pixels).save(Path(folder) / file, pnginfo=info)
            files.append({"filename": file, "subfolder": subfolder, "type": "output"})
            number += 1
        return Shown({"images": files})

    return save_images


def about(run: Record | None, notes: str) -> dict[str, Any]:
    """What is written into a picture beside the graph."""
    told: dict[str, Any] = {"version": __version__} | ({"notes": notes} if notes else {})
    if run is None:
        return told
    rewards = [[r if math.isfinite(r) else None for r in row] for row in run.rewards.tolist()]
    return told | {"settings": run.settings, "rewards": rewards, "ledger": run.ledger.counts}


def nodes(host: Host = HOST) -> list[Node]:
    weight = {"min": -1000.0, "max": 1000.0, "step": 0.01}
    return [
        Node(
            "DiffsteerShapes",
            "Load shapes (embedded model)",
            "The small models that ship with diffsteer draw coloured shapes on 64 x 64 pixels, for a first look. "
            "Replace it by a checkpoint loader and an empty latent to work with a model of yours.",
            (
                Input(
                    "model",
                    "COMBO",
                    "shapes is a Stable Diffusion, shapes-flow a rectified flow.",
                    "shapes",
                    choices=tuple(MODELS),
                ),
                Input("batch_size", "INT", "Of the latent: as many particles.", 4, {"min": 1, "max": 4096}),
            ),
            (("MODEL", "model"), ("CLIP", "clip"), ("VAE", "vae"), ("LATENT", "latent")),
            load_shapes,
        ),
        Node(
            "DiffsteerRewardSum",
            "Add rewards",
            "weight_a times the first reward, plus weight_b times the second, if there is one. A weight below 0 asks for less.",
            (
                Input("a", REWARD),
                Input("weight_a", "FLOAT", "", 1.0, weight),
                Input("weight_b", "FLOAT", "", 1.0, weight),
                Input("b", REWARD, optional=True),
            ),
            ((REWARD, "reward"),),
            add_rewards,
        ),
        Node(
            "DiffsteerScore",
            "Score and sort images",
            "Images by their reward, the best first, after any sampler. This is best of N by hand.",
            (
                Input("images", "IMAGE"),
                Input("reward", REWARD),
                PROMPT,
                Input("keep", "INT", "How many to keep (0: all).", 0, {"min": 0, "max": 4096}),
            ),
            (("IMAGE", "images"), ("STRING", "scores")),
            score_images,
        ),
        Node(
            "DiffsteerSelect",
            "Select particles",
            "Which particles of a steered run are kept. Connect the latent that the sampling node made, and the steering of "
            "the sampler node that it ran.",
            (Input("latent", "LATENT"), Input("steering", STEERING), OUTPUT),
            (("LATENT", "latent"), (RUN, "run")),
            select,
        ),
        Node(
            "DiffsteerLineage",
            "Lineage picture",
            "A picture of which particles lived on, with a column an event and a dot a particle, coloured by its reward.",
            (Input("run", RUN),),
            (("IMAGE", "image"),),
            lineage_picture,
        ),
        Node(
            "DiffsteerLedger",
            "Ledger",
            "What was set, what happened at each event, and what it cost, as text (show it with Preview Any).",
            (Input("run", RUN),),
            (("STRING", "text"),),
            ledger_text,
        ),
        Node(
            "DiffsteerGuidanceReport",
            "Guidance report",
            "What the gradient guidance did in a run, as text for Preview Any: settings, the reward at each guided step, and "
            "how many updates were skipped since their gradients were no numbers.",
            (
                Input("latent", "LATENT", "As the sampling node made it."),
                Input("guider", "GUIDER", "That the sampling node used."),
            ),
            (("STRING", "text"),),
            guidance_text,
        ),
        Node(
            "DiffsteerSave",
            "Save steered images",
            "PNG files with the graph, the settings, the rewards and the cost in their metadata. Drop one on the canvas to get "
            "the graph back.",
            (
                Input("images", "IMAGE"),
                Input("filename_prefix", "STRING", "", "diffsteer/steered"),
                Input("run", RUN, optional=True),
                Input("notes", "STRING", "Written into the metadata, too.", "", {"multiline": True}, optional=True),
            ),
            (),
            saver(host),
            is_output=True,
        ),
    ]
