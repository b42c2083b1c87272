"""What every search must keep: its budget, its declared cost, the best so far, its keys; and what single ones must do."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import MODEL, PLAIN, SEARCHES, STEPS, peaks, played, reward
from torch import Tensor

from diffsteer import DiffsteerError, SteeredPipeline, samplers
from diffsteer.budget import Budget, Cost, Purse, Stopwatch
from diffsteer.found import Found
from diffsteer.ground import DryGround, FunctionGround
from diffsteer.judging import Duel, RankEnsemble
from diffsteer.reward import Reward
from diffsteer.samplers import (
    DNO,
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
    TimeShift,
    ZeroOrder,
)
from diffsteer.search_run import maximise
from diffsteer.searching import explore
from diffsteer.toy import GaussianMixture
from diffsteer.trial import Search
from diffsteer.types import Context

WRONG: Any = lambda value: value  # noqa: E731  # of a type that mypy would refuse
NAMES = list(SEARCHES)


def run(search: Search, prompts: Sequence[str] = ("a", "b"), budget: Budget | None = None, **options: Any) -> Any:
    return played(search, prompts, budget, **options)


def test_every_search_has_a_row() -> None:
    exported = {getattr(samplers, name) for name in samplers.__all__}
    searches = {cls for cls in exported if issubclass(cls, Search)}
    assert searches == {type(search) for search, _ in SEARCHES.values()}
    for search in searches:
        assert search.source and search.name.isidentifier() and "heuristic" in (search.__doc__ or "") or search is Stages


@pytest.mark.parametrize("name", NAMES)
def test_declared_cost_is_counted_cost(name: str) -> None:
    search, depends = SEARCHES[name]
    pipe = SteeredPipeline(MODEL, search, reward, draft=False)
    out = pipe(["a"], num_inference_steps=STEPS, seed=0)
    spent, counted = out.trace.searches[0].spent, out.ledger.counts
    assert spent == Cost(*(counted[name] for name in ("evaluations", "decodes", "reward_calls", "backwards")))
    declared = search.evaluations(STEPS)
    assert spent.evals <= declared if depends else spent.evals == declared
    if not depends:
        said = pipe.estimate(1, STEPS).counts
        assert {k: v for k, v in said.items() if k != "forwards"} == {k: v for k, v in counted.items() if k != "forwards"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("evals", [STEPS, 17, 40, 111, 300])
def test_it_stays_inside_its_budget_and_finds_something(name: str, evals: int) -> None:
    out = run(SEARCHES[name][0], budget=Budget(evals=evals))
    spent = [f.spent.evals for f in out.trace.searches]
    assert all(STEPS <= s <= evals for s in spent) and sum(spent) == out.ledger.evaluations
    assert out.samples.isfinite().all() and all(f.stopped == "budget" for f in out.trace.searches)
    # one further chain at most is left, but where a whole step of the method costs more than that
    assert all(evals - s < 4 * STEPS for s in spent)


@pytest.mark.parametrize("name", NAMES)
def test_other_currencies_hold_too(name: str) -> None:
    for budget in (Budget(reward_calls=9), Budget(evals=200, reward_calls=7)):
        out = run(SEARCHES[name][0], ["a"], budget)
        assert 1 <= out.ledger.reward_calls <= budget.reward_calls and out.ledger.evaluations <= (budget.evals or 10**9)


@pytest.mark.parametrize("name", NAMES)
def test_the_best_so_far_never_falls_and_is_the_result(name: str) -> None:
    found = run(SEARCHES[name][0], ["a"], Budget(evals=400)).trace.searches[0]
    rewards = [r for _, _, r in found.history]
    evaluations = [e for e, _, _ in found.history]
    assert rewards == sorted(rewards) and evaluations == sorted(evaluations)
    assert found.outcomes[0].reward == rewards[-1] == max(o.reward for o in found.outcomes)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_do_not_meet_and_blocks_change_nothing(name: str) -> None:
    search = SEARCHES[name][0]
    for budget in (None, Budget(evals=90)):
        together = run(search, ["a", "b", "c"], budget, ids=["x", "y", "z"])
        blocks = run(search, ["a", "b", "c"], budget, ids=["x", "y", "z"], chunk=2)
        torch.testing.assert_close(blocks.samples, together.samples, rtol=1e-4, atol=1e-4)
        for i, id in enumerate("xyz"):
            alone = run(search, ["abc"[i]], budget, ids=[id])
            kept = min(alone.samples.shape[1], together.samples.shape[1])
            torch.testing.assert_close(alone.samples[0, :kept], together.samples[i, :kept], rtol=1e-4, atol=1e-4)
            assert alone.trace.searches[0].spent == together.trace.searches[i].spent


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_left_of_each_is_the_plain_chain(name: str) -> None:
    search = PLAIN[name]
    out = run(search)
    if isinstance(search, DNO):
        assert out.samples.shape[1] == 1 and out.ledger.evaluations == 2 * STEPS  # its noise has keys of its own
        return
    plain = SteeredPipeline(MODEL, BestOfN(1, eta=search.eta), reward)(["a", "b"], num_inference_steps=STEPS, seed=3)
    if search.eta and not isinstance(search, Stages):  # a new slot has noise of its own from the first event on
        assert out.ledger.evaluations == 2 * STEPS
        return
    torch.testing.assert_close(out.samples[:, :1], plain.samples)
    torch.testing.assert_close(out.rewards[:, :1], plain.rewards)


def test_candidates_are_the_particles_of_best_of_n() -> None:
    """One pool tells all nested budgets: keys are those of best of N."""
    found = run(RandomSearch(6, keep=6, diversity=0.0), ["a"])
    pool = SteeredPipeline(MODEL, BestOfN(6, eta=0.0), reward)(["a"], num_inference_steps=STEPS, seed=3)
    torch.testing.assert_close(found.rewards[0].sort().values, pool.rewards[0].sort().values)


def test_a_step_of_one_is_random_search() -> None:
    f = lambda z: -z.flatten(1).square().sum(1)  # noqa: E731
    climbing = maximise(f, (3, 4, 4), ZeroOrder(5, 3, step=1.0, adapt=False, patience=0, keep=16, diversity=0.0))
    drawing = maximise(f, (3, 4, 4), RandomSearch(16, keep=16, diversity=0.0))
    assert [o.reward for o in climbing.outcomes] == [o.reward for o in drawing.outcomes]


# ---------------------------------------------------------------------------------------------- published costs


PUBLISHED = {
    "SD 2.1": ((0, 20, 30, 40), (42, 26, 26, 26, 30), 5000),
    "FLUX": ((5, 20, 30, 40), (14, 7, 7, 7, 10), 1465),
    "Wan": ((5, 20, 30, 45), (10, 5, 5, 5, 5), 1000),
}


@pytest.mark.parametrize("schedule, populations, cost", PUBLISHED.values(), ids=PUBLISHED)
def test_the_published_evolutions_cost_what_they_say(schedule: Sequence[int], populations: Sequence[int], cost: int) -> None:
    search = Evolutionary([s / 50 for s in schedule], populations, elites=3)
    assert search.schedule(50) == list(schedule) and search.evaluations(50) == cost
    model = GaussianMixture([0.0], [1.0]).model("vp")
    out = SteeredPipeline(model, search, reward)(["a"], num_inference_steps=50, seed=0)
    assert out.ledger.evaluations == cost


@pytest.mark.parametrize("neighbours, rounds", [(4, 8), (2, 5), (1, 1)])
def test_the_incumbent_is_not_paid_twice(neighbours: int, rounds: int) -> None:
    out = run(ZeroOrder(neighbours, rounds), ["a"])
    assert out.ledger.evaluations == (1 + rounds * neighbours) * STEPS


# ---------------------------------------------------------------------------------------------- single ones


def test_hill_climbing_climbs_where_drawing_does_not() -> None:
    """In 64 dimensions 200 draws all lie far from a point near the shell; neighbours come nearer step by step."""
    evals = Budget(evals=200)
    drawn, climbed = (maximise(peaks, (64,), s, evals).outcomes[0].reward for s in (RandomSearch(), ZeroOrder()))
    assert climbed > drawn + 0.1


def test_steps_adapt_and_restarts_come() -> None:
    calls: list[Tensor] = []

    def flat(z: Tensor) -> Tensor:
        calls.append(z[0].clone())
        return -float(len(calls)) * torch.ones(len(z))  # every later one is worse

    maximise(flat, (256,), ZeroOrder(2, 6, patience=2, step=0.4))
    cosines = [float(torch.nn.functional.cosine_similarity(calls[0], z, dim=0)) for z in calls]
    steps = [math.sqrt(1 - c**2) for c in cosines[1:5]]
    assert steps == pytest.approx([0.4, 0.4, 0.328, 0.328], abs=1e-3)
    assert all(abs(c) < 0.3 for c in cosines[5:7])  # fresh ones
    assert all(c > 0.85 for c in (float(torch.nn.functional.cosine_similarity(calls[5], z, dim=0)) for z in calls[7:9]))


def test_halving_gives_up_the_worse_part_and_changes_nobody() -> None:
    out = run(SuccessiveHalving(8, keep=8, diversity=0.0), ["a"])
    pool = SteeredPipeline(MODEL, BestOfN(8, eta=0.0), reward)(["a"], num_inference_steps=STEPS, seed=3)
    finished = out.rewards[0].tolist()
    assert len(finished) == 2
    for value in finished:
        assert min(abs(value - r) for r in pool.rewards[0].tolist()) < 1e-5


def test_chains_go_back_only_where_they_look_bad() -> None:
    good, bad = (run(DepthFirst(chains=1, threshold=t), ["a"]).ledger.evaluations for t in (-1e9, 1e9))
    assert good == STEPS and bad == DepthFirst(chains=1).evaluations(STEPS)


def test_what_a_step_leaves_rolls_over() -> None:
    """With a reward that every child improves, one child a step is enough; with one that none does, the quota is used up."""
    n = itertools.count()
    rising = run(Rollover(3, 4), ["a"], reward=lambda x, p: torch.tensor([float(next(n)) for _ in x]))
    falling = run(Rollover(3, 4), ["a"], reward=lambda x, p: torch.tensor([-float(next(n)) for _ in x]))
    assert rising.ledger.evaluations == 3 + (STEPS - 1) and falling.ledger.evaluations == 3 + 4 * (STEPS - 1)


def test_paths_get_on_and_branches_part() -> None:
    search = SearchOverPaths(2, 3, first=0.25, back=2, ahead=4)
    assert search._plan(12) == (3, [(1, 5), (3, 7), (5, 9), (7, 11)])
    with pytest.raises(DiffsteerError, match="would get on"):
        SearchOverPaths(back=3, ahead=3)
    out = run(search, ["a"])
    assert len(set(out.samples.flatten().tolist())) == out.samples.shape[1]


def test_going_back_keeps_the_marginals() -> None:
    """A state noised from one level to a higher one has the law that the model has there."""
    found: list[float] = []

    class Back(Search):
        name = "back"
        cuts = True

        def search(self, arena: Any) -> Any:
            told = yield arena.fresh(arena.draw(4000), stop=9)
            xs = torch.stack([o.x for o in told])
            there = torch.stack([arena.noised(o.x, 9, 4, z) for o, z in zip(told, arena.draw(4000), strict=True)])
            straight = yield arena.fresh(arena.draw(4000), stop=4)
            found.extend([float(there.std()), float(torch.stack([o.x for o in straight]).std()), float(xs.std())])
            yield arena.fresh(arena.draw(1))

    model = GaussianMixture([0.0], [0.5]).model("vp")
    SteeredPipeline(model, Back(), reward, draft=False)(["a"], num_inference_steps=20, seed=0)
    assert found[0] == pytest.approx(found[1], rel=0.05) and abs(found[2] - found[1]) > 0.05 * found[1]


def test_a_transition_of_ones_own_is_the_sessions() -> None:
    """Rollover's children step without an evaluation: with the same noise the session arrives at the same state."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Steps(Search):
        name = "steps"
        cuts = True
        eta = 1.0

        def search(self, arena: Any) -> Any:
            first = (yield [t for t in arena.fresh(arena.draw(1), stop=1, eta=1.0)])[0]
            from diffsteer import rng

            z = rng.normal(arena.seed, [(arena.id, first.slot)], 0, "step", arena.shape)[0]
            seen.append((arena.stepped(first.begun, first.x0, 0, 1.0, z), first.x))
            yield [first.onward(None)]

    SteeredPipeline(MODEL, Steps(), reward, draft=False)(["a"], num_inference_steps=STEPS, seed=0)
    torch.testing.assert_close(*seen[0])


