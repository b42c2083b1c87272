"""What every reward promises, as a check that the rewards of others pass, too: ``check_reward(MyReward)`` in a test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffsteer.reward import Reward
from diffsteer.types import Context, DiffsteerError

PROMPTS = ("a red star", "two blue rings", "a red star", "a star left of a ring", "a cross")
ENDED = Context(done=5, steps=5)


def five_images() -> Tensor:
    """Five images (5, 3, 48, 40) of whole grey levels, unlike each other: smooth ones and a noisy one."""
    draws = torch.Generator().manual_seed(3)
    coarse = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 5, generator=draws), (48, 40), mode="bilinear")
    return (torch.cat([coarse, torch.rand(1, 3, 48, 40, generator=draws)]) * 255).round() / 255


def check_reward(
    make: Callable[[], Reward],
    samples: Tensor | None = None,
    prompts: Sequence[str] = PROMPTS,
    ctx: Context = ENDED,
    *,
    close: float = 1e-4,
) -> None:
    """Score samples in every way in which a run may, and compare with what the reward says of itself.

    Its facts are of the right kinds; scores are (N,) float32, in its range, and not all the same, and scoring changes no
    sample and draws nothing from the global random state; they are the same for every chunk size, order and fresh object, and
    prompts matter if it says so; features of images, if it has some, are a sample's own; gradients reach the samples if it
    says so, also where it was used in inference mode before. Of a reward that says that it is not deterministic the same is
    not asked for, of one that is pooled the same in any order alone.

    Args:
        make: makes a new one.
        samples: (5, ...), of which the prompts are; None for `five_images`, or four frames of each for a reward of clips. A
            reward on latents wants some.
        close: how far scores of the same sample in other chunks may be apart, absolutely and relatively.

    Raises:
        DiffsteerError: with the first promise that is broken.
    """
    reward = make()
    who = f"{type(reward).__name__} ({reward.name})"

    def wanted(kept: bool, promise: str) -> None:
        if not kept:
            raise DiffsteerError(f"{who}: {promise}")

    wanted(isinstance(reward, Reward), "it is no diffsteer.Reward")
    wanted(reward.name != Reward.name and reward.name.isidentifier(), "its `name` is none of its own, or no word")
    words = (type(reward).__doc__ or "").strip()
    wanted(bool(words) and not words.startswith(f"{type(reward).__name__}("), "it has no docstring")  # dataclass writes one
    wanted(reward.input in ("pixels", "latents"), f"input={reward.input!r}; valid: pixels, latents")
    wanted(reward.modality in ("image", "video", "any"), f"modality={reward.modality!r}; valid: image, video, any")
    low, high = reward.range
    wanted(low < high and (low, high) != Reward.range, f"range={reward.range} does not say what scores lie between")
    wanted(reward.higher_is_better, "higher must be better: score the negative")
    wanted(
        (reward.licence is None) == (reward.weights is None), "`licence` and `weights` come together, where a network is loaded"
    )
    wanted(reward.weights is not None or reward.weights_bytes == 0, "weights_bytes without weights")
    if samples is None:
        wanted(reward.input == "pixels", "a reward on latents is checked on samples= of its own")
        samples = five_images()
        if reward.modality == "video":
            samples = torch.stack([samples.roll(3 * k, -1) * (1 - 0.1 * k) for k in range(4)], 1)
    texts, every = list(prompts), list(range(len(samples)))
    count = len(every)
    kept, random_state = samples.clone(), torch.get_rng_state()

    def fresh() -> Reward:
        one = make()
        with torch.inference_mode(False):
            one.prepare(texts, ctx)
        return one

    reward.prepare(texts, ctx)

    def scored(by: Reward, rows: list[int], words: Sequence[str] | None = None) -> Tensor:
        with torch.no_grad():
            shown = samples if rows == every else samples[rows]
            return by.score(shown, [texts[i] for i in rows] if words is None else words, ctx)

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=close, atol=close, equal_nan=True)

    scores = scored(reward, every)
    wanted(scores.shape == (count,) and scores.dtype == torch.float32, f"scores are {scores.dtype} {list(scores.shape)}")
    wanted(bool(((scores >= low) & (scores <= high)).all()), f"scores {scores.tolist()} leave its range {reward.range}")
    wanted(len(set(scores.tolist())) > 1, "five different samples have one score")
    back = every[::-1]
    if reward.pooled:  # of a pool, in which the order plays no part
        wanted(torch.equal(scored(reward, back)[back], scores), "the order of a pool changes its scores")
        return
    if not reward.deterministic:
        _check_gradient(reward, samples, texts, ctx, wanted)
        return
    wanted(torch.equal(samples, kept), "scoring changes the samples")
    wanted(torch.equal(torch.get_rng_state(), random_state), "it draws from the global random state")
    wanted(torch.equal(scored(reward, every), scores), "the same samples have other scores the second time")
    wanted(same(scored(fresh(), every), scores), "a new object scores otherwise")
    wanted(same(scored(reward, back)[back], scores), "the order of samples changes their scores")
    for size in range(1, count):
        parts = torch.cat([scored(reward, every[i : i + size]) for i in range(0, count, size)])
        wanted(same(parts, scores), f"chunks of {size} have other scores than all together")
    _check_features(reward, samples, ctx, wanted, same)
    turned = scored(reward, every, texts[::-1])
    said = "prompts matter, and needs_prompt is False" if not reward.needs_prompt else "needs_prompt, and no prompt matters"
    wanted(torch.equal(turned, scores) != reward.needs_prompt, said)
    late = fresh()
    with torch.inference_mode():
        late.score(samples, texts, ctx)
    for one in (reward, late):
        live = _check_gradient(one, samples, texts, ctx, wanted)
        wanted(same(live, scores), "scores with a gradient differ from those without")


def _check_features(
    reward: Reward,
    samples: Tensor,
    ctx: Context,
    wanted: Callable[[bool, str], None],
    same: Callable[[Tensor, Tensor], bool],
) -> None:
    """If it has features of images, are they (N, D) numbers, a sample's own, and not those of another sample?"""
    features: Callable[[Tensor, Context], Tensor] | None = getattr(reward, "image_features", None)
    if features is None:
        return
    with torch.no_grad():
        found, apart = features(samples, ctx), torch.cat([features(x[None], ctx) for x in samples])
    wanted(found.ndim == 2 and len(found) == len(samples), f"image_features are {list(found.shape)}; wanted one row a sample")
    wanted(bool(found.isfinite().all()), "image_features are no numbers")
    wanted(same(found, apart), "image_features of a sample depend on what is shown beside it")
    wanted(len(torch.unique(found, dim=0)) == len(samples), "image_features of different samples are the same")


def _check_gradient(
    reward: Reward, samples: Tensor, texts: Sequence[str], ctx: Context, wanted: Callable[[bool, str], None]
) -> Tensor:
    """Has it a gradient if and only if it says so? Returns the scores."""
    x = samples.clone().requires_grad_()
    with torch.enable_grad():
        live = reward.score(x, texts, ctx)
    wanted(live.requires_grad == reward.differentiable, f"differentiable={reward.differentiable} is not so")
    if reward.differentiable:
        (gradient,) = torch.autograd.grad(live.sum(), x)
        finite = bool(gradient.isfinite().all()) and math.isfinite(float(gradient.abs().sum()))
        wanted(finite and bool(gradient.flatten(1).any(1).all()), "a gradient is zero, or no number")
    return live.detach()
