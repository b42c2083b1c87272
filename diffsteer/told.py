"""What a composed configuration tells a pipeline: its reward and reference, the arguments of its call, its search's budget and
drafts, and where its steps are put."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffsteer.budget import Budget
from diffsteer.config import EXPRESSION, build, named
from diffsteer.draft import DEFAULT, Draft
from diffsteer.grids import explicit
from diffsteer.holdout import holdouts_of
from diffsteer.measured import settled
from diffsteer.media import as_clip
from diffsteer.noise_network import noise_network_of
from diffsteer.pipeline import SteeredPipeline, load_pipeline
from diffsteer.registry import find, nearest, registered
from diffsteer.reward import Reward
from diffsteer.schedules import Schedule
from diffsteer.shapes.judge import Checker
from diffsteer.shapes.models import MODELS
from diffsteer.start import NoiseTransform, ReferenceNoise
from diffsteer.types import Context, DiffsteerError, Sampler


def told_reward(config: DictConfig) -> DictConfig:
    """The reward that a configuration names, the reference put into it.

    Raises:
        DiffsteerError: a reference that nothing would read, or two of them.
    """
    told: DictConfig = config.reward.copy()
    if config.reference is not None:
        if not config.reference.strip():
            raise DiffsteerError("reference= is empty: give a clip, a GIF, an MP4 or a folder of frames")
        name = str(told.get("name"))
        takes = name != EXPRESSION and "reference" in {f.name for f in fields(find("reward", name))}
        if told.get("reference") is not None:
            raise DiffsteerError("reference= and reward.reference= are two references: give one of them")
        if takes:
            told.reference = config.reference
        if not takes and config.reference_share == 0:
            raise DiffsteerError(f"reference= has no effect: the reward {told.get('name')} has none, and reference_share is 0")
    elif config.reference_share != 0:
        raise DiffsteerError(f"reference_share={config.reference_share:g} wants a reference=, a clip")
    return told


def rewarded(config: DictConfig) -> tuple[Reward | None, NoiseTransform | None]:
    """That reward itself, and what the reference does to the first noise.

    Raises:
        DiffsteerError: what `told_reward` and `build` refuse.
    """
    if OmegaConf.is_missing(config, "reward"):
        return None, None
    reward = build("reward", told_reward(config))
    if config.reference is None or config.reference_share == 0:
        return reward, None
    return reward, ReferenceNoise(as_clip(config.reference), config.reference_share)


def named_reward(value: Any, key: str, *more: str) -> Reward:
    """A reward that a key names: by its name, as a mapping, or as an expression.

    Raises:
        DiffsteerError: with the key.
    """
    mapping = OmegaConf.create(named(value))
    name = mapping.get("name") if isinstance(mapping, DictConfig) else None
    if not isinstance(mapping, DictConfig) or (isinstance(value, str) and name not in (*registered("reward"), EXPRESSION)):
        raise DiffsteerError(f"{key}={value} is unknown{nearest(str(value), [*more, *registered('reward')])}")
    reward: Reward = build("reward", mapping)
    return reward


def held_out(value: Any, key: str, model: str, prompts: Sequence[str]) -> Reward:
    """A reward that looks on: one that is named, or "checker", which reads the shapes world.

    Args:
        model: that makes the pictures. prompts: that the checker would have to read.

    Raises:
        DiffsteerError: with the key.
    """
    if value != Checker.name:
        return named_reward(value, key, Checker.name)
    if model not in MODELS or model == "shapes-motion":
        raise DiffsteerError(f"{key}=checker reads pictures of the shapes world; model={model} makes others")
    checker = Checker()
    try:
        checker.prepare(prompts, Context())
    except DiffsteerError as error:
        raise DiffsteerError(f"{key}={error}") from error
    return checker


def holdouts_told(config: DictConfig, prompts: Sequence[str]) -> dict[str, Reward]:
    """The rewards that look on, by name.

    Raises:
        DiffsteerError: what `held_out` refuses; two of one name; one beside nothing that steers.
    """
    if config.holdout is None:
        return {}
    told = OmegaConf.to_container(config.holdout, resolve=True) if OmegaConf.is_config(config.holdout) else config.holdout
    values = told if isinstance(told, list) else [told]
    return holdouts_of([held_out(v, "holdout", config.model.path, prompts) for v in values], "pixels")


def budget_of(config: DictConfig) -> Budget | None:
    """What a search may spend, None where nothing is limited."""
    budget = Budget(**{str(k): v for k, v in config.budget.items()})
    return budget or None


def draft_told(config: DictConfig, device: str | None = None, drafts: bool = False) -> Draft | bool | None:
    """The drafts of a search; None leaves them to it.

    Args:
        device: where their model goes; None loads none, to check the rest.
        drafts: the search is one that drafts by default, which a number of finalists alone leaves as it is.

    Raises:
        DiffsteerError: keys beside draft.use=false, or what `Draft` refuses.
    """
    told = OmegaConf.to_container(config.draft, resolve=True)
    assert isinstance(told, dict)
    use = told.pop("use")
    usual = {"finalists": Draft.finalists}
    given = {str(k): v for k, v in told.items() if v not in (None, {}, usual.get(str(k)))}
    if use is False and given:
        raise DiffsteerError(f"draft.{next(iter(given))} has no effect with draft.use=false")
    if not given:
        return None if use is None else bool(use)
    if "reward" in given:
        given["reward"] = named_reward(config.draft.reward, "draft.reward")
    if "model" in given:
        path = given["model"]
        given["model"] = path if device is None else _model(path, device, config.model.dtype)
    elif set(given) == {"finalists"} and (drafts or use):
        given["share"] = DEFAULT.share
    return Draft(**given)


def network_told(config: DictConfig, pipe: Any, draft: Draft | bool | None) -> NoiseTransform | None:
    """The noise network that a configuration names, None where it names none.

    Raises:
        DiffsteerError: a pipeline that can have none, or a file that is none.
    """
    if config.noise_network is None:
        return None
    changed, name = pipe, config.model.path
    if isinstance(draft, Draft) and draft.model is not None:
        changed, name = draft.model, config.draft.model
    if config.noise_network in MODELS and config.noise_network != name:
        raise DiffsteerError(f"noise_network={config.noise_network} is one of that model, and this is {name}")
    return noise_network_of(changed, config.noise_network)


def check_network(config: DictConfig, sampler: Any) -> None:
    """Refuse a noise network that nothing would use.

    Raises:
        DiffsteerError: without a sampler, or beside a reference's share of the noise.
    """
    if config.noise_network is not None and sampler is None:
        raise DiffsteerError("noise_network wants a sampler, whose noise is keyed, such as sampler=random_search")
    if config.noise_network is not None and config.reference_share:
        raise DiffsteerError("noise_network and reference_share both change the first noise: give one of them")


def _model(path: str, device: str, dtype: str) -> Any:
    import torch

    pipe = load_pipeline(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, getattr(torch, dtype))


def steered_of(config: DictConfig, pipe: Any, sampler: Sampler | None, reward: Any, **objects: Any) -> SteeredPipeline:
    """The pipeline object that a configuration describes; `objects`: guide, start and schedule, which it names."""
    names = ("output", "decoder", "transition", "noise", "chunk", "deterministic")
    return SteeredPipeline(pipe, sampler, reward, **objects, **{name: config[name] for name in names})


def given_call(config: DictConfig) -> dict[str, Any]:
    """The arguments of the pipeline's call that stand under ``call``."""
    return OmegaConf.to_container(config.call, resolve=True)  # type: ignore[return-value]


def call_of(config: DictConfig) -> dict[str, Any]:
    """All arguments of the pipeline's call, those that have keys of their own included."""
    scale = {} if config.guidance_scale is None else {"guidance_scale": config.guidance_scale}
    grids = {name: list(config[name]) for name in ("sigmas", "timesteps") if config[name] is not None}
    return given_call(config) | scale | grids


def schedule_of(config: DictConfig, pipe: Any, prompts: list[Any], out: Path, settings_hash: str) -> Schedule | None:
    """The schedule that a configuration names, measured if it is one of those, which is kept in the folder."""
    call = call_of(config)
    named = build("schedule", config.schedule)
    explicit(pipe, named, call, True, config.transition)  # which refuses several grids at once
    call = {k: v for k, v in call.items() if k not in ("sigmas", "timesteps")}
    if config.negative_prompt is not None:
        call["negative_prompt"] = config.negative_prompt
    return settled(named, pipe, prompts, config.num_inference_steps, out / "schedule.json", settings_hash, **call)
