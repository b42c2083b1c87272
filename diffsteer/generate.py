"""``diffsteer generate`` from a composed configuration: prompts, pipeline, folder, progress, and what is printed."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from diffsteer import __version__
from diffsteer.asked import check, items_of
from diffsteer.batch import generate
from diffsteer.calibration import calibrated, settled_scales
from diffsteer.config import as_yaml, build, settings
from diffsteer.draft import Draft, draft_of
from diffsteer.families import family_of
from diffsteer.folder import GRID, MANIFEST, Folder, paced
from diffsteer.found import Progress
from diffsteer.grids import check_schedule
from diffsteer.guidance import guidance_of
from diffsteer.leases import local_device, rank
from diffsteer.pipeline import load_pipeline
from diffsteer.prompts import Item
from diffsteer.registry import find
from diffsteer.reward import Reward
from diffsteer.search_run import check_search
from diffsteer.selection import check_inputs
from diffsteer.shapes.models import MODELS, digest, is_embedded
from diffsteer.sheet import first_frame, sheet
from diffsteer.told import (
    budget_of,
    call_of,
    check_network,
    draft_told,
    given_call,
    holdouts_told,
    network_told,
    rewarded,
    schedule_of,
)
from diffsteer.traces import SIDE
from diffsteer.trial import Search
from diffsteer.types import Context, DiffsteerError, Info, Sampler
from diffsteer.work import Work, wished

CHECKED = 1000  # prompts that are looked at before any work is done
SCALES = "scales.json"  # of a reward's z-scores, as they were measured
PLAIN = "plain"  # the folder, inside the one of the demonstration, of what is not steered


def generate_folder(config: DictConfig, out: Path, shown: str) -> None:
    """Do what a configuration asks for in a folder; what was done there before is not done again.

    Args:
        shown: the folder as messages name it.

    Raises:
        DiffsteerError: wrong input, said before any work is done; a reward or an item that fails, what was done staying.
    """
    demo = check(config)
    items = items_of(config)
    if rank()[1] > 1 and not any(o.startswith("out=") for o in HydraConfig.get().overrides.task):
        raise DiffsteerError(f"{rank()[1]} processes work on one folder: give out=DIR")
    sampler = build("sampler", config.sampler)
    for item in {item.asked: item for item in items if "reward" in item.overrides}.values():
        wished(config, item)
    reward, start = rewarded(config)
    guide = build("guide", config.guide)
    guidance_of(guide, sampler)
    budget, draft = _search_of(config, sampler, reward, guide)
    holdouts = holdouts_told(config, [item.prompt for item in items])
    check_network(config, sampler)
    check_schedule(build("schedule", config.schedule), sampler is not None, config.transition)
    device = config.device or local_device()
    own = {"weights": digest(config.model.path)} if config.model.path in MODELS else {}
    told, digested = settings(config, device=device.partition(":")[0], **own)

    def made(path: Path, method: Sampler | None) -> tuple[Folder, Sampler | None]:
        texts = partial(_texts, config, told, method, reward)
        more: dict[str, Any] = {"texts": texts, "video": config.video, "report": config.report, "sinks": list(config.sinks)}
        return Folder(path, items, digested, **more), method

    runs = {"steered" if sampler else PLAIN: made(out, sampler)}
    folder = runs["steered" if sampler else PLAIN][0]
    if demo and sampler is not None:
        runs = {PLAIN: made(out / PLAIN, find("sampler", "best_of_n")(particles=1, eta=sampler.eta)), **runs}
    snapshot(config, out)
    todo = sum(len(f.missing) for f, _ in runs.values())
    kept = len(items) - len(folder.missing)
    pipe = load(config, device) if todo else None
    if todo and config.draft.model is not None:
        draft = draft_told(config, device)
    if pipe is not None and reward is not None:  # a prompt that cannot be scored is refused before any other is done
        for r in (reward, *holdouts.values()):  # of many prompts the first ones; of the others each when it is its turn
            r.prepare([item.prompt for item in folder.missing[:CHECKED]], Context(embedded=is_embedded(pipe)))
        texts = [item.prompt for item in items]
        reward = scaled_reward(reward, config, pipe, texts, out / SCALES, digested)
        for n, (name, held) in enumerate(holdouts.items()):
            path = out / SCALES.replace(".", f"-{n}.")
            holdouts[name] = scaled_reward(held, config, pipe, texts, path, digested)
        if isinstance(draft, Draft) and isinstance(draft.reward, Reward):
            path = out / SCALES.replace(".", "-draft.")
            draft = replace(draft, reward=scaled_reward(draft.reward, config, pipe, texts, path, digested))
    start = start if pipe is None or config.noise_network is None else network_told(config, pipe, draft)
    schedule = None if pipe is None else schedule_of(config, pipe, [i.prompt for i in items], out, digested)
    for f, method in runs.values():
        steers = method is sampler  # the other of a demonstration is plain
        objects: dict[str, Any] = {"guide": guide, "start": start, "budget": budget, "draft": draft} if steers else {}
        objects |= {"holdout": holdouts, "looks": SIDE if any(item.index < config.report for item in f.missing) else 0}
        _fill(f, config, pipe, method, reward, schedule=schedule, **objects)
    if demo:
        _show_demo({name: f for name, (f, _) in runs.items()})
    before = f"; {kept} of them were there already" if kept else ""
    kind = Path(folder.entries[items[0].id]["image"]).parts[0].removesuffix("s")
    sheets = f", {GRID}" if kind != "sound" else ""
    if rank()[0] == 0:
        print(f"{len(items)} {kind}{'s' * (len(items) > 1)}{sheets} and {MANIFEST} in {shown}{before}")


def scaled_reward(reward: Reward, config: DictConfig, pipe: Any, prompts: list[str], path: Path, settings_hash: str) -> Reward:
    """The reward, its z-scores brought to the scale of unguided samples, which is measured once a folder and kept in a file."""

    def measure() -> Reward:
        print(f"scales of {reward.name}: measured first, on unguided samples", flush=True)
        steps = {} if config.num_inference_steps is None else {"num_inference_steps": config.num_inference_steps}
        negative = {} if config.negative_prompt is None else {"negative_prompt": config.negative_prompt}
        grids = ("sigmas", "timesteps")
        call = {k: v for k, v in call_of(config).items() if k not in grids} | steps | negative
        return calibrated(reward, pipe, prompts, seed=config.seed, chunk=config.chunk, **call)

    return settled_scales(reward, path, settings_hash, measure)


def _texts(
    config: DictConfig, told: dict[str, Any], sampler: Sampler | None, reward: Reward | None, item: Item
) -> dict[str, str]:
    """What a picture's metadata say: the settings, and, as ComfyUI reads it, the graph that does the like there, if one can."""
    from diffsteer.comfy.of_run import graph_of

    mine = {"sampler": None} if sampler is None else {"sampler": {"name": sampler.name, **vars(sampler)}}
    own = {"overrides": dict(item.overrides)} if item.overrides else {}
    about = {"version": __version__, "prompt": item.prompt, "id": item.id, **own, "settings": {**told, **mine}}
    texts = {"diffsteer": json.dumps(about, default=str)}
    if own:  # the graph is that of the configuration
        return texts
    with contextlib.suppress(DiffsteerError):
        texts["prompt"] = json.dumps(graph_of(config, item.prompt, sampler, reward).api())
    return texts