def test_the_diversity_of_every_result_is_told(tmp_path: Any) -> None:
    for sampler in (RandomSearch(4, diversity=0.0), BestOfN(4), FeynmanKac(4)):
        options = {"draft": False} if isinstance(sampler, RandomSearch) else {}
        out = SteeredPipeline(MODEL, sampler, reward, **options)(["a", "b"], num_inference_steps=4, seed=0)  # type: ignore[arg-type]
        assert len(out.diversity) == 2 and all(1 <= d.vendi <= 4.001 for d in out.diversity)
        kept = json.loads((out.save(tmp_path / sampler.name) / "run.json").read_text())
        assert kept["diversity"][0]["distance"] == out.diversity[0].distance
        assert len(kept["searches"]) == (2 if isinstance(sampler, RandomSearch) else 0)


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("search", [ReNO(iterations=60, rate=1.0, clip=0.0, momentum=0.5, patience=0), DFlow(iterations=25),
                                    DNO(iterations=150, rate=0.05, eta=0.0, regulariser=0.0, patience=0)],
                         ids=["reno", "d_flow", "dno"])  # fmt: skip
def test_gradients_climb_a_quadratic_and_return_the_best_iterate(search: Search) -> None:
    values: list[float] = []

    def f(z: Tensor) -> Tensor:
        r = -10 * (z - 0.5).square().flatten(1).mean(1)
        values.append(float(r.detach()))
        return r

    found = maximise(f, (2, 4, 4), search)
    assert found.outcomes[0].reward == max(values) > values[0] / 10


