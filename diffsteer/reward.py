"""What a reward is: a score and its facts. Rewards add and scale: ``ClipScore() + 0.5 * Aesthetic()``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffsteer.types import Context, DiffsteerError

RewardFunction = Callable[[Tensor, Any], Tensor]  # (samples (N, ...), N prompts) -> (N,)


class Reward:
    """A reward. Subclasses set the facts that differ and write `score`; one that looks at images through a network may have
    ``image_features(samples, ctx) -> (N, D)``, too, by which `diffsteer evaluate` compares them.

    Attributes:
        name: as in the registry.
        input: "pixels", (N, 3, H, W) in [0, 1], or "latents", what the model denoises (with ``decoder="none"``).
        modality: "image": it scores a video by the mean over its frames, and refuses sound. "video": clips alone. "any": it
            is shown what there is.
        range: what scores lie between.
        higher_is_better: always so; a quantity to be lowered is scored by its negative.
        differentiable: autograd reaches the samples. deterministic: equal samples get equal scores.
        needs_prompt: the score depends on the prompt.
        waits: scores are waited for, and not computed on this machine.
        pooled: a score depends on what is scored with it: of ranks and duels. All others score each sample alone.
        taps: modules of the denoiser whose outputs `score_features` reads where guidance goes through the network.
        licence, weights, weights_bytes: of the network that it loads, where that comes from, and about how much is fetched;
            None and 0 without one.
    """

    name: ClassVar[str] = "reward"
    input: ClassVar[str] = "pixels"
    modality: ClassVar[str] = "image"
    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    higher_is_better: ClassVar[bool] = True
    differentiable: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = False
    licence: ClassVar[str | None] = None
    weights: ClassVar[str | None] = None
    weights_bytes: ClassVar[int] = 0
    waits: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    taps: tuple[str, ...] = ()

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        """Called once before a run: load what is needed, refuse prompts that cannot be scored (`DiffsteerError`). It may be
        called while another thread scores what was made before: what a cache drops here, `score` may still be about to
        read."""

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Score samples (N, ...), one prompt each. Returns (N,) float32. NaN loses."""
        raise TypeError(f"{type(self).__name__} does not define score(samples, prompts, ctx)")

    def rate(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """`score`; of a video (N, F, 3, H, W), where the reward is one of images, the mean over its frames."""
        if samples.ndim != 5 or self.modality != "image" or self.input != "pixels":
            return self.score(samples, prompts, ctx)
        frames = samples.shape[1]
        return self.score(samples.flatten(0, 1), [p for p in prompts for _ in range(frames)], ctx).view(-1, frames).mean(1)

    def __add__(self, other: Reward | RewardFunction) -> Reward:
        return WeightedSum([*terms_of(self), *terms_of(as_reward(other, self.input))])

    def __radd__(self, other: Any) -> Reward:
        starts_a_sum = isinstance(other, int) and other == 0
        return self if starts_a_sum else as_reward(other, self.input) + self

    def __mul__(self, weight: float) -> Reward:
        return WeightedSum([(weight * w, r) for w, r in terms_of(self)])

    __rmul__ = __mul__

    def __sub__(self, other: Reward | RewardFunction) -> Reward:
        return self + -1.0 * as_reward(other, self.input)


class WeightedSum(Reward):
    """Rewards added, each with a weight; what it can do is what all of them can. Range, licence and weights are the
    terms' own.

    Raises:
        DiffsteerError: rewards on pixels and rewards on latents.
    """

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        self.terms = list(terms)
        rewards = [r for _, r in self.terms]
        pooled = next((r.name for r in rewards if r.pooled), None)
        if pooled is not None:
            raise DiffsteerError(f"{pooled} only ranks and cannot be added to other rewards: put them into the ensemble")
        inputs = {r.input for r in rewards}
        if len(inputs) > 1:
            raise DiffsteerError(f"rewards on {' and '.join(sorted(inputs))} cannot be added: they see different samples")
        # facts of an instance: what is a class attribute elsewhere depends on the terms here
        self.__dict__.update(
            name=" + ".join(f"{w:g}*{r.name}" for w, r in self.terms),
            input=inputs.pop(),
            modality="any",
            differentiable=all(r.differentiable for r in rewards),
            deterministic=all(r.deterministic for r in rewards),
            needs_prompt=any(r.needs_prompt for r in rewards),
        )

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        for _, reward in self.terms:
            reward.prepare(prompts, ctx)

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """The weighted sum of the terms' scores, (N,)."""
        return torch.stack([w * r.rate(samples, prompts, ctx) for w, r in self.terms]).sum(0)


class ZScore(Reward):
    """A reward in standard deviations from its mean, both over unguided samples: rewards of unlike scales then add up.

    Args:
        mean, std: None until `diffsteer.calibration.calibrated` has measured them.

    Raises:
        DiffsteerError: a deviation that is not above 0, a reward without a scale; when scoring, one that was not measured.
    """

    def __init__(self, reward: Reward, mean: float | None = None, std: float | None = None) -> None:
        if (mean is None) != (std is None) or (std is not None and not std > 0):
            raise DiffsteerError(f"z({reward.name}): mean={mean}, std={std}; wanted both, std above 0, or none")
        if reward.pooled:
            raise DiffsteerError(f"z({reward.name}): ranks have one scale already")
        if reward.taps:
            raise DiffsteerError(f"z({reward.name}): it reads features on the way, of which no samples are at hand")
        self.reward, self.mean, self.std = reward, mean, std
        facts = ("input", "differentiable", "deterministic", "needs_prompt", "licence", "weights", "weights_bytes")
        self.__dict__.update(name=f"z({reward.name})", modality="any", **{fact: getattr(reward, fact) for fact in facts})

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        self.reward.prepare(prompts, ctx)

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """(score - mean) / std, (N,)."""
        if self.mean is None or self.std is None:
            raise DiffsteerError(f"{self.name} has no scale yet: calibrated(reward, pipe, prompts) measures it")
        return (self.reward.rate(samples, prompts, ctx) - self.mean) / self.std


class FunctionReward(Reward):
    """A bare callable ``r(samples, prompts) -> (N,)`` as a reward."""

    def __init__(self, function: RewardFunction, input: str = "pixels") -> None:
        self.function = function
        self.__dict__.update(
            name=getattr(function, "__name__", type(function).__name__), input=input, modality="any", needs_prompt=True
        )

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """What the function returns, as (N,) float32."""
        return torch.as_tensor(self.function(samples, prompts)).float()


def as_reward(reward: Reward | RewardFunction, input: str = "pixels") -> Reward:
    """A reward from a reward or from a bare callable; `input` is what a callable is given.

    Raises:
        TypeError: neither.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, type) or not callable(reward):
        raise TypeError(f"a reward is a Reward object or a callable r(samples, prompts) -> (N,), not {reward!r}")
    return FunctionReward(reward, input)


def prepare(reward: Reward, prompts: Sequence[str], ctx: Context) -> None:
    """`Reward.prepare`, outside inference mode: what is loaded there may be asked for a gradient another time."""
    with torch.inference_mode(False):
        reward.prepare(prompts, ctx)


def check_gradient(reward: Reward) -> None:
    """Refuse a reward, or a sum with a term, that says it has no gradient. Of a bare callable nobody knows before it is called.

    Raises:
        DiffsteerError: with its name.
    """
    for term in leaves(reward):
        if not term.differentiable and not isinstance(term, FunctionReward):
            raise DiffsteerError(f"guidance follows the gradient of the reward, and {term.name} has none: take one that has")


def scores_images(reward: Reward) -> bool:
    """Is it, or one of the terms of a sum, a reward of images alone?"""
    return any(r.modality == "image" and r.input == "pixels" for r in leaves(reward))


def is_elsewhere(device: torch.device, *rewards: Reward | None) -> bool:
    """Does one of them score on another machine, or on another device than this one?"""
    for reward in (leaf for r in rewards if r is not None for leaf in leaves(r)):
        named = getattr(reward, "device", None)
        own = device if named is None else torch.device(named)
        apart = own.type != device.type or (None not in (own.index, device.index) and own.index != device.index)
        if reward.waits or apart:
            return True
    return False


def leaves(reward: Reward) -> list[Reward]:
    """The rewards that a sum is made of, z-scores opened."""
    return [leaf for _, r in terms_of(reward) for leaf in (leaves(r.reward) if isinstance(r, ZScore) else [r])]


def terms_of(reward: Reward) -> list[tuple[float, Reward]]:
    """A sum's rewards with their weights; of any other itself."""
    return reward.terms if isinstance(reward, WeightedSum) else [(1.0, reward)]
