"""Ctrl-C at any moment returns the best so far, a sample for every prompt; a second one ends at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from searches import MODEL, SEARCHES, STEPS, peaks, played, reward
from torch import Tensor

from diffsteer import SteeredPipeline
from diffsteer.budget import Budget
from diffsteer.callable import CallableModel
from diffsteer.draft import Draft
from diffsteer.reward import Reward
from diffsteer.samplers import BestOfN, RandomSearch, ReNO, SuccessiveHalving, ZeroOrder
from diffsteer.search_run import maximise
from diffsteer.types import Context

pytestmark = pytest.mark.filterwarnings("ignore:stopped before there was a sample")


class Stopping(Reward):
    """Ctrl-C at some of its calls."""

    name, input, modality = "stopping", "latents", "any"

    def __init__(self, *at: int) -> None:
        self.at, self.calls = at, 0

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        self.calls += 1
        if self.calls in self.at:
            raise KeyboardInterrupt
        found: Tensor = reward(samples, prompts)
        return found


def stopped_at(*at: int) -> tuple[CallableModel, Callable[[], int]]:
    """A model whose calls of these numbers are Ctrl-C, and how many there were."""
    calls = [0]

    def fn(x: Tensor, t: Tensor, conditions: list[Any]) -> Tensor:
        calls[0] += 1
        if calls[0] in at:
            raise KeyboardInterrupt
        return MODEL.fn(x, t, conditions)

    return CallableModel(fn, MODEL.prediction, MODEL.path, MODEL.shape, MODEL.alphas_cumprod), lambda: calls[0]


SHORT = Draft(steps=5, finalists=2)
KINDS = ((False, None), (False, 130), (SHORT, 130))
PLAYS = [(n, draft, most) for n, (s, _) in SEARCHES.items() for draft, most in KINDS if not draft or s.of_noise]


@pytest.mark.parametrize(("name", "draft", "limit"), PLAYS)
def test_at_any_moment_every_prompt_has_a_sample(name: str, draft: Any, limit: int | None) -> None:
    search, budget = SEARCHES[name][0], Budget(evals=limit) if limit else None
    quiet, count = stopped_at()
    played(search, ["a", "b"], budget, quiet, draft=draft)
    whole = count()
    for at in sorted({1, 2, 3, STEPS, *range(1, whole, max(1, whole // 6)), whole}):
        model, _ = stopped_at(at)
        out = played(search, ["a", "b"], budget, model, draft=draft)
        found = out.trace.searches
        assert "interrupted" in {f.stopped for f in found} and out.samples.isfinite().all()
        for row, f in zip(out.rewards.tolist(), found, strict=True):
            assert row[0] == max(row) and f.outcomes[0].final and len(f.outcomes) >= 1
            assert limit is None or f.spent.evals <= limit
        best = [float(reward(s[None], [""])[0]) for s in out.samples[torch.arange(2), out.chosen]]
        assert best == pytest.approx(out.rewards.max(1).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("search", [RandomSearch(6), SuccessiveHalving(6), ReNO(iterations=4)], ids=lambda s: s.name)
def test_before_there_is_anything_it_is_the_first_chain_and_that_is_said(search: Any) -> None:
    model, count = stopped_at(3)
    with pytest.warns(UserWarning, match="those that have none get a plain one"):
        out = played(search, ["a"], Budget(evals=200), model)
    first = played(RandomSearch(1), ["a"])
    found = out.trace.searches[0]
    assert found.stopped == "interrupted" and found.scored == 1 and found.spent.evals == STEPS and count() == 3 + STEPS
    torch.testing.assert_close(out.samples, first.samples, rtol=1e-4, atol=1e-4)


def test_a_second_one_ends_at_once_where_a_prompt_has_nothing() -> None:
    model, count = stopped_at(5, 9)
    with pytest.raises(KeyboardInterrupt):
        played(RandomSearch(6), ["a", "b"], None, model)
    assert count() == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        played(RandomSearch(6), ["a", "b"], None, stopped_at(2 * STEPS + 1)[0], chunk=6)  # all have one: nothing is said


def test_a_user_s_callback_that_ends_the_pipeline_is_asked_for_nothing_more(toy_pipeline: Any) -> None:
    def enough(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    steered = SteeredPipeline(toy_pipeline, RandomSearch(2), lambda x, p: x.flatten(1).mean(1), draft=False)
    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt, match="a callback interrupted|^$"):
        warnings.simplefilter("error", UserWarning)
        steered("a star", num_inference_steps=4, seed=0, callback_on_step_end=enough)


@pytest.mark.parametrize("which", ["choice", "holdout"])
def test_while_what_is_kept_is_scored_anew_the_search_s_own_result_stays(which: str) -> None:
    whole = played(RandomSearch(6, keep=3), ["a", "b"])
    with pytest.warns(UserWarning, match="scored anew"):
        out = played(RandomSearch(6, keep=3), ["a", "b"], None, MODEL, **{which: Stopping(1)})
    assert torch.equal(out.samples, whole.samples) and torch.equal(out.chosen, whole.chosen) and not out.held_out
    assert {f.stopped for f in out.trace.searches} == {"interrupted"}


def test_a_choice_that_was_made_stays_though_who_looks_on_was_stopped() -> None:
    worst = lambda x, p: -reward(x, p)  # noqa: E731
    with pytest.warns(UserWarning, match="scored anew"):
        out = played(RandomSearch(6, keep=3, diversity=0.0), ["a"], choice=worst, holdout=Stopping(1))
    assert out.chosen.tolist() == [2]


def test_in_a_later_round_it_keeps_the_rounds_before() -> None:
    out = played(ZeroOrder(2, 50), ["a"], reward=Stopping(4))
    found = out.trace.searches[0]
    assert found.stopped == "interrupted" and found.scored == 5 and float(out.rewards.max()) == found.history[-1][2]
    with pytest.raises(KeyboardInterrupt):
        played(ZeroOrder(2, 50), ["a"], reward=Stopping(1, 2))


@pytest.mark.parametrize("budget", [None, Budget(evals=999)], ids=["once", "budget"])
def test_an_interrupt_within_a_round_keeps_what_it_had_made(budget: Budget | None) -> None:
    out = played(RandomSearch(16), ["a"], budget, reward=Stopping(15), chunk=1)
    found = out.trace.searches[0]
    pool = SteeredPipeline(MODEL, BestOfN(14, eta=0.0), reward)(["a"], num_inference_steps=STEPS, seed=3)
    assert found.stopped == "interrupted" and found.scored == 14 and found.spent.evals == 14 * STEPS
    assert out.rewards.max() == pytest.approx(float(pool.rewards.max()), abs=1e-5)


def test_an_interrupt_within_the_drafts_still_makes_one_in_full_and_one_within_the_finals_keeps_those_before() -> None:
    drafts = played(RandomSearch(16), ["a"], draft=Draft(steps=4, finalists=4), reward=Stopping(15), chunk=1)
    finals = played(RandomSearch(16), ["a"], draft=Draft(steps=4, finalists=4), reward=Stopping(19), chunk=1)
    for out, made in ((drafts, 1), (finals, 2)):
        found = out.trace.searches[0]
        assert found.stopped == "interrupted" and found.gap is not None and len(found.gap.finals) == made
    assert drafts.trace.searches[0].spent.evals == 14 * 4 + STEPS and finals.trace.searches[0].spent.evals == 16 * 4 + 2 * STEPS


def test_an_interrupt_keeps_what_a_function_said() -> None:
    calls: list[int] = []

    def tired(z: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return peaks(z)

    found = maximise(tired, (4,), RandomSearch(16))
    assert found.stopped == "interrupted" and found.scored == 6


def test_at_the_end_of_a_budget_the_best_that_is_under_way_is_still_finished() -> None:
    """The budget ends on the way: what is brought to its end then is one block."""
    budget = Budget(evals=100)
    whole = played(SuccessiveHalving(12, events=(0.5, 0.75)), ["a", "b"], budget, stopped_at()[0])
    quiet, count = stopped_at()
    played(SuccessiveHalving(12, events=(0.5, 0.75)), ["a", "b"], budget, quiet)
    assert [f.stopped for f in whole.trace.searches] == ["budget"] * 2 and count() == STEPS
    out = played(SuccessiveHalving(12, events=(0.5, 0.75)), ["a", "b"], budget, stopped_at(STEPS - 1)[0])
    assert [f.stopped for f in out.trace.searches] == ["interrupted"] * 2 and out.rewards.shape == (2, 1)
    assert all(f.spent.evals <= 100 for f in out.trace.searches)
    with pytest.raises(KeyboardInterrupt):
        played(SuccessiveHalving(12, events=(0.5, 0.75)), ["a", "b"], budget, stopped_at(STEPS - 1, STEPS + 1)[0])