def test_the_regulariser_holds_the_radius() -> None:
    f = lambda z: 5 * z.flatten(1).norm(dim=1)  # noqa: E731  # ever more
    free, held = (maximise(f, (4, 8, 8), ReNO(iterations=30, regulariser=w, patience=0)).outcomes[0] for w in (0.0, 5.0))
    radii = [float(o.noise.norm()) for o in (free, held)]  # type: ignore[union-attr]
    assert radii[0] > 20 and radii[1] < 18  # the shell is at 16


def test_rows_of_a_batch_do_not_share_a_norm() -> None:
    """Two noises side by side, one of which has a gradient a thousand times longer, go as they go alone."""
    f = lambda z: -(z.flatten(1) - 1).square().sum(1) * torch.where(z[:, 0] > 0, 1e3, 1.0)  # noqa: E731
    search: Any = lambda n: ReNO(iterations=6, noises=n, patience=0, keep=12, diversity=0.0)  # noqa: E731
    both = [o.reward for o in maximise(f, (5,), search(2), seed=4).outcomes]
    alone = [o.reward for o in maximise(f, (5,), search(1), seed=4).outcomes]
    assert set(alone) <= set(both)


def test_it_stops_where_it_has_converged() -> None:
    f = lambda z: -0.0 * z.flatten(1).sum(1) + 1  # noqa: E731
    assert maximise(f, (4,), ReNO(iterations=50, patience=3)).spent.evals == 4


