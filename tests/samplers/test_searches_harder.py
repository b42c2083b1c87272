"""Where searches are easily wrong: what is left of a budget, ranks of pools, time, interruption, parts of gradients, stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from searches import MODEL, STEPS, peaks, played, reward
from torch import Tensor

from diffsteer import DiffsteerError, SteeredPipeline, load_pipeline
from diffsteer.algebra import level
from diffsteer.budget import Budget, Stopwatch
from diffsteer.callable import CallableModel
from diffsteer.draft import Draft
from diffsteer.ground import FunctionGround
from diffsteer.judging import Duel, RankEnsemble, mean_rank
from diffsteer.playing import Run
from diffsteer.prior import diagnose
from diffsteer.reward import Reward
from diffsteer.rewards import ClipScore, Compressibility
from diffsteer.samplers import (
    DNO,
    Beam,
    BestOfN,
    DepthFirst,
    DFlow,
    Evolutionary,
    FeynmanKac,
    RandomSearch,
    ReNO,
    Rollover,
    SearchOverPaths,
    Stages,
    SuccessiveHalving,
    ZeroOrder,
)
from diffsteer.search_run import maximise
from diffsteer.searching import explore
from diffsteer.toy import GaussianMixture, chain_law
from diffsteer.trial import Arena, Outcome, Search, Trial, along_ways
from diffsteer.types import Context


def run(search: Search, prompts: Sequence[str] = ("a",), budget: Budget | None = None, **options: Any) -> Any:
    return played(search, prompts, budget, **options)


# ---------------------------------------------------------------------------------------------- what is left


@pytest.mark.parametrize("search", [SuccessiveHalving(8), Beam(2, 4), SearchOverPaths(2, 2, back=2, ahead=4), Rollover(8, 3),
                                    Evolutionary((0.0, 0.4), (5, 3, 3))], ids=lambda s: s.name)  # fmt: skip
def test_what_a_pass_leaves_finishes_more(search: Search) -> None:
    """More budget never finishes fewer samples, and half a pass more finishes some more."""
    cost = search.evaluations(STEPS)
    finished = [run(search, budget=Budget(evals=int(cost * f))).trace.searches[0].scored for f in (1.0, 1.3, 1.6, 1.9)]
    assert finished == sorted(finished) and finished[2] > finished[0], finished


def test_what_limits_nothing_is_refused_and_not_gone_on_with_for_ever() -> None:
    with pytest.raises(DiffsteerError, match="decodes ends nothing here"):
        maximise(peaks, (4,), RandomSearch(4), Budget(decodes=3))
    with pytest.raises(DiffsteerError, match="does not pay for one sample"):
        run(RandomSearch(4), budget=Budget(evals=STEPS - 1, decodes=3))


def decoding() -> CallableModel:
    model = GaussianMixture([-1.0, 0.8], [0.35, 0.5]).model("vp")
    model.decode = lambda x: x * 1.0
    return model


@pytest.mark.parametrize("search", [RandomSearch(4), ZeroOrder(2, 2), Beam(2, 2), ReNO(iterations=4), SuccessiveHalving(4)],
                         ids=lambda s: s.name)  # fmt: skip
def test_decodes_are_a_budget_too(search: Search) -> None:
    out = run(search, ["a", "b"], Budget(decodes=7), model=decoding())
    spent = [f.spent.decodes for f in out.trace.searches]
    assert all(1 <= s <= 7 for s in spent) and sum(spent) == out.ledger.decodes


# ---------------------------------------------------------------------------------------------- ranks and duels


def test_the_best_of_the_whole_pool_is_kept_and_chosen() -> None:
    """Mean ranks depend on who is there: what is kept is never ranked again among itself."""
    rewards: list[Any] = [lambda x, p: x[:, 0], lambda x, p: -(x[:, 0] - 0.2).abs(), lambda x, p: (3 * x[:, 0]).sin()]
    ensemble = RankEnsemble(rewards)
    ensemble.__dict__["input"] = "latents"
    for seed in range(12):
        steered = SteeredPipeline(MODEL, RandomSearch(40), ensemble, draft=False)
        out = steered(["a"], num_inference_steps=4, seed=seed)
        pool = SteeredPipeline(MODEL, BestOfN(40, eta=0.0), rewards[0])(["a"], num_inference_steps=4, seed=seed).samples[0]
        scores = torch.stack([r(pool, None) for r in rewards], 1)
        values = mean_rank(scores, [1.0] * 3)
        assert float(out.rewards[0, 0]) == pytest.approx(float(values.max()))
        best = pool[values == values.max(), 0]
        assert float((best - out.samples[0, int(out.chosen[0]), 0]).abs().min()) < 1e-4
    drafted = SteeredPipeline(MODEL, RandomSearch(20), ensemble, draft=Draft(steps=2, finalists=3))
    gap = drafted(["a"], num_inference_steps=4, seed=0).trace.searches[0].gap
    assert gap.finals and all(0 <= v <= 1 for v in (*gap.drafts, *gap.finals))


class Taller(Duel):
    input = "latents"
    met = 0

    def compare(self, a: Tensor, b: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        self.met += len(a)
        return (a[:, 0] > b[:, 0]).double()


@pytest.mark.parametrize("calls", [10, 40, 400])
def test_duels_are_paid_for(calls: int) -> None:
    judge = Taller()
    out = run(RandomSearch(6), budget=Budget(evals=20 * STEPS, reward_calls=calls), reward=judge)
    spent = out.trace.searches[0].spent
    assert judge.met == out.ledger.reward_calls == spent.reward_calls <= calls


def test_a_first_reward_that_is_no_number_does_not_stop_the_record() -> None:
    n = itertools.count()
    found = run(RandomSearch(5), reward=lambda x, p: torch.tensor([math.nan if next(n) == 0 else x[0, 0].item() for _ in x]))
    history = found.trace.searches[0].history
    assert history[-1][2] == float(found.rewards[0, 0]) and math.isfinite(history[-1][2])


def test_prompts_that_keep_fewer_are_filled_up_without_weight() -> None:
    class Easy(Reward):
        name, input, modality, range = "easy", "latents", "any", (-math.inf, 0.0)

        def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
            return torch.tensor([0.0 if p == "easy" else float(-x.abs().sum()) for x, p in zip(samples, prompts, strict=True)])

    out = run(RandomSearch(1, keep=3), ["easy", "hard"], Budget(evals=10 * STEPS), reward=Easy())
    assert [f.stopped for f in out.trace.searches] == ["solved", "budget"] and out.samples.shape[1] == 3
    assert out.log_weights[0].exp().tolist() == pytest.approx([1, 0, 0]) and out.rewards[0, 1] == -math.inf
    assert out.log_weights[1].exp().sum() == pytest.approx(1) and out.chosen.tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------- time


class Timed(FunctionGround):
    """A clock that ticks with the work; the first round loads what has to be loaded."""

    def __init__(self, now: list[float], each: float, load: float = 0.0, prompts: int = 1) -> None:
        super().__init__(peaks, (8,), ids=list(range(prompts)))
        self.now_, self.each, self.load = now, each, load

    def carry(self, asks: Any) -> Any:
        self.now_[0] += self.each * len(asks) + self.load
        self.load = 0.0
        return super().carry(asks)


@pytest.mark.parametrize(
    "draft, final, limit, load", [(0.1, 0.1, 5, 3), (0.1, 3.0, 10, 0), (0.8, 2.4, 10, 0), (0.05, 0.5, 20, 4)]
)
def test_time_is_used_and_kept(draft: float, final: float, limit: float, load: float) -> None:
    """With loading, and with finals that take as long as they like: at most half of the time is theirs, and none is lost."""
    now = [0.0]
    ground, render = Timed(now, draft, load), Timed(now, final)
    watch = Stopwatch(limit, lambda: now[0])
    found = explore(RandomSearch(2), ground, Budget(seconds=limit), render=render, finalists=4, stopwatch=watch)[0]
    finals = len(found.gap.finals) if found.gap else 0
    assert now[0] <= limit + final + 1e-6 and now[0] > 0.75 * limit
    assert 1 <= finals <= max(1, int(limit / 2 / final)) and found.scored - finals >= 3


# ---------------------------------------------------------------------------------------------- drafts


def test_a_draft_that_is_perfect_ends_nothing_before_its_final_is() -> None:
    class Half(Reward):
        name, input, modality, range = "half", "latents", "any", (-1.0, 0.0)

        def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
            return (samples[:, 0].abs() - 1.1).clamp(max=0).sign()

    for seed in range(6):
        steered = SteeredPipeline(MODEL, RandomSearch(2), Half(), budget=Budget(evals=2000), draft=Draft(steps=2))
        out = steered(["a"], num_inference_steps=STEPS, seed=seed)
        found = out.trace.searches[0]
        assert (found.stopped == "solved") == (float(out.rewards.max()) == 0.0) and found.spent.evals <= 2000
        assert found.stopped == "solved"  # there are plenty, and 2,000 evaluations find one


def test_stopping_while_finals_are_made_still_makes_one() -> None:
    calls = itertools.count()

    def impatient(x: Tensor, prompts: object) -> Tensor:
        if next(calls) == 1:  # the drafts are one block, the finals another
            raise KeyboardInterrupt
        return x[:, 0]

    out = run(RandomSearch(5), reward=impatient, draft=Draft(steps=3, finalists=2))
    found = out.trace.searches[0]
    assert found.stopped == "interrupted" and found.gap is not None and len(found.gap.finals) == 1 and found.scored == 6
    assert float(out.rewards[0, 0]) == found.history[-1][2] == found.gap.finals[0]


def test_only_searches_that_were_going_on_are_interrupted() -> None:
    class Half(Reward):
        name, input, modality, range = "half", "latents", "any", (-math.inf, 0.0)
        calls = 0

        def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return torch.tensor([0.0 if p == "easy" else -1.0 for p in prompts])

    out = run(RandomSearch(2), ["easy", "hard"], Budget(evals=999), reward=Half())
    assert [f.stopped for f in out.trace.searches] == ["solved", "interrupted"]


def test_a_grid_in_numbers_has_no_default_drafts_and_refuses_others() -> None:
    ratios = [9.0, 4.0, 2.0, 1.0, 0.5, 0.1]
    out = SteeredPipeline(MODEL, RandomSearch(3), reward, schedule=ratios)(["a"], seed=0)
    assert out.ledger.evaluations == 3 * 6 and out.trace.searches[0].gap is None
    with pytest.raises(DiffsteerError, match="one in numbers"):
        SteeredPipeline(MODEL, RandomSearch(3), reward, schedule=ratios, draft=Draft(steps=2))(["a"], seed=0)


def test_the_reward_of_drafts_is_the_one_that_is_followed() -> None:
    hidden = lambda x, p: x[:, 0].detach()  # noqa: E731
    out = run(ReNO(iterations=4, rate=0.3), reward=hidden, draft=Draft(reward=reward, finalists=2))
    assert out.ledger.backwards == 3 * STEPS
    ranked = RankEnsemble([lambda x, p: x[:, 0], lambda x, p: -x[:, 0]])
    with pytest.raises(DiffsteerError, match="only ranks"):
        run(DepthFirst(), draft=Draft(reward=ranked))


def test_finals_of_an_optimisation_go_back_to_its_start() -> None:
    out = run(ReNO(iterations=9, rate=0.4, clip=0.5, patience=0), draft=Draft(steps=3, finalists=3))
    gap = out.trace.searches[0].gap
    plain = SteeredPipeline(MODEL, BestOfN(1, eta=0.0), reward)(["a"], num_inference_steps=STEPS, seed=3)
    assert gap.drafts[0] == max(gap.drafts) and gap.finals[-1] == pytest.approx(float(plain.rewards[0, 0]), abs=1e-5)


def test_finals_of_several_noises_are_the_best_of_some_and_the_way_of_one() -> None:
    """Iterates of three noises, the second of which is best: its best first, then the others' best, then its way back."""
    draws = torch.Generator().manual_seed(3)
    noises = [torch.randn(64, generator=draws) for _ in range(3)]
    outcomes, none = [], torch.empty(0)
    for step in range(5):
        for n, z in enumerate(noises):
            x = z + 0.1 * step * torch.randn(64, generator=draws)
            rewarded = step + {0: 0.2, 1: 3.0, 2: 0.5}[n]
            outcomes.append(Outcome(Trial(x, fresh=True), 3 * step + n, 1, none, none, none, True, reward=rewarded))
    best_first = sorted(outcomes, key=lambda o: -o.reward)
    chosen = along_ways(best_first, 6)
    assert [o.slot % 3 for o in chosen] == [1, 2, 0, 1, 1, 1] and chosen[0] is best_first[0]
    assert [o.slot // 3 for o in chosen] == [4, 4, 4, 3, 1, 0]
    assert [o.slot for o in along_ways(best_first, 1)] == [13] and [o.slot for o in along_ways(best_first, 2)] == [13, 1]
    assert along_ways([], 3) == []


# ---------------------------------------------------------------------------------------------- memory


def test_what_lost_keeps_nothing_large(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Run] = []

    class Noted(Run):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            runs.append(self)

    monkeypatch.setattr("diffsteer.searching.Run", Noted)
    maximise(peaks, (50,), RandomSearch(120))
    finished, whole = runs[0].finished, runs[0].whole
    large = [o for o in finished if o.sample is not None or o.trial.x.numel() or o.noise is not None]
    assert len(finished) == 120 and len(large) == whole < 30
    assert all(o.trial.injected is None and o.root is not None and not o.root.numel() for o in finished[whole:])


# ---------------------------------------------------------------------------------------------- gradients of a part


def stiff(path: str, free: int) -> CallableModel:
    """A model whose clean estimate is a constant in its first steps: there the gradient of the last steps is that of all."""
    bars = torch.linspace(0.9999, 0.001, 1000, dtype=torch.float64) if path == "vp" else None
    times: list[float] = []
    mixture = GaussianMixture([-1.0, 0.8], [0.35, 0.5])

    def fn(x: Tensor, t: Tensor, conditions: list[Any]) -> Tensor:
        if any(abs(float(t[0]) - early) < 1e-4 * (1 + early) for early in times[:free]):
            return torch.full_like(x, 0.3)
        at = level(bars[t.long()].sqrt(), (1 - bars[t.long()]).sqrt()) if bars is not None else (
            level(1.0, t) if path == "edm" else level(1 - t.double(), t.double())
        )  # fmt: skip
        return mixture.clean(x, at).to(x.dtype)

    model = CallableModel(fn, "x0", path, (1,), bars)
    times.extend(model.grid(STEPS)[0])
    return model


@pytest.mark.parametrize("path", ["vp", "edm", "flow"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("through", [1, 5, STEPS - 1])
def test_a_part_of_the_gradient_is_the_whole_of_it_where_the_rest_is_constant(path: str, eta: float, through: int) -> None:
    told: list[Any] = []

    class Look(Search):
        name = "look"
        cuts = True

        def search(self, arena: Any) -> Any:
            z, way = arena.draw(1)[0], torch.stack(arena.draw(STEPS))
            more: dict[str, Any] = {"fresh": True, "eta": eta, "injected": way if eta else None, "gradient": True}
            told.extend((yield [Trial(z, **more), Trial(z, through=through, **more)]))

    run(Look(), model=stiff(path, STEPS - through))
    whole, part = told
    assert float(whole.gradient) != 0 or (path, eta) == ("flow", 1.0)  # whose first step forgets its noise
    torch.testing.assert_close(part.gradient, whole.gradient, rtol=1e-3, atol=1e-6)
    if eta:
        torch.testing.assert_close(part.injected_gradient, whole.injected_gradient, rtol=1e-3, atol=1e-6)
        assert bool((part.injected_gradient[:-1] != 0).all())


def test_a_gradient_begins_at_the_noise() -> None:
    class Late(Search):
        name = "late"
        cuts = True

        def search(self, arena: Any) -> Any:
            told = yield arena.fresh(arena.draw(1), stop=4)
            yield [told[0].onward(None, gradient=True)]

    with pytest.raises(DiffsteerError, match="begins at its noise"):
        run(Late())


OPTIMISED = {
    "reno": ReNO(iterations=4, rate=0.5),
    "d_flow": DFlow(iterations=5),
    "dno": DNO(iterations=4, rate=0.05),
    "the last steps": ReNO(iterations=3, rate=0.5, through=2, checkpoint=False),
}


@pytest.mark.parametrize("search", OPTIMISED.values(), ids=OPTIMISED)
def test_noise_is_optimised_through_a_pipeline(search: Search) -> None:
    """The embedded model, its decoder and CLIP: the reward rises from the first iterate on, and costs what it says."""
    steered = SteeredPipeline(load_pipeline("shapes"), search, ClipScore(), draft=False)
    out = steered("a red circle", num_inference_steps=4, seed=1)
    history = out.trace.searches[0].history
    assert history[-1][2] > history[0][2] + 0.1
    said = steered.estimate(1, 4)
    if not isinstance(search, DFlow):
        names = ("evaluations", "decodes", "reward_calls", "backwards")
        assert [said.counts[n] for n in names] == [out.ledger.counts[n] for n in names]


def test_gradients_go_through_the_tiny_decoder_of_drafts() -> None:
    out = SteeredPipeline(
        decoding(), ReNO(iterations=3, rate=0.3), reward, draft=Draft(reward=lambda x, p: -x[:, 0].abs(), finalists=1)
    )(["a"], num_inference_steps=STEPS, seed=0)
    assert out.ledger.decodes == 3 + 1 == out.trace.searches[0].spent.decodes


# ---------------------------------------------------------------------------------------------- the chain's law


@pytest.mark.parametrize("chains", [1200, pytest.param(2500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("search", [Beam(1, 1), Rollover(1, 1), DepthFirst(chains=1, retries=0), DNO(iterations=1),
                                    Evolutionary((0.3,), (1, 1), elites=0, step=1e-6)], ids=lambda s: s.name)  # fmt: skip
def test_what_is_left_of_stochastic_searches_is_the_plain_chain_in_law(search: Search, chains: int) -> None:
    mixture = GaussianMixture([0.7], [0.5])
    model = mixture.model("vp")
    steered = SteeredPipeline(model, search, lambda x, p: torch.zeros(len(x)), draft=False)
    out = steered(["a"] * chains, num_inference_steps=8, seed=5)
    x = out.samples[:, 0, 0].double()
    mean, variance = chain_law(mixture, model.grid(8)[1], 1.0, float(model.grid(8)[1][0].sigma))
    assert float(x.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / chains))
    assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / chains))


# ---------------------------------------------------------------------------------------------- stages


def test_evolution_keeps_its_noise_inside_stages() -> None:
    elites = Evolutionary((0.0,), (6, 6), elites=5, keep=12, diversity=0.0)
    out = run(Stages([elites], keep=12, diversity=0.0))
    values = [round(v, 5) for v in out.samples.flatten().tolist()]
    assert len(set(values)) == len(values)


def test_each_noise_is_handed_on_once() -> None:
    begun: list[list[Tensor]] = []

    class Listens(ZeroOrder):
        def search(self, arena: Any) -> Any:
            begun.append(arena.begin(6))
            yield from super().search(arena)

    run(Stages([FeynmanKac(6, events=(0.3, 0.6), scale=50.0, target_ess=None, trigger="always"), Listens(2, 1)]))
    noises = begun[0]
    assert len(noises) == 6 and all(not torch.equal(a, b) for a, b in itertools.combinations(noises, 2))


def test_dno_goes_on_from_paths_that_are_not_known_with_noise_and_not_with_zeros() -> None:
    seen: list[Tensor] = []

    class Listens(DNO):
        def search(self, arena: Any) -> Any:
            seen.append(arena.injected(arena.starts[0]))
            yield from super().search(arena)

    run(Stages([Rollover(3, 2), Listens(iterations=2)]), num_inference_steps=40)
    assert not diagnose(seen[0]).off and float(seen[0].std()) == pytest.approx(1, abs=0.4)


def test_stages_do_not_nest_and_draft_where_all_of_them_can() -> None:
    with pytest.raises(DiffsteerError, match="cannot be nested"):
        Stages([Stages([RandomSearch(1)])])
    assert Stages([RandomSearch(2), ReNO(iterations=2)]).of_noise and not Stages([FeynmanKac(2)]).of_noise
    out = run(Stages([RandomSearch(4), ReNO(iterations=3, rate=0.3)]), draft=Draft(steps=3, finalists=2))
    assert out.ledger.evaluations == 4 * 3 + (3 * 3 + 2 * 3) + 2 * STEPS


# ---------------------------------------------------------------------------------------------- what may go wrong


def test_states_may_live_on_another_device_than_noise() -> None:

    arena = Arena.__new__(Arena)
    arena.levels, arena.noise_kind = MODEL.grid(STEPS)[1], "eta"
    x, z = torch.empty(1, device="meta"), torch.randn(1)
    assert arena.noised(x, 5, 2, z).device.type == "meta" == arena.stepped(x, x, 2, 1.0, z).device.type


def test_black_boxes_want_numbers_and_others_a_gradient() -> None:
    ranked = RankEnsemble([lambda x, p: x[:, 0], lambda x, p: -x[:, 0]])
    with pytest.raises(DiffsteerError, match="only ranks"):
        run(DNO(black_box=True), reward=ranked)
    with pytest.raises(DiffsteerError, match="compressibility has none"):
        SteeredPipeline(load_pipeline("shapes"), DNO(), Compressibility())
    assert SteeredPipeline(load_pipeline("shapes"), DNO(black_box=True), Compressibility()).sampler is not None


def test_noise_without_a_gradient_does_not_shrink() -> None:
    f = lambda z: 0.0 * z.flatten(1).sum(1)  # noqa: E731
    found = maximise(f, (4, 64, 64), DNO(iterations=40, eta=0.0, regulariser=0.0, rate=0.05, patience=0, keep=40))
    radii = [float(o.noise.norm()) for o in found.outcomes if o.noise is not None]
    assert max(radii) - min(radii) < 1e-3


def test_a_callback_that_interrupts_makes_no_sample_of_noise() -> None:
    steps = itertools.count()

    def stop(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = next(steps) == 5
        return tensors

    steered = SteeredPipeline(
        load_pipeline("shapes"), RandomSearch(1), Compressibility(), draft=False, budget=Budget(evals=200)
    )
    out = steered("a red circle", num_inference_steps=4, seed=0, callback_on_step_end=stop)
    found = out.trace.searches[0]
    assert found.stopped == "interrupted" and found.scored == 1 and len(found.outcomes) == 1


def test_a_transform_of_the_first_noise_works_on_functions_too() -> None:
    class Bent:
        evaluations = 1

        def __call__(self, noise: Tensor, session: Any, rows: Sequence[int]) -> Tensor:
            session.ledger.evaluations += len(noise)
            return noise * 0 + 0.5

    steered = SteeredPipeline(MODEL, RandomSearch(3, keep=3, diversity=0.0), reward, draft=False, start=Bent())
    out = steered(["a"], num_inference_steps=STEPS, seed=0)
    assert out.ledger.evaluations == 3 * (STEPS + 1) == steered.estimate(1, STEPS).evaluations
    assert len({round(v, 5) for v in out.samples.flatten().tolist()}) == 1


@pytest.mark.parametrize("make, said", [
    (lambda: Beam(events=0.5), "wanted shares"), (lambda: SuccessiveHalving(events=["a"]), "wanted shares"),  # type: ignore[arg-type,list-item]
    (lambda: DepthFirst(checks=()), "wanted shares"), (lambda: Stages(3), "give one sampler"),  # type: ignore[arg-type]
    (lambda: Stages([RandomSearch(1)], ["a"]), "positive numbers"),  # type: ignore[list-item]
    (lambda: Evolutionary("a", (1, 1)), "wanted a list"), (lambda: Evolutionary(("a",), (1, 1)), "that rise"),  # type: ignore[arg-type]
])  # fmt: skip
def test_lists_that_are_none(make: Any, said: str) -> None:
    with pytest.raises(DiffsteerError, match=said):
        make()


def test_another_choice_comes_on_top_and_is_declared() -> None:
    steered = SteeredPipeline(
        MODEL, RandomSearch(6), reward, draft=False, choice=lambda x, p: x[:, 0], budget=Budget(reward_calls=6)
    )
    out = steered(["a"], num_inference_steps=STEPS, seed=0)
    assert out.ledger.reward_calls == 6 + 4 == steered.estimate(1, STEPS).reward_calls
    assert int(out.chosen[0]) == int(out.samples[0, :, 0].argmax())


def test_random_search_with_noise_on_the_way_is_best_of_n_without_drafts() -> None:
    steered = SteeredPipeline(MODEL, RandomSearch(5, eta=1.0, keep=5, diversity=0.0), reward)
    assert steered.draft is None
    out = steered(["a", "b"], num_inference_steps=STEPS, seed=3)
    best = SteeredPipeline(MODEL, BestOfN(5), reward)(["a", "b"], num_inference_steps=STEPS, seed=3)
    torch.testing.assert_close(out.rewards.sort().values, best.rewards.sort().values)
    with pytest.raises(DiffsteerError, match="no function of the first noise"):
        SteeredPipeline(MODEL, RandomSearch(5, eta=1.0), reward, draft=Draft(steps=2))


def test_a_search_has_no_weights_to_draw_from() -> None:
    with pytest.raises(DiffsteerError, match="no weights to draw from"):
        run(RandomSearch(2), output="draw")


def test_a_stage_may_come_twice() -> None:
    """The same object first and last has the shares that two of its kind have."""
    same, budget = RandomSearch(1), Budget(evals=20 * STEPS)
    once = run(Stages([same, ZeroOrder(2, 2), same]), budget=budget)
    others = run(Stages([RandomSearch(1), ZeroOrder(2, 2), RandomSearch(1)]), budget=budget)
    assert torch.equal(once.samples, others.samples) and once.trace.searches[0].spent == others.trace.searches[0].spent
    alone = run(RandomSearch(1), budget=budget)
    assert not torch.equal(once.samples, alone.samples)


def test_a_choice_depends_on_no_other_prompt() -> None:
    """One that keeps fewer samples than another is ranked among its own, not among copies, and pays for its own."""
    here = [lambda x, p: x[:, 0], lambda x, p: -(x[:, 0] - 0.9).square(), lambda x, p: (3 * x[:, 0]).sin()]
    choice = RankEnsemble(here)
    choice.__dict__["input"] = "latents"
    budget, search = Budget(evals=8 * STEPS), DepthFirst(chains=12, keep=6)
    ids = list(range(12))
    together = played(search, ["a"] * 12, budget, choice=choice, ids=ids, output="all")
    kept = [len(f.outcomes) for f in together.trace.searches]
    assert len(set(kept)) > 1
    assert together.ledger.reward_calls == sum(f.spent.reward_calls for f in together.trace.searches) + sum(kept)
    for i in ids:
        alone = played(search, ["a"], budget, choice=choice, ids=[i], output="all")
        assert int(alone.chosen[0]) == int(together.chosen[i])
