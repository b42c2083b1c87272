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
from diffsteer.diversity import best_diverse
from diffsteer.draft import Draft
from diffsteer.judging import Duel
from diffsteer.reward import Reward
from diffsteer.rewards import Brightness
from diffsteer.samplers import DNO, Beam, BestOfN, RandomSearch, ReNO, SuccessiveHalving, ZeroOrder
from diffsteer.search_run import maximise
from diffsteer.types import Context
from diffsteer.warn import warn

pytestmark = pytest.mark.filterwarnings("ignore:.*was stopped after")


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


def stopped_at(*at: int, of_rows: bool = False) -> tuple[CallableModel, Callable[[], int]]:
    """A model whose calls of these numbers are Ctrl-C, and how many there were, or how many rows it did."""
    calls, rows = [0], [0]

    def fn(x: Tensor, t: Tensor, conditions: list[Any]) -> Tensor:
        calls[0] += 1
        if calls[0] in at:
            raise KeyboardInterrupt
        rows[0] += len(x)
        return MODEL.fn(x, t, conditions)

    told = lambda: rows[0] if of_rows else calls[0]  # noqa: E731
    return CallableModel(fn, MODEL.prediction, MODEL.path, MODEL.shape, MODEL.alphas_cumprod), told


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
        model, ran = stopped_at(at, of_rows=True)
        out = played(search, ["a", "b"], budget, model, draft=draft)
        found = out.trace.searches
        assert "interrupted" in {f.stopped for f in found} and out.samples.isfinite().all()
        for row, f in zip(out.rewards.tolist(), found, strict=True):
            assert row[0] == max(row) and f.outcomes[0].final and len(f.outcomes) >= 1
            assert not draft or f.gap is not None
            assert f.spent.evals <= (limit or 10**9) + STEPS  # one chain, where what was spent was lost
        assert sum(f.spent.evals for f in found) == out.ledger.evaluations == ran() and out.interrupted
        best = [float(reward(s[None], [""])[0]) for s in out.samples[torch.arange(2), out.chosen]]
        assert best == pytest.approx(out.rewards.max(1).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("search", [RandomSearch(6), SuccessiveHalving(6), ReNO(iterations=4)], ids=lambda s: s.name)
def test_before_there_is_anything_it_is_the_first_chain_and_that_is_said(search: Any) -> None:
    model, count = stopped_at(3)
    with pytest.warns(UserWarning, match="1 of 1 prompts, which have nothing yet, get a plain chain"):
        out = played(search, ["a"], Budget(evals=200), model)
    first = played(RandomSearch(1), ["a"])
    found = out.trace.searches[0]
    assert found.stopped == "interrupted" and found.scored == 1 and count() == 3 + STEPS
    torch.testing.assert_close(out.samples, first.samples, rtol=1e-4, atol=1e-4)


def test_a_second_one_ends_at_once_where_a_prompt_has_nothing() -> None:
    model, count = stopped_at(5, 9)
    with pytest.raises(KeyboardInterrupt):
        played(RandomSearch(6), ["a", "b"], None, model)
    assert count() == 9


def test_every_one_of_them_is_told_where_it_was_called() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for chunk, at in ((6, 2 * STEPS + 1), (6, 2 * STEPS + 2), (6, 2 * STEPS + 3)):  # every prompt has a sample
            steered = SteeredPipeline(stopped_at(at)[0], RandomSearch(9), reward, draft=False, chunk=chunk)
            assert steered(["a", "b"], num_inference_steps=STEPS, seed=3).interrupted
    assert len(said) == 3 and {w.filename for w in said} == {__file__}
    assert not any("plain chain" in str(w.message) for w in said)


def test_where_warnings_are_errors_the_result_is_not_lost() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert played(RandomSearch(6), ["a"], None, stopped_at(5)[0]).interrupted
        with pytest.raises(UserWarning, match="was stopped after 41 evaluations"):
            warn("it was stopped after 41 evaluations")


@pytest.mark.parametrize("number, chunk, at, rows", [(1, 8, 6, 5 + STEPS), (5, 4, 18, 4 * STEPS + 5)])
def test_rows_that_fill_up_a_block_are_not_counted_as_spent(number: int, chunk: int, at: int, rows: int) -> None:
    how = {"chunk": chunk, "deterministic": True}
    model, ran = stopped_at(at, of_rows=True)
    out = played(RandomSearch(number), ["a"], Budget(evals=number * STEPS), model, **how)
    assert out.trace.searches[0].spent.evals == out.ledger.evaluations == rows
    assert out.ledger.padding == ran() - rows


class Leaving(Duel):
    """Ctrl-C at some of its calls."""

    input = "latents"

    def __init__(self, *at: int) -> None:
        self.at, self.calls = at, 0

    def compare(self, a: Tensor, b: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        self.calls += 1
        if self.calls in self.at:
            raise KeyboardInterrupt
        return (a[:, 0] > b[:, 0]).float()


@pytest.mark.parametrize("search", [RandomSearch(6), SuccessiveHalving(6), Beam(2, 2)], ids=lambda s: s.name)
@pytest.mark.parametrize("draft", [False, Draft(steps=6, finalists=2), Draft(reward=Leaving(), finalists=2)])
def test_in_a_tournament_one_is_not_two(search: Any, draft: Any) -> None:
    if draft and draft.steps and not search.of_noise:
        draft = Draft(finalists=2)
    for at in (1, 2, 3, 5):
        judge = Leaving(at)
        out = played(search, ["a", "b"], None, reward=judge, draft=draft)
        assert all(f.gap is not None or not draft for f in out.trace.searches)
        assert out.interrupted == (judge.calls >= at)


def test_a_tournament_after_a_stop_can_be_stopped_too() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, count = stopped_at(8 * STEPS + 5)
        judge = Leaving(1)
        out = played(RandomSearch(6), ["a", "b"], None, model, reward=judge, chunk=1)
    assert out.interrupted and len(said) == 1 and count() == 8 * STEPS + 5 and judge.calls == 3  # the other prompt's


@pytest.mark.parametrize("search, draft", [
    (RandomSearch(2), False), (ReNO(iterations=3), False), (ReNO(iterations=3, checkpoint=False), False), (DNO(), False),
    (RandomSearch(2), Draft(steps=2, finalists=2)), (ReNO(iterations=3), Draft(steps=2, finalists=2)),
])  # fmt: skip
@pytest.mark.parametrize("at", [0, 2])
def test_a_user_s_callback_that_ends_the_pipeline_is_asked_for_nothing_more(
    toy_pipeline: Any, search: Any, at: int, draft: Any
) -> None:
    steps: list[int] = []

    def enough(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        if len(steps) > at:
            pipe._interrupt = True
        return {}

    steered = SteeredPipeline(toy_pipeline, search, Brightness(), draft=draft)
    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt, match="a callback interrupted the pipeline"):
        warnings.simplefilter("error", UserWarning)
        steered("a star", num_inference_steps=4, seed=0, callback_on_step_end=enough)
    assert len(steps) == at + 1


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_callback_that_ends_a_later_round_leaves_those_before(toy_pipeline: Any, checkpoint: bool) -> None:
    for at in (9, 14, 18):
        steps: list[int] = []

        def enough(pipe: Any, step: int, t: Any, tensors: dict[str, Any], at: int = at, steps: Any = steps) -> dict[str, Any]:
            steps.append(step)
            if len(steps) > at:
                pipe._interrupt = True
            return {}

        search = ReNO(iterations=9, checkpoint=checkpoint, patience=0)
        steered = SteeredPipeline(toy_pipeline, search, Brightness(), draft=False)
        out = steered("a star", num_inference_steps=4, seed=0, callback_on_step_end=enough)
        found = out.trace.searches[0]
        assert out.interrupted and found.scored == (at + 1) // 4 and out.samples.isfinite().all()
        assert found.spent.evals == out.ledger.evaluations


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
    assert found.stopped == "interrupted" and found.scored == 14 and found.spent.evals == 15 * STEPS
    assert out.rewards.max() == pytest.approx(float(pool.rewards.max()), abs=1e-5)


def test_an_interrupt_within_the_drafts_still_makes_one_in_full_and_one_within_the_finals_keeps_those_before() -> None:
    drafts = played(RandomSearch(16), ["a"], draft=Draft(steps=4, finalists=4), reward=Stopping(15), chunk=1)
    finals = played(RandomSearch(16), ["a"], draft=Draft(steps=4, finalists=4), reward=Stopping(19), chunk=1)
    for out, made in ((drafts, 1), (finals, 2)):
        found = out.trace.searches[0]
        assert found.stopped == "interrupted" and found.gap is not None and len(found.gap.finals) == made
    assert drafts.trace.searches[0].spent.evals == 15 * 4 + STEPS and finals.trace.searches[0].spent.evals == 16 * 4 + 3 * STEPS


@pytest.mark.parametrize("chunk", [None, 1])
def test_within_the_finals_every_prompt_still_has_one_of_the_full_size(chunk: int | None) -> None:
    """Drafts of another reward, or of another size, are no results."""
    draft = Draft(steps=4, finalists=3, reward=lambda x, p: 100 + x[:, 0])
    whole, count = stopped_at()
    played(RandomSearch(5), ["a", "b"], None, whole, draft=draft, chunk=chunk)
    begun = 4 * (10 if chunk else 1)
    for at in (begun + 1, (begun + count()) // 2, count()):
        out = played(RandomSearch(5), ["a", "b"], None, stopped_at(at)[0], draft=draft, chunk=chunk)
        assert out.interrupted and all(f.gap is not None for f in out.trace.searches) and float(out.rewards.max()) <= 0
    with pytest.raises(KeyboardInterrupt):
        played(RandomSearch(5), ["a", "b"], None, stopped_at(begun + 1, begun + 2)[0], draft=draft, chunk=chunk)


def test_at_the_very_end_what_was_found_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def late(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return best_diverse(*args, **kwargs)

    monkeypatch.setattr("diffsteer.playing.best_diverse", late)
    out = played(RandomSearch(6), ["a", "b"], draft=Draft(steps=4, finalists=2))
    assert out.interrupted and [f.scored for f in out.trace.searches] == [8, 8] and all(f.gap for f in out.trace.searches)


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
    assert sum(f.spent.evals for f in out.trace.searches) == out.ledger.evaluations
    with pytest.raises(KeyboardInterrupt):
        played(SuccessiveHalving(12, events=(0.5, 0.75)), ["a", "b"], budget, stopped_at(STEPS - 1, STEPS + 1)[0])
