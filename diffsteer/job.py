"""A configuration as a job: everything that it asks for, checked before anything is loaded; then a folder is filled with it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from diffsteer import __version__
from diffsteer.batch import generate
from diffsteer.calibration import calibrated, settled_scales
from diffsteer.config import as_yaml, build, settings
from diffsteer.draft import Draft, draft_of
from diffsteer.families import family_of
from diffsteer.folder import Folder, paced
from diffsteer.found import Progress
from diffsteer.grids import check_schedule
from diffsteer.guidance import guidance_of
from diffsteer.leases import has_spare_cores, local_device, rank
from diffsteer.pipeline import load_pipeline
from diffsteer.prompts import Item
from diffsteer.reward import Reward, is_elsewhere
from diffsteer.search_run import check_search
from diffsteer.selection import check_inputs
from diffsteer.shapes.models import MODELS, digest, is_embedded
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
Rewards = tuple[Reward | None, Mapping[str, Reward]]  # the one that steers, and those that look on


@dataclass
class Job:
    """What a configuration asks for.

    Attributes:
        items: the prompts. sampler: None for the plain pipeline.
        reward: that steers; holdouts: that look on. Both with their scales once `ready` has been called.
        made: what becomes of the configuration once a pipeline is loaded, by the names of `SteeredPipeline`'s arguments.
    """

    config: DictConfig
    items: list[Item]
    sampler: Sampler | None
    reward: Reward | None
    guide: Any
    budget: Any
    draft: Any
    holdouts: dict[str, Reward]
    device: str
    told: dict[str, Any]
    digested: str
    start: Any = None
    made: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: DictConfig, items: list[Item], rewards: tuple[Reward | None, Mapping[str, Reward]] | None = None
    ) -> Job:
        """Read a configuration that `asked.check` has let through.

        Args:
            rewards: the one that steers and those that look on, where they are at hand already, with their scales.

        Raises:
            DiffsteerError: wrong input.
        """
        sampler = build("sampler", config.sampler)
        for item in {item.asked: item for item in items if "reward" in item.overrides}.values():
            wished(config, item)
        reward, start = rewarded(config) if rewards is None else (rewards[0], rewarded(config)[1] if config.reference else None)
        guide = build("guide", config.guide)
        guidance_of(guide, sampler)
        budget, draft = search_told(config, sampler, reward, guide)
        holdouts = holdouts_told(config, [item.prompt for item in items]) if rewards is None else dict(rewards[1])
        check_network(config, sampler)
        check_schedule(build("schedule", config.schedule), sampler is not None, config.transition)
        device = config.device or local_device()
        own = {"weights": digest(config.model.path)} if config.model.path in MODELS else {}
        told, digested = settings(config, device=device.partition(":")[0], **own)
        return cls(config, items, sampler, reward, guide, budget, draft, holdouts, device, told, digested, start)

    @property
    def prompts(self) -> list[str]:
        return [item.prompt for item in self.items]

    def folder(self, path: Path, sampler: Sampler | None) -> Folder:
        """A folder for what it makes, steered by this sampler."""
        texts = partial(_texts, self.config, self.told, sampler, self.reward)
        more: dict[str, Any] = {"texts": texts, "video": self.config.video, "report": self.config.report}
        return Folder(path, self.items, self.digested, sinks=list(self.config.sinks), **more)

    def ready(self, pipe: Any, out: Path, prompts: list[str], settings_hash: str | None = None) -> None:
        """Make what wants a pipeline; what is measured is kept in the folder `out`.

        Args:
            settings_hash: under which it is kept; None for the job's own, as nobody else is to have it.
            prompts: to be scored; one that cannot be is refused before any other is done. Of many the first ones, of the
                others each when it is its turn.
        """
        config, draft, told = self.config, self.draft, settings_hash or self.digested
        if config.draft.model is not None:
            draft = draft_told(config, self.device)
        if self.reward is not None:
            for r in (self.reward, *self.holdouts.values()):
                r.prepare(prompts[:CHECKED], Context(embedded=is_embedded(pipe)))
            self.reward = self._scaled(self.reward, pipe, out / SCALES, told)
            for n, (name, held) in enumerate(self.holdouts.items()):
                self.holdouts[name] = self._scaled(held, pipe, out / SCALES.replace(".", f"-{n}."), told)
            if isinstance(draft, Draft) and isinstance(draft.reward, Reward):
                draft = replace(draft, reward=self._scaled(draft.reward, pipe, out / SCALES.replace(".", "-draft."), told))
        start = self.start if config.noise_network is None else network_told(config, pipe, draft)
        schedule = schedule_of(config, pipe, self.prompts, out, told)
        self.made = {"schedule": schedule, "guide": self.guide, "start": start, "budget": self.budget, "draft": draft}

    def _scaled(self, reward: Reward, pipe: Any, path: Path, settings_hash: str) -> Reward:
        return scaled_reward(reward, self.config, pipe, self.prompts, path, settings_hash)

    def fill(
        self, folder: Folder, pipe: Any, sampler: Sampler | None, say: Callable[[str], None] | None = None, ahead: bool = True
    ) -> None:
        """Do what is missing in a folder: the estimate, then the work with a progress bar.

        Args:
            say: prints a line about what is being done.
            ahead: decode and score on cores that would idle, while the next prompts are denoised; where a reward is waited for,
                that is always done.
        """
        steers = sampler is self.sampler  # the other of a demonstration is plain
        objects = dict(self.made) if steers else {"schedule": self.made.get("schedule")}
        objects |= {"holdout": self.holdouts, "looks": SIDE if any(i.index < self.config.report for i in folder.missing) else 0}
        _fill(folder, self.config, pipe, sampler, self.reward, say or _say, ahead, **objects)


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


def search_told(config: DictConfig, sampler: Any, reward: Reward | None, guide: Any) -> tuple[Any, Any]:
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


def looks_once(sampler: Sampler | None, guide: Any) -> bool:
    """Does it decode and score at the end alone? Then no other thread does while that is done."""
    if sampler is None:
        return True
    guided = guide is not None or sampler.needs_grad or hasattr(sampler, "guidance")
    return not guided and not isinstance(sampler, Search) and len(sampler.schedule(100)) == 1


def _say(line: str) -> None:
    print(line, flush=True)


def _fill(
    folder: Folder,
    config: DictConfig,
    pipe: Any,
    sampler: Sampler | None,
    reward: Any,
    say: Callable[[str], None],
    ahead: bool,
    **objects: Any,
) -> None:
    if not folder.missing:
        folder.finish()
        return
    from diffsteer.pipes import check_call

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
        say(f"{prompts} prompt{'s' * (prompts > 1)}, {name}: {what}")
    elsewhere, guide = is_elsewhere(pipe.device, reward, *objects["holdout"].values()), objects.get("guide")
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
            work.begin,
            folder,
            ahead=looks_once(sampler, guide) and (elsewhere or (ahead and pipe.device.type == "cpu" and has_spare_cores())),
            seed=config.seed,
            output=config.output,
            batch=config.batch if sampler is not None else 1,
            done=bar.update if sampler is None else None,
        )
    pace = paced(folder.timings)
    if first and pace is not None:
        say(f"{pace[0]:.3g} prompts a second, {pace[1]:.0%} of the time outside the denoiser")
