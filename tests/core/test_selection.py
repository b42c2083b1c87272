"""Scoring and choosing: what rewards are shown, what they may return, who is blamed, and who is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsteer import DiffsteerError, SteeredPipeline, steered
from diffsteer.ledger import Ledger
from diffsteer.reward import Reward
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.selection import Scorer, choose
from diffsteer.types import Context, RewardError

PROMPTS = ["a red circle", "two stars"]


class OnLatents(Reward):
    name, input = "on_latents", "latents"

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        return samples.mean((1, 2, 3))


class OnPixels(OnLatents):
    name, input = "on_pixels", "pixels"


class Returns(Reward):
    name = "returns"

    def __init__(self, what: Callable[[Tensor, Sequence[str]], Any]) -> None:
        self.what = what

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        found: Tensor = self.what(samples, prompts)
        return found


def scored(what: Callable[[Tensor, Sequence[str]], Any], samples: int = 4) -> Tensor:
    return Scorer(Returns(what), lambda z: z, PROMPTS, Ledger()).score(torch.ones(samples, 3, 2, 2), 1, 2)


@pytest.mark.parametrize("sampler", [FeynmanKac(2), BestOfN(2), None])
def test_a_reward_is_never_shown_what_it_does_not_look_at(toy_pipeline: Any, sampler: Any) -> None:
    full = SteeredPipeline(toy_pipeline, sampler, OnLatents())
    latent = SteeredPipeline(toy_pipeline, sampler, OnLatents(), choice=OnPixels(), decoder="none")
    for pipe, said in ((full, "on_latents looks at latents"), (latent, "on_pixels looks at pixels")):
        with pytest.raises(DiffsteerError, match=said):
            pipe(PROMPTS, num_inference_steps=3, seed=0)
    for decoder, reward in ((toy_pipeline, OnLatents()), ("none", OnPixels())):
        with pytest.raises(DiffsteerError, match="looks at"):
            steered(toy_pipeline.scheduler, FeynmanKac(2), reward=reward, decoder=decoder, prompts=PROMPTS)


def test_arrays_and_lists_are_scores_too() -> None:
    for what in (lambda x, p: x.mean((1, 2, 3)).numpy(), lambda x, p: [1.0] * len(x), lambda x, p: x.mean((1, 2, 3))):
        assert torch.equal(scored(what), torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(RewardError, match="returned shape"):
        scored(lambda x, p: 1.0)
    with pytest.raises(RewardError, match="raised"):
        scored(lambda x, p: "seven")


def test_the_prompt_that_fails_is_named_and_no_other_is() -> None:
    def one_fails(x: Tensor, prompts: Sequence[str]) -> Tensor:
        if PROMPTS[1] in prompts:
            raise ValueError("no stars")
        return x.mean((1, 2, 3))

    def only_together(x: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(x) > 1:
            raise MemoryError("too many")
        return x.mean((1, 2, 3))

    with pytest.raises(RewardError, match="ValueError for the prompt 'two stars' after step 1 of 2"):
        scored(one_fails)
    with pytest.raises(RewardError, match="MemoryError for 4 samples together after step 1 of 2"):
        scored(only_together)


def test_the_best_is_chosen_among_those_with_weight() -> None:
    rewards = torch.tensor([[0.0, 1.0, 9.0, math.nan], [3.0, -math.inf, 5.0, 4.0]], dtype=torch.float64)
    lost = -math.inf
    weights = torch.tensor([[0.0, 0.0, lost, lost], [lost, lost, lost, lost]], dtype=torch.float64)
    assert choose("best", rewards, weights, 0, (0, 1)).tolist() == [1, 2]


def test_a_particle_lost_on_the_way_is_not_chosen(toy_pipeline: Any) -> None:
    """No resampling after its NaN, and the highest reward at the end."""
    calls = []

    def late_bloomer(x: Tensor, prompts: object) -> Tensor:
        calls.append(len(x))
        scores = torch.zeros(len(x))
        scores[3] = math.nan if len(calls) == 1 else 9.0
        return scores

    sampler = FeynmanKac(4, events=[0.5], scale=1.0, target_ess=None)
    out = SteeredPipeline(toy_pipeline, sampler, late_bloomer)(PROMPTS[:1], num_inference_steps=4, seed=0)
    assert out.rewards[0, 3] == 9 and out.log_weights[0, 3] == -math.inf and int(out.chosen[0]) != 3


def test_a_ledger_says_what_it_did_not_see() -> None:
    assert str(Ledger(decodes=4)) == "denoiser not counted, 4 decodes, 0 reward calls"
    assert str(Ledger(evaluations=8, forwards=2)).startswith("8 evaluations, 2 forwards, 0 decodes")


def test_peak_memory_is_that_of_the_run() -> None:
    big = torch.ones(300_000_000 // 4)
    first = Ledger().open()
    del big
    first.close()
    second = Ledger().open()
    second.close()
    assert second.peak_memory < first.peak_memory - 100_000_000
