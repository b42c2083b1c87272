"""How searches end: at a stage's share, converged; what is told of them then."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from searches import MODEL, STEPS, peaks, played, reward
from torch import Tensor

from diffsteer import SteeredPipeline
from diffsteer.budget import Budget, Stopwatch
from diffsteer.draft import Draft
from diffsteer.ground import Ask, FunctionGround
from diffsteer.judging import Duel, RankEnsemble
from diffsteer.playing import Run
from diffsteer.reward import Reward
from diffsteer.samplers import DNO, DFlow, FeynmanKac, RandomSearch, ReNO, SearchOverPaths, Stages, ZeroOrder
from diffsteer.samplers.noise_gradient import NoiseGradient
from diffsteer.search_run import maximise
from diffsteer.searching import explore
from diffsteer.trial import Outcome
from diffsteer.types import Context


def other(x: Tensor, prompts: object) -> Tensor:
    return -x[:, 0].abs()


def taller(x: Tensor, prompts: object) -> Tensor:
    return x[:, 0]


def ensemble(*rewards: Any) -> RankEnsemble:
    return RankEnsemble([Latent(r) for r in rewards])


class Latent(Reward):
    """A function of latents as a reward that may be ranked."""

    name, input, modality = "latent", "latents", "any"

    def __init__(self, function: Any) -> None:
        self.function = function

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        found: Tensor = self.function(samples, prompts).float()
        return found


class Taller(Duel):
    input = "latents"

    def compare(self, a: Tensor, b: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        return (a[:, 0] > b[:, 0]).float()


def listening(hear: Callable[[Any], None]) -> Any:
    """A random search that tells of the place it begins in."""

    class Listens(RandomSearch):
        def search(self, arena: Any) -> Any:
            hear(arena)
            yield from super().search(arena)

    return Listens


# ----------------------------------------------------------------------------------------------------- stages


def test_shares_are_of_what_the_finals_leave() -> None:
    begins: list[int] = []
    Listens = listening(lambda arena: begins.append(arena.purse.spent.evals))

    stages = Stages([Listens(2), Listens(2), Listens(2)])
    played(stages, ["a"], Budget(evals=240), draft=Draft(steps=4, finalists=10))
    assert begins == [0, 40, 80]


@pytest.mark.parametrize("evals", [60, 72, 84])
def test_a_stage_that_ends_on_the_way_brings_its_best_state_to_the_end(evals: int) -> None:
    handed: list[int] = []
    Listens = listening(lambda arena: handed.append(len(arena.starts)))

    out = played(Stages([SearchOverPaths(2, 2, back=2, ahead=4), Listens(2)]), ["a"], Budget(evals=evals))
    assert handed == [1] and out.trace.searches[0].spent.evals <= evals


def test_particles_that_a_share_ends_are_handed_on_too() -> None:
    handed: list[int] = []
    Listens = listening(lambda arena: handed.append(len(arena.starts)))

    played(Stages([FeynmanKac(4, events=(0.3, 0.6)), Listens(2)]), ["a"], Budget(evals=8 * STEPS - 4 * 4))
    assert handed and handed[0] >= 1


@pytest.mark.parametrize("each", [3.0, 4.0])
def test_a_stage_of_gradients_keeps_to_the_clock(each: float) -> None:
    """A pass back is taken for two evaluations; where it takes three, half of the time may be mistaken by a third."""
    now = [0.0]

    class Slow(FunctionGround):
        def carry(self, asks: Sequence[Ask]) -> list[Outcome]:
            now[0] += sum(each if trial.gradient is not False else 1.0 for _, _, trial in asks)
            return super().carry(asks)

    for limit in (60.0, 100.0):
        now[0] = 0.0
        watch = Stopwatch(limit, lambda: now[0])
        stages = Stages([RandomSearch(4), ReNO(noises=16, checkpoint=False)])
        explore(stages, Slow(peaks, (4,)), Budget(seconds=limit), stopwatch=watch)
        assert 0.8 * limit < now[0] <= limit + (each - 3) / 3 * limit / 2 + each, now[0]


# ------------------------------------------------------------------------------------------------ drafts' gap


@pytest.mark.parametrize(
    "full, draft",
    [(reward, ensemble(reward, taller)), (ensemble(reward, taller), reward), (Taller(), reward), (reward, Taller())],
    ids=["ranks, then a number", "a number, then ranks", "a number, then duels", "duels, then a number"],
)
def test_the_gap_is_told_by_the_judge_of_each(full: Any, draft: Any) -> None:
    out = played(RandomSearch(6), ["a"], draft=Draft(reward=draft, finalists=3), reward=full)
    gap = out.trace.searches[0].gap
    assert len(gap.drafts) == len(gap.finals) == 3
    assert all(map(math.isfinite, (*gap.drafts, *gap.finals))) and len(set(gap.finals)) > 1 and len(set(gap.drafts)) > 1


def test_ensembles_of_other_rewards_are_not_ranked_together() -> None:
    three = ensemble(reward, taller, other)
    out = played(RandomSearch(6), ["a"], draft=Draft(reward=ensemble(reward, other), finalists=3), reward=three)
    assert len(out.trace.searches[0].gap.finals) == 3


def test_drafts_that_are_scored_anew_keep_the_noise_that_they_came_from() -> None:
    class Far:
        evaluations = 0

        def __call__(self, noise: Tensor, session: Any, rows: Sequence[int]) -> Tensor:
            return noise * 0 + 9.0

    with pytest.warns(UserWarning, match="is not what the model was trained on"):
        out = played(RandomSearch(4), ["a"], draft=Draft(reward=reward), start=Far())
    assert out.trace.searches[0].diagnoses[0].radius > 50
    plain, drafted = (
        played(DNO(iterations=3, rate=0.5, regulariser=0.0), ["a"], draft=draft).trace.searches[0].diagnoses[0]
        for draft in (False, Draft(reward=reward, finalists=1))
    )
    assert drafted == plain


# ------------------------------------------------------------------------------------------------------ duels


def test_comparisons_are_declared_and_kept_for_the_finals() -> None:
    steered = SteeredPipeline(MODEL, RandomSearch(16), Taller(), draft=False)
    assert steered.estimate(1, STEPS).reward_calls == 240
    assert steered(["a"], num_inference_steps=STEPS, seed=0).ledger.reward_calls == 240
    budget = Budget(evals=400, reward_calls=60)
    out = played(RandomSearch(16), ["a"], budget, reward=Taller(), draft=Draft(steps=4, finalists=3))
    found = out.trace.searches[0]
    assert found.spent.reward_calls <= 60 and len(set(found.gap.finals)) == 3
    assert float(out.samples[0, 0, 0]) == float(out.samples[0, :, 0].max())


@pytest.mark.parametrize(("full", "draft"), [(Taller, taller), (taller, Taller), (Taller, Taller)])
def test_comparisons_are_declared_of_those_who_compare(full: Any, draft: Any) -> None:
    full, draft = (Latent(r) if r is taller else r() for r in (full, draft))
    steered = SteeredPipeline(MODEL, RandomSearch(8), full, draft=Draft(steps=4, finalists=3, reward=draft))
    counted = steered(["a"], num_inference_steps=STEPS, seed=0).ledger.reward_calls
    assert steered.estimate(1, STEPS).reward_calls == counted


class Leaving(Taller):
    """Ctrl-C at one of its calls."""

    def __init__(self, at: int) -> None:
        self.left = at

    def compare(self, a: Tensor, b: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().compare(a, b, prompts, ctx)


@pytest.mark.parametrize(("draft", "at"), [(False, 1), (False, 2), (Draft(steps=4, finalists=3), 3)])
def test_ctrl_c_in_a_tournament_keeps_what_was_made(draft: Any, at: int) -> None:
    out = played(RandomSearch(8), ["a"], reward=Leaving(at), draft=draft)
    found = out.trace.searches[0]
    assert found.stopped == "interrupted" and found.scored == (8 if not draft else 11) and len(found.outcomes) > 0
    assert found.spent.reward_calls == (0 if not draft else 56)


def test_drafts_end_with_the_comparisons() -> None:
    budget = Budget(evals=4000, reward_calls=100)
    found = played(RandomSearch(16), ["a"], budget, reward=Taller(), draft=Draft(steps=4, finalists=3)).trace.searches[0]
    assert found.spent.evals < 400 and found.stopped == "budget" and found.spent.reward_calls <= 100


def test_a_judge_that_says_nothing_in_one_order_is_heard_in_the_other() -> None:
    class Proud(Taller):
        def compare(self, a: Tensor, b: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
            won = super().compare(a, b, prompts, ctx)
            return won.masked_fill(won == 0, math.nan)

    said = Proud().score(torch.tensor([[0.0], [2.0], [1.0]]), ["a"] * 3, Context())
    assert said.argsort().tolist() == [0, 2, 1]


# ------------------------------------------------------------------------------------------------- convergence


@pytest.mark.parametrize("search", [
    ReNO(iterations=40, rate=1.0, clip=0.0, momentum=0.0, regulariser=0.0, tolerance=1e-4, patience=9),
    DNO(iterations=40, regulariser=0.0, tolerance=1e-4, patience=9, eta=0.0),
    DFlow(iterations=40, regulariser=0.0, tolerance=1e-4, length=0.01),
], ids=lambda s: s.name)  # fmt: skip
def test_steady_progress_is_no_convergence(search: NoiseGradient) -> None:
    """Each iteration gains less than the tolerance, several together more."""
    gains = played(search, ["a"], reward=lambda x, p: 0.01 * x[:, 0]).trace.searches[0].history
    assert len(gains) > 30 and gains[1][2] - gains[0][2] < search.tolerance
    flat = played(search, ["a"], reward=lambda x, p: 1e-9 * x[:, 0])
    assert flat.trace.searches[0].scored <= 11


# ------------------------------------------------------------------------------------------------ what is kept


def test_a_sample_that_was_made_twice_is_kept_once() -> None:
    out = played(Stages([RandomSearch(8), ZeroOrder(2, 2)], diversity=0.0), ["a"])
    rewards = out.rewards[0].tolist()
    assert len(set(rewards)) == len(rewards) == 4


def test_a_sample_that_rounding_told_apart_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Run.told

    def rounded(self: Run, outcomes: list[Outcome], *more: Any) -> None:
        for outcome in outcomes:
            outcome.x, outcome.reward = outcome.x + 1e-6 * len(outcomes), outcome.reward + 1e-6 * len(outcomes)
        told(self, outcomes, *more)

    monkeypatch.setattr(Run, "told", rounded)
    out = played(Stages([RandomSearch(8), ZeroOrder(1, 1)], diversity=0.0), ["a"])
    assert len({round(r, 4) for r in out.rewards[0].tolist()}) == 4


def test_outcomes_are_lightened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    light = Outcome.light

    def counted(self: Outcome, known: bool = False) -> Outcome:
        calls.append(0)
        return light(self, known)

    monkeypatch.setattr(Outcome, "light", counted)
    found = maximise(peaks, (4,), ZeroOrder(2), Budget(evals=300))
    assert found.scored == 300 and len(calls) <= 300


def test_a_search_of_very_many_trials_ends_with_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsteer.playing.SLOTS", 4096 + 50)
    found = maximise(peaks, (4,), RandomSearch(8), Budget(evals=999))
    assert found.scored == 50 and found.stopped == "budget"


def test_where_nothing_is_a_number_the_first_one_is_chosen() -> None:
    out = played(Stages([RandomSearch(2)]), ["a", "b"], reward=lambda x, p: x[:, 0] * math.nan)
    assert out.chosen.tolist() == [0, 0]
