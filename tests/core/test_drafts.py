"""Drafts: cheap versions searched, the best few made in full and ranked anew, on the embedded model and on toys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffsteer import DiffsteerError, SteeredPipeline, load_pipeline
from diffsteer.budget import Budget
from diffsteer.draft import DEFAULT, Draft, draft_of
from diffsteer.rewards import Compressibility
from diffsteer.samplers import DNO, Beam, BestOfN, RandomSearch, ReNO, SuccessiveHalving, ZeroOrder
from diffsteer.toy import GaussianMixture

MODEL = GaussianMixture([-1.0, 0.8], [0.35, 0.5]).model("vp")
STEPS = 12


def reward(x: Tensor, prompts: object) -> Tensor:
    return -(x[:, 0] - 1.6).square()


def test_random_search_drafts_by_default_and_others_do_not() -> None:
    assert draft_of(None, RandomSearch()) is DEFAULT and draft_of(None, ZeroOrder()) is None
    assert draft_of(False, RandomSearch()) is None and draft_of(True, ZeroOrder()) is DEFAULT


def test_the_finals_are_the_full_chains_of_the_drafts_noises() -> None:
    out = SteeredPipeline(MODEL, RandomSearch(8), reward, draft=Draft(steps=3, finalists=3))(
        ["a"], num_inference_steps=STEPS, seed=2
    )
    pool = SteeredPipeline(MODEL, BestOfN(8, eta=0.0), reward)(["a"], num_inference_steps=STEPS, seed=2)
    found = out.trace.searches[0]
    assert len(found.outcomes) == 3 and out.ledger.evaluations == 8 * 3 + 3 * STEPS
    for value in out.rewards[0].tolist():
        assert min(abs(value - r) for r in pool.rewards[0].tolist()) < 1e-5
    short = SteeredPipeline(MODEL, BestOfN(8, eta=0.0), reward)(["a"], num_inference_steps=3, seed=2)
    assert found.gap is not None and found.gap.drafts[0] == pytest.approx(float(short.rewards.max()), abs=1e-5)
    assert sorted(found.gap.finals, reverse=True) == pytest.approx(sorted(out.rewards[0].tolist(), reverse=True))
    assert found.gap.mean == pytest.approx(sum(found.gap.finals) / 3 - sum(found.gap.drafts) / 3)


def test_drafts_that_are_the_real_thing_have_no_gap_and_cost_nothing_again() -> None:
    """With a cheaper reward alone the finalists' states are scored anew: no chain is taken twice."""
    wrong = lambda x, p: x[:, 0]  # noqa: E731
    out = SteeredPipeline(MODEL, RandomSearch(8, diversity=0.0), reward, draft=Draft(reward=wrong, finalists=4))(
        ["a"], num_inference_steps=STEPS, seed=2
    )
    assert out.ledger.evaluations == 8 * STEPS and out.ledger.reward_calls == 12
    pool = SteeredPipeline(MODEL, BestOfN(8, eta=0.0), reward)(["a"], num_inference_steps=STEPS, seed=2)
    top = pool.samples[0, :, 0].sort(descending=True).values[:4]
    best = max(top.tolist(), key=lambda v: -((v - 1.6) ** 2))
    assert float(out.samples[0, 0]) == pytest.approx(best, abs=1e-5)
    same = SteeredPipeline(MODEL, RandomSearch(8), reward, draft=Draft(steps=STEPS))(["a"], num_inference_steps=STEPS, seed=2)
    assert same.trace.searches[0].gap.mean == pytest.approx(0, abs=1e-5) and same.trace.searches[0].gap.kept_first


def test_searches_with_noise_on_the_way_draft_by_reward_alone() -> None:
    for search in (Beam(2, 2), DNO(iterations=2), SuccessiveHalving(4, eta=1.0)):
        with pytest.raises(DiffsteerError, match="no function of the first noise"):
            SteeredPipeline(MODEL, search, reward, draft=Draft(steps=3))
        out = SteeredPipeline(MODEL, search, reward, draft=Draft(reward=lambda x, p: x[:, 0], finalists=2))(
            ["a"], num_inference_steps=STEPS, seed=2
        )
        assert out.trace.searches[0].gap is not None
        torch.testing.assert_close(out.rewards[0].float(), reward(out.samples[0], None))


@pytest.mark.parametrize("evals", [STEPS + 4, 60, 100, 333])
@pytest.mark.parametrize("search", [RandomSearch(4), ZeroOrder(2), SuccessiveHalving(4), ReNO(iterations=3)],
                         ids=lambda s: s.name)  # fmt: skip