@pytest.mark.parametrize("through", [None, STEPS, 4, 1])
def test_gradients_through_the_chain_are_differences(through: int | None) -> None:
    """Of the whole chain the gradient is that of finite differences; of its last steps the network's part of those alone."""
    told: list[Any] = []

    class Look(Search):
        name = "look"
        cuts = True

        def search(self, arena: Any) -> Any:
            z = arena.draw(1)[0]
            h = 1e-2
            trials = [*arena.fresh([z], gradient=True, through=through), *arena.fresh([z + h, z - h])]
            told.extend((yield trials))

    SteeredPipeline(MODEL, Look(), reward, draft=False)(["a"], num_inference_steps=STEPS, seed=1)
    slope = (told[1].reward - told[2].reward) / 2e-2
    gradient = float(told[0].gradient)
    if through in (None, STEPS):
        assert gradient == pytest.approx(slope, rel=0.02)
    else:
        assert gradient != pytest.approx(slope, rel=0.02) and gradient * slope > 0


def test_noise_on_the_way_has_a_gradient_too() -> None:
    told: list[Any] = []

    class Look(Search):
        name = "look"
        cuts = True

        def search(self, arena: Any) -> Any:
            z, way = arena.draw(1)[0], torch.stack(arena.draw(STEPS))
            trials = [Trial_(z, way, True)]
            for k in (0, 5, 10):
                for sign in (1, -1):
                    moved = way.clone()
                    moved[k] += sign * 1e-2
                    trials.append(Trial_(z, moved, False))
            told.extend((yield trials))

    def Trial_(z: Tensor, way: Tensor, gradient: bool) -> Any:
        from diffsteer.trial import Trial

        return Trial(z, fresh=True, eta=1.0, injected=way, gradient=gradient)

    SteeredPipeline(MODEL, Look(), reward, draft=False)(["a"], num_inference_steps=STEPS, seed=1)
    for n, k in enumerate((0, 5, 10)):
        slope = (told[1 + 2 * n].reward - told[2 + 2 * n].reward) / 2e-2
        assert float(told[0].injected_gradient[k]) == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_black_boxes_are_climbed() -> None:
    """A reward that hides its gradient, by differences of samples."""
    hidden = lambda x, p: (-(x[:, 0] - 1.6).abs()).detach()  # noqa: E731
    search = DNO(iterations=20, black_box=True, perturbations=8, rate=0.1, spread=0.1, regulariser=0.0, patience=0)
    found = run(search, ["a"], reward=hidden).trace.searches[0]
    assert found.history[-1][2] > found.history[0][2] + 0.2
    with pytest.raises(DiffsteerError, match="dno"):
        run(ReNO(iterations=3), ["a"], reward=hidden)


