"""What every method must keep, and what may go wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, EARLY, FIXED, OFF
from torch import Tensor

from diffsteer import DiffsteerError, RewardError, SteeredPipeline
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.toy import GaussianMixture
from diffsteer.types import Problem, Sampler, Step

MODEL = GaussianMixture([-1.0, 0.8], [0.35, 0.5]).model("vp")
Make = Callable[[int], Sampler]
WRONG: Callable[[Any], Any] = lambda value: value  # noqa: E731  # of a type that mypy would refuse


def position(x: Tensor, prompts: object) -> Tensor:
    return x[:, 0]


def problem(groups: int = 1, last_noise: int = 9) -> Problem:
    return Problem(groups, 10, last_noise, 0, tuple(range(groups)))


def play(sampler: Sampler, rewards: list[Tensor], groups: int | None = None, last_noise: int = 9):  # type: ignore[no-untyped-def]
    """Feed a sampler with given rewards (P, K), one an event, the last one final."""
    state = sampler.init(problem(len(rewards[0]), last_noise))
    infos = []
    for n, r in enumerate(rewards, 1):
        state, info = sampler.apply(state, Step(n, n == len(rewards), r.double()))
        infos.append(info)
    return state, infos


def fixed(potential: str = "difference", k: int = 4, **options: object) -> FeynmanKac:
    return FeynmanKac(k, potential, **{**FIXED, **options})


@pytest.mark.parametrize("name", CASES)
def test_one_particle_is_the_plain_chain(name: str) -> None:
    """With one particle, or switched off where a method changes the chain itself."""
    make, _ = CASES[name]
    sampler = OFF[name] if name in OFF else make(1)
    plain = SteeredPipeline(MODEL, BestOfN(1), position)(["a", "b"], num_inference_steps=8, seed=3)
    out = SteeredPipeline(MODEL, sampler, position)(["a", "b"], num_inference_steps=8, seed=3)
    assert torch.equal(out.samples, plain.samples)


def test_scale_zero_is_the_chain_without_selection() -> None:
    plain = SteeredPipeline(MODEL, BestOfN(4), position)(["a", "b"], num_inference_steps=8, seed=3)
    for sampler in (FeynmanKac(4, scale=0.0, target_ess=None, trigger="always"), FeynmanKac(4, scale=0.0)):
        out = SteeredPipeline(MODEL, sampler, position)(["a", "b"], num_inference_steps=8, seed=3)
        assert torch.equal(out.samples, plain.samples)
        assert torch.equal(out.log_weights, plain.log_weights) and torch.equal(out.log_z, torch.zeros(2))


@pytest.mark.parametrize("name", CASES)
def test_prompts_do_not_meet(name: str) -> None:
    """P > 1 equals P runs of one, if ids are the same; ancestors never leave their group."""
    make, _ = CASES[name]
    pipe = SteeredPipeline(MODEL, make(4), position)
    both = pipe(["a", "b", "c"], num_inference_steps=10, seed=1, ids=["x", "y", "z"])
    for i, id in enumerate("xyz"):
        alone = pipe(["abc"[i]], num_inference_steps=10, seed=1, ids=[id])
        torch.testing.assert_close(alone.samples[0], both.samples[i])
        torch.testing.assert_close(alone.log_weights[0], both.log_weights[i])
        torch.testing.assert_close(alone.log_z[0], both.log_z[i])


@pytest.mark.parametrize("name", CASES)
def test_declared_cost_is_counted_cost(name: str) -> None:
    make, _ = CASES[name]
    for chunk in (None, 5):
        pipe = SteeredPipeline(MODEL, make(3), position, chunk=chunk)
        said, out = pipe.estimate(4, 10), pipe(["a"] * 4, num_inference_steps=10, seed=0)
        assert out.ledger.counts == said.counts
        recurs = getattr(make(3), "recurrence", 1) > 1
        assert said.evaluations > 120 if recurs else said.evaluations == 120


@pytest.mark.parametrize("name", CASES)
def test_facts_are_declared(name: str) -> None:
    sampler = CASES[name][0](2)
    assert isinstance(sampler, Sampler) and sampler.source and isinstance(sampler.exact, bool)
    assert sampler.schedule(10)[-1] == 10 and list(sampler.schedule(10)) == sorted(set(sampler.schedule(10)))


@pytest.mark.parametrize("name", CASES)
def test_weights_sum_to_one_and_nothing_is_changed_in_place(name: str) -> None:
    sampler = CASES[name][0](4)
    state = sampler.init(problem(2))
    rewards = torch.randn(2, 4, dtype=torch.float64)
    kept = (state.log_weights.clone(), rewards.clone())
    after, info = sampler.apply(state, Step(3, False, rewards))
    assert torch.equal(state.log_weights, kept[0]) and torch.equal(rewards, kept[1])
    torch.testing.assert_close(info.log_weights.exp().sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(after.log_weights.exp().sum(1), torch.ones(2, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------- what may go wrong


def test_nan_rewards_lose() -> None:
    rewards = torch.tensor([[math.nan, 1.0, 0.0, -math.inf]])
    state, infos = play(fixed(trigger="always"), [rewards, torch.zeros(1, 4)])
    assert set(infos[0].ancestors[0].tolist()) <= {1, 2}
    state, _ = play(fixed(), [rewards])
    assert state.log_weights.exp()[0].tolist()[0] == 0 == state.log_weights.exp()[0].tolist()[3]
    for tempered in (FeynmanKac(4), FeynmanKac(4, trigger="always")):
        state, _ = play(tempered, [rewards, torch.tensor([[math.nan, 0.3, 0.2, 0.1]])])
        assert state.log_weights.exp().sum() == pytest.approx(1) and state.log_weights[0, 0] == -math.inf


def test_all_nan_warns_and_goes_uniform() -> None:
    lost = torch.full((2, 4), math.nan)
    lost[1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with pytest.warns(UserWarning, match="no finite reward in group 0 after step 1"):
        state, infos = play(fixed(threshold=0.01), [lost, torch.zeros(2, 4)])
    torch.testing.assert_close(infos[0].log_weights[0].exp(), torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(infos[0].log_weights[1], lost[1].double().log_softmax(0))
    assert torch.isfinite(state.log_z).all()
    for worst in (math.nan, -math.inf):
        for sampler in (fixed(threshold=0.01), FeynmanKac(4, threshold=0.51), FeynmanKac(4, scale=0.0)):
            with pytest.warns(UserWarning, match="no finite reward"):
                after, _ = play(sampler, [torch.full((1, 4), worst), torch.zeros(1, 4)])
            torch.testing.assert_close(after.log_weights.exp(), torch.full((1, 4), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_every_method_warns_of_a_group_without_rewards(name: str) -> None:
    def blind_to_b(x: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([math.nan if p == "b" else 1.0 for p in prompts]) + 0 * x[:, 0]

    pipe = SteeredPipeline(MODEL, CASES[name][0](3), blind_to_b)
    with pytest.warns(UserWarning, match="no finite reward in group 1 after step 6") as said:
        out = pipe(["a", "b"], num_inference_steps=6, seed=0)
    assert {w.filename for w in said} == {__file__}
    assert out.chosen[1] == 0 and bool(out.samples.isfinite().all())


def test_an_event_without_rewards_changes_neither_statistic_nor_exponent() -> None:
    r, lost = torch.tensor([[-0.3, -0.1, -0.4, -0.2]]), torch.full((1, 4), math.nan)
    with pytest.warns(UserWarning, match="after step 2"):
        _, infos = play(fixed("max", threshold=0.01), [r, lost, r - 1, r - 1])
    torch.testing.assert_close(infos[2].log_weights, (2 * r.double()).log_softmax(1))  # the running maximum is still r
    with pytest.warns(UserWarning, match="after step 1"):
        state, infos = play(FeynmanKac(4, scale=2.0), [lost, r])
    assert float(infos[0].exponent) == 0 and 0 < float(state.exponent) <= 2


def test_an_event_without_rewards_keeps_the_carried_weights() -> None:
    r, lost = torch.tensor([[3.0, 0.0, 0.0, -math.inf]]), torch.full((1, 4), math.nan)
    with pytest.warns(UserWarning, match="after step 2"):
        state, _ = play(fixed(threshold=0.01), [r, lost, r])
    torch.testing.assert_close(state.log_weights, r.double().log_softmax(1))


@pytest.mark.parametrize("rewards", [[1.0, -math.inf, -math.inf, -math.inf], [1.0, 1.0, 1.0, 0.0], [0.0, 5.0, 5.0, 5.0]])
def test_tempering_with_ties_and_with_the_dead(rewards: list[float]) -> None:
    r = torch.tensor([rewards])
    state, infos = play(FeynmanKac(4, trigger="always"), [r, r])
    worst = r[0] == r[0].min()
    assert (infos[0].log_weights[0].exp()[worst] < 1e-3).all() and infos[0].exponent.max() < 100
    assert not set(infos[0].ancestors[0].tolist()) & set(worst.nonzero()[:, 0].tolist())
    assert torch.isfinite(state.log_z).all()


def test_two_particles_are_steered_too() -> None:
    """target_ess * K = 1 can always be had: the better of two takes over."""
    _, infos = play(FeynmanKac(2), [torch.tensor([[0.0, 5.0]]), torch.zeros(1, 2)])
    assert infos[0].ancestors.tolist() == [[1, 1]]


def test_nothing_is_resampled_once_no_noise_is_to_come() -> None:
    strong = torch.tensor([[50.0, 0.0, 0.0, 0.0]])
    _, infos = play(fixed(trigger="always"), [strong, strong, strong], last_noise=1)
    assert [bool(i.resampled.any()) for i in infos] == [True, False, False]


def test_a_failing_reward_is_named_with_prompt_and_step() -> None:
    def broken(x: Tensor, prompts: list[str]) -> Tensor:
        if "b" in prompts:
            raise RuntimeError("out of paint")
        return x[:, 0]

    with pytest.raises(RewardError, match="broken raised RuntimeError for the prompt 'b' after step 6 of 10: out of paint"):
        SteeredPipeline(MODEL, FeynmanKac(2), broken)(["a", "b"], num_inference_steps=10, seed=0)
    for bad, message in ((lambda x, p: x, "wanted"), (lambda x, p: x[:, 0] * 0 + math.inf, r"is \+inf for the prompt 'a'")):
        with pytest.raises(RewardError, match=message):
            SteeredPipeline(MODEL, FeynmanKac(2), bad)(["a"], num_inference_steps=10, seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeynmanKac(eta=0.0), r"eta=0; .* set eta in \(0, 1\]"),
        (lambda: FeynmanKac(0), "particles=0"),
        (lambda: FeynmanKac(WRONG(2.5)), "particles=2.5 is no whole number"),
        (lambda: FeynmanKac(WRONG("4")), "particles='4' is no whole number"),
        (lambda: FeynmanKac(eta=WRONG("x")), "eta='x' is no number"),
        (lambda: BestOfN(True), "particles=True is no whole number"),
        (
            lambda: SteeredPipeline(MODEL, FeynmanKac(), position)(["a"], num_inference_steps=WRONG(2.5)),
            "num_inference_steps=2.5",
        ),
        (lambda: SteeredPipeline(MODEL, FeynmanKac(), position)(["a"], seed=WRONG(1.5)), "seed=1.5 is no whole number"),
        (lambda: FeynmanKac(potential="maximum"), "'maximum' is unknown; valid: difference, max, sum, immediate"),
        (lambda: FeynmanKac(potential="max"), "set scale and target_ess=null"),
        (lambda: FeynmanKac(target_ess=None), "set scale"),
        (lambda: FeynmanKac(target_ess=1.5), "in \\(0, 1\\)"),
        (lambda: FeynmanKac(threshold=0.4), "must exceed target_ess"),
        (lambda: FeynmanKac(scale=math.nan), "finite"),
        (lambda: FeynmanKac(resampling="magic"), "systematic"),
        (lambda: FeynmanKac(trigger="never"), "ess, always"),
        (lambda: FeynmanKac(events=[0.5, 1.5]), "fractions"),
        (lambda: FeynmanKac(events=0), "whole number"),
        (lambda: BestOfN(0), "particles=0"),
        (lambda: BestOfN(eta=2.0), "eta=2"),
        (lambda: SteeredPipeline(MODEL, FeynmanKac()), "give reward="),
        (lambda: SteeredPipeline(MODEL, FeynmanKac(), position, output="top"), "best, draw, all"),
        (lambda: SteeredPipeline(MODEL, FeynmanKac(), position)([]), "no prompts"),
        (lambda: SteeredPipeline(MODEL, FeynmanKac(), position)(["a"], guidance_scale=3), "takes no argument 'guidance_scale'"),
        (lambda: SteeredPipeline(MODEL, FeynmanKac(), position)(["a"], num_inference_steps=5000), "1 to 1000"),
    ],
)
def test_bad_values_are_refused_with_one_clear_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(DiffsteerError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_events_by_fractions_counts_and_all() -> None:
    assert FeynmanKac(events=[0.2, 0.5, 0.999]).schedule(10) == (2, 5, 10)
    assert FeynmanKac(events=4).schedule(10) == (4, 8, 10)
    assert FeynmanKac(events="all").schedule(4) == (1, 2, 3, 4)
    assert FeynmanKac().schedule(1) == (1,)


def test_outputs_are_explicit() -> None:
    run = {
        o: SteeredPipeline(MODEL, fixed(), position, output=o)(["a"] * 300, num_inference_steps=6, seed=0)
        for o in ("best", "draw", "all")
    }
    best = run["best"]
    assert torch.equal(best.chosen, best.rewards.argmax(1)) and torch.equal(best.chosen, run["all"].chosen)
    drawn = run["draw"].rewards.gather(1, run["draw"].chosen[:, None]).mean()
    expected = (best.log_weights.exp() * best.rewards).sum(1)
    spread = (best.log_weights.exp() * (best.rewards - expected[:, None]) ** 2).sum(1).mean().sqrt() / 300**0.5
    assert abs(float(drawn - expected.mean())) < 4 * float(spread)
    assert torch.equal(best.samples, run["draw"].samples)


def test_lineage_follows_the_ancestors() -> None:
    out = SteeredPipeline(MODEL, FeynmanKac(4, events=EARLY), position)(["a", "b"], num_inference_steps=20, seed=2)
    lineage = out.trace.lineage()
    assert lineage.shape == (6, 2, 4)
    roots = torch.arange(4).expand(2, 4)
    for ancestors in out.trace.ancestors:
        roots = torch.stack([r[a] for r, a in zip(roots, ancestors, strict=True)])
    assert torch.equal(lineage[-1], roots)


def test_same_seed_same_result_and_generator_is_the_seed() -> None:
    pipe = SteeredPipeline(MODEL, FeynmanKac(4), position)
    first = pipe(["a"], num_inference_steps=6, seed=11)
    second = pipe(["a"], num_inference_steps=6, generator=torch.Generator("cpu").manual_seed(11))
    other = pipe(["a"], num_inference_steps=6, seed=12)
    assert torch.equal(first.samples, second.samples) and not torch.equal(first.samples, other.samples)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(["a"], num_inference_steps=6)


def test_the_reward_may_be_asked_something_else() -> None:
    def length(x: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([float(len(p)) for p in prompts])

    pipe = SteeredPipeline(MODEL, FeynmanKac(2), length)
    assert pipe(["", "abc"], num_inference_steps=4, seed=0, reward_prompts=["four", "fives"]).rewards.tolist() == [
        [4, 4],
        [5, 5],
    ]
    with pytest.raises(DiffsteerError, match="1 reward_prompts for 2"):
        pipe(["", "abc"], reward_prompts=["x"])