def test_finals_are_inside_the_budget(search: Any, evals: int) -> None:
    steered = SteeredPipeline(MODEL, search, reward, budget=Budget(evals=evals), draft=Draft(steps=4))
    out = steered(["a", "b"], num_inference_steps=STEPS, seed=2)
    for found in out.trace.searches:
        assert found.spent.evals <= evals and 1 <= len(found.gap.finals) <= max(1, evals // 2 // STEPS)
    assert out.samples.isfinite().all()


def test_a_model_for_drafts_must_start_from_like_noise() -> None:
    class Other:
        pass

    wide = GaussianMixture([0.0], [1.0]).model("vp")
    wide.shape = (2,)
    with pytest.raises(DiffsteerError, match="not aligned"):
        SteeredPipeline(MODEL, RandomSearch(2), reward, draft=Draft(model=wide, steps=2))(["a"], num_inference_steps=4, seed=0)
    near = GaussianMixture([-1.0, 0.8], [0.35, 0.5]).model("vp")
    out = SteeredPipeline(MODEL, ReNO(iterations=4, rate=0.3), reward, draft=Draft(model=near, steps=2, finalists=1))(
        ["a"], num_inference_steps=STEPS, seed=0
    )
    assert out.ledger.evaluations == 4 * 2 + 3 * 2 + STEPS  # three gradients on the fast model, one chain on the full


@pytest.mark.parametrize("wrong, said", [
    ({"steps": 2, "share": 0.5}, "two lengths"), ({"steps": 0}, "steps=0"), ({"share": 1.5}, "share=1.5"),
    ({"finalists": 0}, "finalists=0"), ({"decoder": "small"}, "decoder='small'"), ({"call": {"a": 1}}, "give model="),
    ({"steps": 2.5}, "no whole number"),
])  # fmt: skip
def test_wrong_drafts(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(DiffsteerError, match=said):
        Draft(**wrong)


def test_on_the_embedded_model_drafts_find_what_full_chains_find() -> None:
    pipe = load_pipeline("shapes")
    prompts = ["a red circle"] * 2
    out = SteeredPipeline(pipe, RandomSearch(6, diversity=0.0), Compressibility(), draft=Draft(steps=4, finalists=2))(
        prompts, num_inference_steps=8, seed=0
    )
    assert out.ledger.evaluations == 2 * (6 * 4 * 2 + 2 * 8 * 2) and out.ledger.decodes == 2 * (6 + 2)
    assert out.images is not None and len(out.images) == 2
    full = SteeredPipeline(pipe, BestOfN(6, eta=0.0), Compressibility())(prompts, num_inference_steps=8, seed=0)
    assert bool((out.rewards.max(1).values >= full.rewards.median(1).values).all())
    assert (
        SteeredPipeline(pipe, RandomSearch(6), Compressibility(), draft=Draft(steps=4, finalists=2)).estimate(2, 8).evaluations
        == out.ledger.evaluations
    )
    seconds = SteeredPipeline(pipe, RandomSearch(6), Compressibility()).estimate(1, 8, rehearse="a star")
    assert seconds.seconds["denoiser"] > 0 and seconds.peak_memory > 0


@pytest.mark.parametrize(
    "scheduler", ["EulerAncestralDiscreteScheduler", "LCMScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"]
)
def test_a_noise_makes_the_same_picture_again_whatever_the_scheduler(scheduler: str) -> None:
    """Solvers that draw noise are replaced by the deterministic transition; those that remember their steps are kept."""
    import diffusers

    pipe = load_pipeline("shapes")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    steered = SteeredPipeline(pipe, RandomSearch(3), Compressibility(), draft=Draft(steps=6, finalists=3))
    found = steered("a red circle", num_inference_steps=6, seed=1).trace.searches[0]
    assert found.gap is not None and found.gap.drafts == pytest.approx(found.gap.finals, abs=1e-3)


def test_a_solver_with_noise_of_its_own_is_refused() -> None:
    with pytest.raises(DiffsteerError, match="noise of its own"):
        SteeredPipeline(load_pipeline("shapes"), RandomSearch(2), Compressibility(), transition="native")


def test_a_model_for_drafts_keeps_its_own_grid() -> None:
    """A schedule is that of the pipeline which is steered."""
    from diffsteer.schedules import Karras

    small = GaussianMixture([-1.0, 0.8], [0.35, 0.5]).model("vp")
    drafts = Draft(model=small, steps=4)
    found = [
        SteeredPipeline(MODEL, RandomSearch(4), reward, draft=drafts, schedule=schedule)(
            ["a"], num_inference_steps=steps, seed=2
        ).trace.searches[0]
        for schedule, steps in ((None, 8), (Karras(), 8), ([8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.2], None))
    ]
    drafted = [{f.drafted.slot: f.drafted.reward for f in each.outcomes} for each in found]
    assert drafted[0] == drafted[1] == drafted[2]