def snapshot(config: DictConfig, out: Path) -> None:
    """Hydra's snapshot, as Hydra writes it."""
    (out / ".hydra").mkdir(exist_ok=True)
    whole: Any = HydraConfig.instance().cfg
    parts = {"config": config, "hydra": OmegaConf.masked_copy(whole, "hydra"), "overrides": HydraConfig.get().overrides.task}
    for name, part in parts.items():
        (out / ".hydra" / f"{name}.yaml").write_text(as_yaml(part), encoding="utf-8")


def load(config: DictConfig, device: str) -> Any:
    from diffsteer.pipes import quiet, refuse_by_name

    quiet()
    options = {key: config.model[key] for key in ("revision", "variant") if config.model[key] is not None}
    refuse_by_name(config.model.path, **options)
    pipe = load_pipeline(config.model.path, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, getattr(torch, config.model.dtype))


def _search_of(config: DictConfig, sampler: Any, reward: Reward | None, guide: Any) -> tuple[Any, Any]:
    """The budget and the drafts of a search.

    Raises:
        DiffsteerError: one of them beside a sampler that is no search; what the search refuses.
    """
    drafts = isinstance(sampler, Search) and sampler.drafts
    budget, draft = budget_of(config), draft_told(config, drafts=drafts)
    if isinstance(sampler, Search):
        check_search(sampler, reward, guide, draft_of(draft, sampler))
    elif budget is not None or draft is not None:
        raise DiffsteerError(
            f"{'budget' if budget else 'draft'}. has no effect: sampler={config.sampler.get('name')} is no search"
        )
    return budget, draft