def test_whiteness_keeps_noise_white_where_a_reward_pulls_it_off() -> None:
    f = lambda z: 50 * z.flatten(1).mean(1)  # noqa: E731
    search: Any = lambda w: DNO(iterations=60, rate=0.02, eta=0.0, regulariser=w, patience=0)  # noqa: E731
    free, held = (maximise(f, (4, 16, 16), search(w)).outcomes[0].noise for w in (0.0, 3.0))
    assert float(free.mean()) > 3 * float(held.mean()) > 0  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------- stages


def test_a_gradient_goes_on_from_the_very_chain_of_the_best_particle() -> None:
    fk = FeynmanKac(4, events=(0.4, 0.7))
    out = run(Stages([fk, DNO(iterations=1, keep=16)], keep=16, diversity=0.0), ["a"])
    found = out.trace.searches[0]
    assert found.scored == 5 and len(found.outcomes) == 4  # the same sample, made again, is one


def test_stages_begin_with_the_noises_of_those_before() -> None:
    noises: list[list[Any]] = []

    class Listens(RandomSearch):
        def search(self, arena: Any) -> Any:
            noises.append([s.root for s in arena.starts])
            yield from super().search(arena)

    out = run(Stages([RandomSearch(5), Listens(3), Listens(2)]), ["a"])
    assert [len(n) for n in noises] == [5, 8]
    pool = SteeredPipeline(MODEL, BestOfN(5, eta=0.0), reward)(["a"], num_inference_steps=STEPS, seed=3)
    assert torch.equal(noises[1][0], noises[0][0])
    assert float(out.rewards.max()) >= float(pool.rewards.max()) - 1e-6


