"""The scales of rewards that are to be added: mean and deviation over unguided samples, measured once a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from diffsteer.blocks import Size
from diffsteer.callable import CallableModel
from diffsteer.files import replacing
from diffsteer.pipeline import SteeredPipeline
from diffsteer.registry import find
from diffsteer.reward import Reward, WeightedSum, ZScore, prepare, terms_of
from diffsteer.selection import check_inputs, checked
from diffsteer.types import Context, DiffsteerError

PROMPTS, SAMPLES = 8, 4
Scale = tuple[float, float]  # mean and deviation


def calibrated(
    reward: Reward,
    pipe: Any,
    prompts: Sequence[str],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    decoder: str = "full",
    chunk: Size = None,
    **call: Any,
) -> Reward:
    """The same reward, the scales of its z-scores measured on unguided samples: so many of each of the first eight prompts.

    The mean is that of all scores, the deviation that of samples of one prompt, since it is among those that a reward chooses.

    Cost: ``8 samples`` chains at most, their decodes, and as many reward calls for each z-score.

    Args:
        samples: at least 2, those of one prompt together. decoder, chunk, call: as the pipeline is run, steps and guidance
            among it.

    Raises:
        DiffsteerError: scores that are all the same, or no numbers.
    """
    if not is_unscaled(reward):
        return reward
    if samples < 2:
        raise DiffsteerError(f"calibrated: samples={samples}; at least 2 are needed to tell a deviation")
    texts = list(dict.fromkeys(prompts))[:PROMPTS]
    plain = SteeredPipeline(pipe, find("sampler", "best_of_n")(samples), decoder=decoder, chunk=chunk)
    groups = [plain([text], seed=seed, ids=[f"calibration {i}"], **call).samples[0] for i, text in enumerate(texts)]
    steps, embedded = 1, False
    if not isinstance(pipe, CallableModel):
        from diffsteer.shapes.models import is_embedded

        embedded = is_embedded(pipe)
    ctx = Context(steps, steps, embedded)

    def measured(inner: Reward) -> Scale:
        check_inputs(decoder != "none", inner)
        prepare(inner, texts, ctx)
        with torch.no_grad():
            each = [checked(inner, group, [text] * samples, ctx) for group, text in zip(groups, texts, strict=True)]
        scores = torch.stack(each).double().cpu()
        mean, std = float(scores.mean()), float(scores.var(1).mean().sqrt())
        if not math.isfinite(mean) or not std > 0:
            what = "the same for all samples of a prompt" if std == 0 else "no number for some"
            raise DiffsteerError(f"z({inner.name}): its scores are {what}, so that there is no scale to bring it to")
        return mean, std

    return scaled(reward, measured)


def is_unscaled(reward: Reward) -> bool:
    """Is there a z-score in it whose scale was not measured?"""
    inner = [r for _, r in terms_of(reward) if isinstance(r, ZScore)]
    return any(r.std is None or is_unscaled(r.reward) for r in inner)


def scaled(reward: Reward, scale: Callable[[Reward], Scale]) -> Reward:
    """The reward with a scale for every z-score that has none, innermost first."""
    if isinstance(reward, WeightedSum):
        return WeightedSum([(w, scaled(r, scale)) for w, r in reward.terms])
    if not isinstance(reward, ZScore):
        return reward
    inner = scaled(reward.reward, scale)
    mean, std = (reward.mean, reward.std) if reward.std is not None else scale(inner)
    return ZScore(inner, mean, std)


def settled_scales(reward: Reward, path: Path, settings_hash: str, measure: Callable[[], Reward]) -> Reward:
    """The reward with the scales that a file keeps of an earlier run with the same settings, or else, measured and kept.

    Raises:
        DiffsteerError: a file that holds none.
    """
    if not is_unscaled(reward):
        return reward
    with FileLock(path.with_name(f".{path.name}.lock")):  # several processes of one folder have one scale
        return _settled(reward, path, settings_hash, measure)


def _settled(reward: Reward, path: Path, settings_hash: str, measure: Callable[[], Reward]) -> Reward:
    if path.exists():
        try:
            kept = json.loads(path.read_text())
            if kept["settings"] == settings_hash:
                told = iter([(float(s["mean"]), float(s["std"])) for s in kept["scales"]])
                return scaled(reward, lambda inner: next(told))
        except (ValueError, TypeError, KeyError, RuntimeError, StopIteration, DiffsteerError) as error:
            raise DiffsteerError(f"{path.name} holds no scales of this reward: delete it to measure anew") from error
    made = measure()
    scales = [{"name": z.name, "mean": z.mean, "std": z.std} for z in _measured(reward, made)]
    with replacing(path) as part:
        part.write_text(json.dumps({"settings": settings_hash, "scales": scales}, indent=1))
    return made


def _measured(before: Reward, after: Reward) -> list[ZScore]:
    """The z-scores that have a scale now and had none before, in the order in which they were measured."""
    found = []
    for (_, old), (_, new) in zip(terms_of(before), terms_of(after), strict=True):
        if isinstance(old, ZScore) and isinstance(new, ZScore):
            found += [*_measured(old.reward, new.reward), *([new] if old.std is None else [])]
    return found