def _fill(folder: Folder, config: DictConfig, pipe: Any, sampler: Sampler | None, reward: Any, **objects: Any) -> None:
    """One folder: the estimate, then the work with a progress bar."""
    from diffsteer.pipes import check_call

    if not folder.missing:
        folder.finish()
        return
    made = family_of(pipe)
    check_inputs(True, reward, makes=made.makes if made else "")
    work = Work(config, pipe, sampler, reward, objects)
    prompts, particles = len(folder.missing), sampler.particles if sampler else 1
    check_call(pipe, given_call(config))
    for item in {item.asked: item for item in folder.missing}.values():
        check_call(pipe, {key: item.overrides[key] for key in ("width", "height") if key in item.overrides})
    cost = work.estimate(folder.missing)
    tiny = f" and {cost.tiny_decodes} tiny ones" if cost.tiny_decodes else ""
    back = f", {cost.backwards} of them backwards" if cost.backwards else ""
    what = f"{cost.evaluations} evaluations{back}, {cost.decodes} decodes{tiny}, {cost.reward_calls} reward calls"
    searches = isinstance(sampler, Search)
    several = f" with {particles} particle{'s' * (particles > 1)}" if not searches else ""
    name = "pipeline" if sampler is None else sampler.name + several
    timed = searches and config.budget.seconds is not None
    if timed:
        most = "" if config.budget.evals is None else f", {config.budget.evals} evaluations at most"
        what = f"as many drafts and samples as {config.budget.seconds:g} s pay for{most}"
    first = rank()[0] == 0  # of several processes one talks
    if first:
        print(f"{prompts} prompt{'s' * (prompts > 1)}, {name}: {what}", flush=True)
    events = None if searches else prompts if hasattr(sampler, "guidance") else (cost.decodes + cost.tiny_decodes) // particles
    with tqdm(
        total=None if timed else cost.evaluations if searches else events,
        unit="evaluation" if searches else "event",
        disable=None if first else True,
    ) as bar:
        seen = [0]

        def watch(info: Info | Progress) -> None:
            if isinstance(info, Progress):
                bar.set_postfix(reward=f"{sum(info.best) / len(info.best):.3g}")
                bar.update(info.evaluations if info.evaluations < seen[0] else info.evaluations - seen[0])
                seen[0] = info.evaluations  # of one call
                return
            best = info.rewards.nan_to_num(nan=-math.inf).max(1).values.mean()
            bar.set_postfix(reward=f"{float(best):.3g}", ess=f"{float(info.ess.mean()):.1f}/{particles}")
            bar.update(len(info.ess))

        work.watch = watch
        generate(
            work.run,
            folder,
            seed=config.seed,
            output=config.output,
            batch=config.batch if sampler is not None else 1,
            done=bar.update if sampler is None else None,
        )
    pace = paced(folder.timings)
    if first and pace is not None:
        print(f"{pace[0]:.3g} prompts a second, {pace[1]:.0%} of the time outside the denoiser")


def _show_demo(folders: dict[str, Folder]) -> None:
    """A table of verdicts and rewards, a line a prompt; the sheet of the last folder shows its images below the others'."""
    from diffsteer.shapes.check import check

    table = [["prompt", *folders, "reward: " + ", ".join(folders)]]
    last = list(folders.values())[-1]
    for item in last.items:
        verdicts, rewards = [], []
        for folder in folders.values():
            entry = folder.entries[item.id]
            verdict = check(first_frame(folder.path / entry["image"]), item.prompt)
            verdicts.append("right" if verdict.correct else f"wrong: {verdict.reasons[0]}")
            rewards.append("none" if entry["reward"] is None else f"{entry['reward']:.3f}")
        table.append([item.prompt, *verdicts, ", ".join(rewards)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    rows = [[f.path / f.entries[item.id]["image"] for item in f.items] for f in folders.values()]
    sheet(rows, [item.prompt for item in last.items], last.path / GRID)