def test_shares_are_kept_and_what_is_left_goes_on() -> None:
    spent: list[int] = []

    class Notes(RandomSearch):
        def search(self, arena: Any) -> Any:
            spent.append(arena.purse.spent.evals)
            yield from super().search(arena)

    run(Stages([Notes(1), Notes(1), Notes(1)], (1, 2, 1)), ["a"], Budget(evals=STEPS * 20))
    assert spent == [0, STEPS * 5, STEPS * 15]
    spent.clear()
    quick = Stages([ReNO(iterations=1, patience=1), Notes(1)], (9, 1))
    run(quick, ["a"], Budget(evals=STEPS * 20))
    assert spent[0] <= STEPS * 18


@pytest.mark.parametrize("stages, said", [([], "give one"), ([FeynmanKac], "a stage is"), ([TimeShift()], "moves levels"),
                                          ([samplers.MPGD()], "guides"), (["fk"], "a stage is")])  # fmt: skip
def test_what_is_no_stage(stages: list[Any], said: str) -> None:
    with pytest.raises(DiffsteerError, match=said):
        Stages(stages)


# ---------------------------------------------------------------------------------------------- what may go wrong


def test_rewards_that_are_no_numbers_lose() -> None:
    n = itertools.count()
    found = run(
        RandomSearch(6, keep=1), ["a"], reward=lambda x, p: torch.tensor([math.nan if next(n) % 2 else -1.0 for _ in x])
    )
    assert found.rewards[0].tolist() == [-1.0]


