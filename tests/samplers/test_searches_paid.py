"""What a budget pays for: comparisons, drafts whose finals cost no chain, a single plain run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from searches import MODEL, STEPS, reward
from searches import played as run
from torch import Tensor

from diffsteer import DiffsteerError, SteeredPipeline
from diffsteer.budget import Budget
from diffsteer.draft import Draft
from diffsteer.judging import Duel
from diffsteer.samplers import Beam, BestOfN, Evolutionary, RandomSearch, Stages, SuccessiveHalving, ZeroOrder
from diffsteer.trial import Search
from diffsteer.types import Context


class Falls(Duel):
    input = "latents"

    def compare(self, a: Tensor, b: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        return (a[:, 0] < b[:, 0]).double()


@pytest.mark.parametrize("search", [RandomSearch(3), ZeroOrder(2, 3), SuccessiveHalving(4), Beam(2, 2),
                                    Evolutionary((0.0, 0.4), (5, 3, 3)), Stages([RandomSearch(2), ZeroOrder(2, 2)])],
                         ids=lambda s: s.name)  # fmt: skip
@pytest.mark.parametrize("calls", [1, 7, 24])
def test_comparisons_alone_are_a_budget(search: Search, calls: int) -> None:
    out = run(search, ["a"], budget=Budget(reward_calls=calls), reward=Falls())
    assert out.ledger.reward_calls <= calls and out.ledger.reward_calls == out.trace.searches[0].spent.reward_calls
    assert calls == 1 or out.ledger.reward_calls > calls - 8


def test_a_budget_pays_for_drafts_whose_finals_cost_no_chain() -> None:
    cheap = Draft(reward=lambda x, p: x[:, 0])
    out = run(RandomSearch(1), ["a"], budget=Budget(evals=STEPS), draft=cheap)
    assert out.ledger.evaluations == STEPS and out.ledger.reward_calls == 2
    with pytest.raises(DiffsteerError, match=f"that takes evals={STEPS}, decodes=0, reward_calls=2"):
        run(RandomSearch(1), ["a"], budget=Budget(evals=STEPS, reward_calls=1), draft=cheap)


@pytest.mark.parametrize("budget", [Budget(evals=STEPS), Budget(evals=STEPS + 3), Budget(reward_calls=1)], ids=str)
def test_a_budget_of_one_plain_run_pays_for_the_default_search(budget: Budget) -> None:
    """There is nothing left for drafts, which nobody asked for."""
    steered = SteeredPipeline(MODEL, RandomSearch(), reward, budget=budget)
    out = steered(["a"], num_inference_steps=STEPS, seed=3)
    plain = SteeredPipeline(MODEL, BestOfN(1, eta=0.0), reward)(["a"], num_inference_steps=STEPS, seed=3)
    assert torch.equal(out.samples[0], plain.samples[0]) and out.ledger.evaluations == STEPS
    said = steered.estimate(1, STEPS).counts
    assert said["evaluations"] == STEPS and said["reward_calls"] == 1
    with pytest.raises(DiffsteerError, match="does not pay for one sample"):
        run(RandomSearch(), ["a"], budget=budget, draft=Draft(share=1 / 3))
