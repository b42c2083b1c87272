"""``diffsteer generate`` from a composed configuration: prompts, pipeline, folder, progress, and what is printed."""

from __future__ import annotations

import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from diffsteer.batch import GRID, MANIFEST, Folder, Item, as_items, generate, read_items
from diffsteer.config import Config, build, settings
from diffsteer.pipeline import SteeredPipeline, load_pipeline
from diffsteer.registry import nearest
from diffsteer.run import OUTPUTS
from diffsteer.samplers import BestOfN
from diffsteer.sheet import sheet
from diffsteer.shapes.models import MODELS
from diffsteer.types import DiffsteerError, Info, Sampler

# What runs without a prompt: one caption a task of the shapes world.
CAPTIONS = (
    "a small star",
    "a triangle and a ring",
    "three red circles",
    "a large purple square",
    "a red circle left of a blue square",
    "a yellow star and a blue ring",
)
DTYPES = ("float32", "float16", "bfloat16")
PLAIN = "plain"  # the folder, inside the one of the demonstration, of what is not steered


def generate_folder(config: DictConfig, out: Path, shown: str) -> None:
    """Do what a configuration asks for in a folder; what was done there before is not done again.

    Args:
        shown: the folder as messages name it.

    Raises:
        DiffsteerError: wrong input, said before any work is done; a reward or an item that fails, what was done staying.
    """
    demo = _check(config)
    items = _items(config)
    sampler = build("sampler", config.sampler)
    reward = None if OmegaConf.is_missing(config, "reward") else build("reward", config.reward)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Folder(out, items, settings(config, device=device.partition(":")[0])[1])
    folders = [(folder, sampler)]
    if demo and sampler is not None:
        baseline = BestOfN(particles=1, eta=sampler.eta)
        folders.insert(0, (Folder(out / PLAIN, items, folder.settings_hash), baseline))
    _snapshot(config, out)
    todo = sum(len(f.missing) for f, _ in folders)
    kept = len(items) - len(folder.missing)
    pipe = _load(config, device) if todo else None
    for f, method in folders:
        _fill(f, config, pipe, method, reward)
    if demo:
        _show_demo([f for f, _ in folders])
    before = f"; {kept} of them were there already" if kept else ""
    print(f"{len(items)} image{'s' * (len(items) > 1)}, {GRID} and {MANIFEST} in {shown}{before}")


def _check(config: DictConfig) -> bool:
    """Refuse what Hydra's types let through. Is this the demonstration, no prompt being given?"""
    valid = [f.name for f in fields(Config)]
    for key in config:
        if key not in valid:
            raise DiffsteerError(f"unknown key {key!r}{nearest(str(key), valid)}")
    for key, allowed in (("output", OUTPUTS), ("model.dtype", DTYPES)):
        value = OmegaConf.select(config, key)
        if value not in allowed:
            raise DiffsteerError(f"{key}={value} is unknown{nearest(str(value), allowed)}")
    for key in ("batch", "chunk", "num_inference_steps"):
        if config[key] is not None and config[key] < 1:
            raise DiffsteerError(f"{key}={config[key]}; at least 1 is needed")
    if config.prompt is not None and config.prompts is not None:
        raise DiffsteerError("give prompt= or prompts=, not both")
    demo = config.prompt is None and config.prompts is None
    if demo and config.model.path not in MODELS:
        raise DiffsteerError(f"model={config.model.path} needs prompts: give prompt=TEXT or prompts=FILE")
    return demo


def _items(config: DictConfig) -> list[Item]:
    if config.prompts is not None:
        items = read_items(config.prompts)
    else:
        items = as_items(CAPTIONS if config.prompt is None else [config.prompt])
    for item in items:
        try:
            f"{item.id}{item.prompt}".encode()
        except UnicodeEncodeError as error:
            raise DiffsteerError(f"prompt {item.id!r} is not Unicode text ({error.reason} at character {error.start})") from error
    return items


def _snapshot(config: DictConfig, out: Path) -> None:
    """Hydra's snapshot, as Hydra writes it."""
    (out / ".hydra").mkdir(exist_ok=True)
    whole = HydraConfig.instance().cfg
    OmegaConf.save(config, out / ".hydra" / "config.yaml")
    OmegaConf.save(OmegaConf.masked_copy(whole, "hydra"), out / ".hydra" / "hydra.yaml")
    OmegaConf.save(HydraConfig.get().overrides.task, out / ".hydra" / "overrides.yaml")


def _load(config: DictConfig, device: str) -> Any:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()
    if "DIFFUSERS_VERBOSITY" not in os.environ:
        diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    options = {key: config.model[key] for key in ("revision", "variant") if config.model[key] is not None}
    pipe = load_pipeline(config.model.path, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, getattr(torch, config.model.dtype))


def _fill(folder: Folder, config: DictConfig, pipe: Any, sampler: Sampler | None, reward: Any) -> None:
    """One folder: the estimate, then the work with a progress bar."""
    if not folder.missing:
        folder.finish()
        return
    steered = SteeredPipeline(
        pipe, sampler, reward, output=config.output, chunk=config.chunk, deterministic=config.deterministic
    )
    prompts, particles = len(folder.missing), sampler.particles if sampler else 1
    cost = steered.estimate(prompts, config.num_inference_steps, config.guidance_scale)
    name = "pipeline" if sampler is None else f"{sampler.name} with {particles} particle{'s' * (particles > 1)}"
    print(f"{prompts} prompt{'s' * (prompts > 1)}, {name}: {cost}", flush=True)
    call = {} if config.guidance_scale is None else {"guidance_scale": config.guidance_scale}
    with tqdm(total=cost.decodes // particles, unit="event", disable=None) as bar:

        def watch(info: Info) -> None:
            best = info.rewards.nan_to_num(nan=-math.inf).max(1).values.mean()
            bar.set_postfix(reward=f"{float(best):.3g}", ess=f"{float(info.ess.mean()):.1f}/{particles}")
            bar.update(len(info.ess))

        generate(
            steered,
            folder,
            seed=config.seed,
            batch=config.batch,
            watch=watch,
            done=bar.update if sampler is None else None,
            num_inference_steps=config.num_inference_steps,
            negative_prompt=config.negative_prompt,
            **call,
        )


def _show_demo(folders: list[Folder]) -> None:
    """A table of verdicts and rewards, a line a prompt, plain first; the sheet shows the plain images above the steered ones."""
    from PIL import Image

    from diffsteer.shapes.check import check

    names = [PLAIN, "steered"][-len(folders) :]
    wide = max(map(len, CAPTIONS)) + 2
    print("\n" + "prompt".ljust(wide) + "".join(f"{name + ' reward':>16}" for name in names) + "   verdicts")
    for item in folders[0].items:
        entries = [f.entries[item.id] for f in folders]
        verdicts = []
        for name, f, entry in zip(names, folders, entries, strict=True):
            with Image.open(f.path / entry["image"]) as image:
                verdict = check(image, item.prompt)
            verdicts.append(f"{name} {'right' if verdict.correct else 'wrong: ' + '; '.join(verdict.reasons)}")
        rewards = "".join(f"{'none' if e['reward'] is None else format(e['reward'], '.3f'):>16}" for e in entries)
        print(item.prompt.ljust(wide) + rewards + "   " + " | ".join(verdicts))
    print()
    rows = [[f.path / f.entries[item.id]["image"] for item in f.items] for f in folders]
    sheet(rows, CAPTIONS, folders[-1].path / GRID)