def test_a_perfect_reward_ends_the_search() -> None:
    class Half(Reward):
        name, input, modality, range = "half", "latents", "any", (-1.0, 0.0)

        def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
            return (samples[:, 0].abs() - 0.8).clamp(max=0).sign()

    out = run(RandomSearch(2), ["a", "b"], Budget(evals=10_000), reward=Half())
    assert [f.stopped for f in out.trace.searches] == ["solved", "solved"] and out.ledger.evaluations < 2_000
    assert out.rewards[:, 0].tolist() == [0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_too_small_says_what_one_sample_takes(name: str) -> None:
    with pytest.raises(DiffsteerError, match=f"does not pay for one sample: that takes evals={STEPS}"):
        run(SEARCHES[name][0], ["a"], Budget(evals=STEPS - 1))


def test_seconds_are_kept_with_the_render_still_to_come() -> None:
    """On a clock that ticks with the work: the limit is met, not passed, and finals are in it."""
    now = [0.0]

    class Slow(FunctionGround):
        def carry(self, asks: Any) -> Any:
            now[0] += 0.1 * len(asks)
            return super().carry(asks)

    for limit in (0.05, 0.55, 1.0, 5.0):
        now[0] = 0.0
        ground = Slow(peaks, (8,), ids=[0, 1])
        watch = Stopwatch(limit, lambda: now[0])
        found = explore(RandomSearch(3), ground, Budget(seconds=limit), render=Slow(peaks, (8,), ids=[0, 1]), finalists=1,
                        stopwatch=watch)  # fmt: skip
        assert now[0] <= max(limit, 0.4) + 0.01  # one draft and one final each, at least
        assert limit < 1 or now[0] > limit - 0.45
        assert all(f.gap is not None and len(f.outcomes) == 1 for f in found)


def test_only_ranking_rewards_go_with_searches_that_compare() -> None:
    ensemble = RankEnsemble([lambda x, p: x[:, 0], lambda x, p: -x[:, 0].abs()])
    ensemble.__dict__["input"] = "latents"

    class Taller(Duel):
        input = "latents"

        def compare(self, a: Tensor, b: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
            return (a[:, 0] > b[:, 0]).double()

    for judge in (ensemble, Taller()):
        compare: list[Search] = [RandomSearch(5), ZeroOrder(2, 3), SuccessiveHalving(4), Evolutionary((0.0,), (4, 3))]
        count: list[Search] = [ReNO(), DepthFirst(), Stages([FeynmanKac(3)])]
        for search in compare:
            out = run(search, ["a"], reward=judge)
            assert out.rewards[0, 0] == out.rewards[0].max()
        for search in count:
            with pytest.raises(DiffsteerError, match="only ranks|follows the gradient"):
                run(search, ["a"], reward=judge)
    tallest = run(RandomSearch(5, diversity=0.0), ["a"], reward=Taller()).samples[0, 0]
    pool = SteeredPipeline(MODEL, BestOfN(5, eta=0.0), reward)(["a"], num_inference_steps=STEPS, seed=3).samples
    torch.testing.assert_close(tallest, pool.max().view(1))


@pytest.mark.parametrize("make, said", [
    (lambda: ZeroOrder(step=0.0), "step=0"), (lambda: ZeroOrder(proposal="additive"), "adds variance"),
    (lambda: RandomSearch(0), "candidates=0"), (lambda: RandomSearch(WRONG(1.5)), "no whole number"),
    (lambda: Evolutionary((0.5, 0.2), (2, 2, 2)), "that rise"), (lambda: Evolutionary((0.0,), (2,)), "wanted 2 numbers"),
    (lambda: Evolutionary((0.0,), (4, 2), elites=2), "no place for children"), (lambda: samplers.Beam(events=()), "events"),
    (lambda: SuccessiveHalving(events=(1.5,)), "events"), (lambda: RandomSearch(keep=0), "keep=0"),
    (lambda: RandomSearch(diversity=2), "diversity=2"), (lambda: Rollover(eta=0.0), "eta=0"),
])  # fmt: skip
def test_wrong_parameters(make: Any, said: str) -> None:
    with pytest.raises(DiffsteerError, match=said):
        make()


def test_what_goes_with_no_search() -> None:
    with pytest.raises(DiffsteerError, match="give reward="):
        SteeredPipeline(MODEL, RandomSearch())
    with pytest.raises(DiffsteerError, match="budget= has no effect"):
        SteeredPipeline(MODEL, BestOfN(2), reward, budget=Budget(evals=3))
    with pytest.raises(DiffsteerError, match="no gradient guidance"):
        SteeredPipeline(MODEL, RandomSearch(), reward, guide=samplers.MPGD())
    with pytest.raises(DiffsteerError, match="no room for generations"):
        maximise(peaks, (3,), Evolutionary())


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("evolutionary", "stages"))])
def test_on_a_function_every_search_is_one_of_noises(name: str) -> None:
    found = maximise(peaks, (3,), SEARCHES[name][0], Budget(evals=20))
    assert 1 <= found.spent.evals <= 20 and found.outcomes[0].reward == found.history[-1][2]


@settings(max_examples=30)
@given(st.sampled_from(NAMES), st.integers(STEPS, 160), st.integers(0, 5))
def test_any_budget_is_kept(name: str, evals: int, seed: int) -> None:
    ground = DryGround(STEPS, [], _costs())
    ground._chance.manual_seed(seed)
    found: Found = explore(SEARCHES[name][0], ground, Budget(evals=evals))[0]
    assert STEPS <= found.spent.evals <= evals


def _costs() -> Any:
    from diffsteer.ground import Costs

    return Costs(1, 0, 0, False)


def test_purses_share_nothing() -> None:
    watch = Stopwatch(None)
    one, other = Purse(Budget(evals=5), watch), Purse(Budget(evals=5), watch)
    one.pay(Cost(5))
    assert other.affords(Cost(5)) == 1
