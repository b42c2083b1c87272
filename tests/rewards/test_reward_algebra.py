"""Sums of rewards: the numbers, the facts, and what cannot be added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from diffsteer.reward import FunctionReward, Reward, as_reward
from diffsteer.types import Context, DiffsteerError

CTX = Context()


class Mean(Reward):
    name = "mean"
    differentiable = True

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        return samples.flatten(1).mean(1)


class Largest(Reward):
    name = "largest"
    differentiable = True

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        return samples.flatten(1).amax(1)


class Words(Reward):
    """Counts words; remembers the prompts that it was prepared for."""

    name = "words"
    needs_prompt = True
    deterministic: ClassVar[bool] = False

    def __init__(self) -> None:
        self.prepared: list[str] = []

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        self.prepared += prompts

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        return torch.tensor([float(len(p.split())) for p in prompts])


class OnLatents(Mean):
    name = "on_latents"
    input = "latents"


PROMPTS = ["a star", "a red star", "star"]
COUNTS = torch.tensor([2.0, 3.0, 1.0])


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_sum_and_weights(x: Tensor) -> None:
    mean = x.flatten(1).mean(1)
    cases: list[tuple[Reward, Tensor]] = [
        (Mean() + Words(), mean + COUNTS),
        (Mean() + 0.5 * Words(), mean + 0.5 * COUNTS),
        (Mean() * 3 + Words(), 3 * mean + COUNTS),
        (Mean() - Words(), mean - COUNTS),
        (2 * (Mean() - 0.25 * (Words() + Mean())), 2 * (mean - 0.25 * (COUNTS + mean))),
        (Words() - (Mean() - Words()), 2 * COUNTS - mean),
    ]
    for reward, expected in cases:
        torch.testing.assert_close(reward.score(x, PROMPTS, CTX), expected)


def test_nested_sums_are_flat_and_leave_their_parts_alone() -> None:
    a, b = Mean(), Words()
    inner = a + 0.5 * b
    outer = 2 * inner + 3 * a
    assert [(w, r) for w, r in outer.terms] == [(2, a), (1, b), (3, a)]  # type: ignore[attr-defined]
    assert [(w, r) for w, r in inner.terms] == [(1, a), (0.5, b)]  # type: ignore[attr-defined]
    assert outer.name == "2*mean + 1*words + 3*mean"


@pytest.mark.parametrize(
    ("reward", "facts"),
    [
        (Mean() + Largest(), {"differentiable": True, "deterministic": True, "needs_prompt": False, "input": "pixels"}),
        (Mean() + Words(), {"differentiable": False, "deterministic": False, "needs_prompt": True, "input": "pixels"}),
        (2 * OnLatents(), {"differentiable": True, "deterministic": True, "needs_prompt": False, "input": "latents"}),
    ],
)
def test_facts_of_sums(reward: Reward, facts: dict[str, Any]) -> None:
    assert {key: getattr(reward, key) for key in facts} == facts
    assert not (Reward.differentiable or Reward.needs_prompt) and Reward.deterministic  # the class keeps its own


def test_gradient_of_a_sum(x: Tensor) -> None:
    x.requires_grad_()
    (gradient,) = torch.autograd.grad((Mean() - 2 * Mean()).score(x, PROMPTS, CTX).sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, -1 / 48))


def test_prepare_reaches_every_term() -> None:
    a, b = Words(), Words()
    (Mean() + 0.5 * (a - b)).prepare(PROMPTS, CTX)
    assert a.prepared == b.prepared == PROMPTS


def test_pixels_and_latents_do_not_mix() -> None:
    with pytest.raises(DiffsteerError, match="rewards on latents and pixels cannot be added"):
        Mean() + OnLatents()
    with pytest.raises(DiffsteerError, match="latents and pixels"):
        Mean() - 0.5 * (OnLatents() + OnLatents())


def test_bare_callables(x: Tensor) -> None:
    def brightness(samples: Tensor, prompts: Sequence[str]) -> Tensor:
        return samples.mean((1, 2, 3)) * len(prompts)

    reward = as_reward(brightness)
    assert isinstance(reward, FunctionReward)
    assert (reward.name, reward.input, reward.needs_prompt) == ("brightness", "pixels", True)
    torch.testing.assert_close(reward.score(x, PROMPTS, CTX), 3 * x.mean((1, 2, 3)))
    both = reward + 0.5 * Words()
    torch.testing.assert_close(both.score(x, PROMPTS, CTX), 3 * x.mean((1, 2, 3)) + 0.5 * COUNTS)
    assert as_reward(lambda s, p: s, "latents").input == "latents"
    plain: Any = lambda s, p: [1.0, 2.0, 3.0]  # noqa: E731
    assert as_reward(plain).score(x, PROMPTS, CTX).tolist() == [1.0, 2.0, 3.0]


def test_callable_objects_are_named_by_their_class(x: Tensor) -> None:
    class Judge:
        def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.arange(len(prompts))

    reward = as_reward(Judge())
    assert reward.name == "Judge"
    assert reward.score(x, PROMPTS, CTX).tolist() == [0, 1, 2]


def test_as_reward_leaves_rewards_alone() -> None:
    reward = Mean()
    assert as_reward(reward) is reward
    assert as_reward(reward, "latents").input == "pixels"


@pytest.mark.parametrize("wrong", [Mean, 3.0, "clip_score", None])
def test_as_reward_refuses(wrong: Any) -> None:
    with pytest.raises(TypeError, match="a reward is a Reward object or a callable"):
        as_reward(wrong)


def test_a_reward_without_score_says_so(x: Tensor) -> None:
    class Idle(Reward):
        pass

    with pytest.raises(TypeError, match=r"Idle does not define score"):
        Idle().score(x, PROMPTS, CTX)
