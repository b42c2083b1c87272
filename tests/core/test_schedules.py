"""Grids of noise: tables, profiles, dynamic programming, and walking them on every kind of model."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from core.test_backend import with_scheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffsteer import DiffsteerError, SteeredPipeline, load_pipeline
from diffsteer.callable import CallableModel
from diffsteer.profiles import (
    gits_schedule,
    local_deviation,
    loss_mass,
    own_grid,
    reward_change,
    reward_error,
    trajectory,
)
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.schedules import AYS, FlowTime, Given, Karras, LogSNR, Profile, Schedule, from_profile, gits
from diffsteer.segments import grid_of
from diffsteer.toy import GaussianMixture

MIXTURE = GaussianMixture([-1.0, 1.0], [0.2, 0.3])
MODELS = {path: MIXTURE.model(path, "x0") for path in ("vp", "edm", "flow")}
PROMPTS = ["any"] * 8


def falls(ratios: Tensor) -> bool:
    return bool((ratios[1:] < ratios[:-1]).all()) and bool((ratios > 0).all())


def test_a_uniform_profile_gives_even_spacing_and_equal_masses_are_equal() -> None:
    ratios = from_profile([0.0, 0.3, 1.0], [2.0, 2.0, 2.0]).ratios(8, 99.0, 1e-4)
    t = ratios / (1 + ratios)
    torch.testing.assert_close(t, 0.99 * (1 - torch.arange(8).double() / 8))
    # density 2 t: the cumulative profile is t^2, so that times are square roots
    t = torch.linspace(0, 1, 2001).double()
    ratios = from_profile(t.tolist(), (2 * t).tolist()).ratios(9, 1e6, 1e-6)
    torch.testing.assert_close(ratios / (1 + ratios), (1 - torch.arange(9).double() / 9).sqrt(), rtol=1e-4, atol=1e-5)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12).filter(lambda m: sum(m) > 0.1), st.integers(1, 50))
def test_profiles_fall_within_the_range(masses: list[float], steps: int) -> None:
    profile = Profile(tuple(torch.linspace(0, 1, len(masses) + 1).tolist()), tuple(masses))
    ratios = profile.ratios(steps, 150.0, 0.01)
    assert falls(ratios) and float(ratios[0]) == pytest.approx(150.0, rel=1e-9) and float(ratios[-1]) >= 0.01


@given(st.sampled_from(["sd15", "sdxl", "svd"]), st.integers(1, 50), st.floats(5, 2000), st.floats(1e-4, 0.2))
def test_tables_fall_within_the_range_of_any_model(table: str, steps: int, high: float, low: float) -> None:
    ratios = AYS(table).ratios(steps, high, low)
    assert len(ratios) == steps and falls(ratios)
    assert float(ratios[0]) <= high * (1 + 1e-12) and float(ratios[-1]) >= low * (1 - 1e-12)


def test_ten_steps_of_a_table_are_the_table() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    bars = scheduler.alphas_cumprod.double()
    for table, times in (
        ("sd15", [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]),
        ("sdxl", [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]),
    ):
        expected = ((1 - bars) / bars).sqrt()[torch.tensor(times)]
        torch.testing.assert_close(AYS(table).ratios(10, 1e3, 1e-3), expected, rtol=1e-4, atol=0)
        scheduler.set_timesteps(10)
        from diffsteer.grids import walk

        walk(scheduler, AYS(table))
        assert scheduler.timesteps.tolist() == times
    assert AYS("svd").ratios(10, 1e3, 1e-3).tolist()[0] == pytest.approx(700)
    twenty, ten = AYS("sd15").ratios(20, 1e3, 1e-3), AYS("sd15").ratios(10, 1e3, 1e-3)
    torch.testing.assert_close(twenty[::2], ten)
    torch.testing.assert_close(twenty[1:-2:2], (ten[:-1] * ten[1:]).sqrt())


@given(st.integers(2, 6), st.data())
def test_dynamic_programming_is_brute_force(last: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, last))
    coefficient = data.draw(st.sampled_from([1.0, 1.15, 0.8]))
    values = st.lists(st.floats(0, 5), min_size=(last + 1) ** 2, max_size=(last + 1) ** 2)
    cost = torch.tensor(data.draw(values), dtype=torch.float64).view(last + 1, last + 1)

    def total(way: tuple[int, ...]) -> float:
        return sum(coefficient**m * float(cost[a, b]) for m, (a, b) in enumerate(itertools.pairwise(way)))

    ways = [(0, *middle, last) for middle in itertools.combinations(range(1, last), steps - 1)]
    found = tuple(gits(cost, steps, coefficient))
    assert found in ways and total(found) == pytest.approx(min(map(total, ways)))


@pytest.mark.parametrize("path", MODELS)
@pytest.mark.parametrize("schedule", [Karras(), LogSNR(), FlowTime(3.0), AYS(), AYS("svd")], ids=lambda s: s.name)
def test_grids_of_any_length_fall_on_any_model(path: str, schedule: Schedule) -> None:
    for steps in range(1, 51):
        times, levels = MODELS[path].grid(steps, schedule)
        assert len(times) == steps and len(levels) == steps + 1 and falls(torch.tensor(times).double().clamp(min=1e-9) + 1e-12)
        noise = [float(at.sigma) for at in levels]
        assert noise == sorted(noise, reverse=True) and len(set(noise)) == steps + 1 and noise[-1] == 0


@pytest.mark.parametrize("path", MODELS)
def test_a_models_own_grid_in_numbers_changes_nothing(path: str) -> None:
    model = MODELS[path]
    own = own_grid(model, 9)
    for sampler in (BestOfN(2, eta=0.0), FeynmanKac(4, scale=1.0)):
        reward = lambda x, prompts: x[:, 0]  # noqa: E731
        a = SteeredPipeline(model, sampler, reward)(PROMPTS, num_inference_steps=9, seed=1)
        b = SteeredPipeline(model, sampler, reward, schedule=own.values)(PROMPTS, seed=1)
        torch.testing.assert_close(b.latents, a.latents, rtol=1e-5, atol=1e-5)
        assert b.ledger.evaluations == a.ledger.evaluations
        estimated = SteeredPipeline(model, sampler, reward, schedule=own).estimate(len(PROMPTS))
        assert estimated.evaluations == b.ledger.evaluations and estimated.reward_calls == b.ledger.reward_calls
    by_sigma = own if path != "flow" else Given(tuple(r / (1 + r) if r < 1e11 else 1.0 for r in own.values), "sigmas")
    c = SteeredPipeline(model, BestOfN(2, eta=0.0), reward)(PROMPTS, seed=1, sigmas=list(by_sigma.values))
    d = SteeredPipeline(model, BestOfN(2, eta=0.0), reward)(PROMPTS, seed=1, num_inference_steps=9)
    e = SteeredPipeline(model, BestOfN(2, eta=0.0), reward)(PROMPTS, seed=1, timesteps=model.grid(9)[0])
    for other in (c, e):
        torch.testing.assert_close(other.latents, d.latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["shapes", "shapes-flow"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_own_grid_in_numbers_is_the_own_grid_of_a_pipeline(name: str, eta: float) -> None:
    """With eta = 0 the user's solver may be of another order or reckon with another grid; hence eta near 0."""
    pipe = load_pipeline(name)
    own = own_grid(pipe, 5)
    plain = SteeredPipeline(pipe, BestOfN(2, eta=eta or 1e-9), decoder="none", output="all")
    walked = SteeredPipeline(pipe, BestOfN(2, eta=eta), decoder="none", output="all", schedule=own)
    a, b = plain("a red circle", num_inference_steps=5, seed=3), walked("a red circle", seed=3)
    torch.testing.assert_close(b.latents, a.latents, rtol=1e-4, atol=1e-3 if not eta else 1e-5)
    assert walked.estimate().evaluations == b.ledger.evaluations == a.ledger.evaluations


SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {}),
    ("PNDMScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
]


@pytest.mark.parametrize(("name", "options"), SCHEDULERS, ids=lambda v: v if isinstance(v, str) else "")
def test_every_scheduler_walks_what_it_is_given(name: str, options: dict[str, Any], toy_pipeline: Any) -> None:
    toy_pipeline = with_scheduler(toy_pipeline, name, **options)
    for schedule in (Karras(), AYS(), Given((20.0, 5.0, 1.0, 0.3, 0.1))):
        steps, levels = grid_of(toy_pipeline, 5, {}, 0.0, schedule)
        noise = [float(at.sigma / at.alpha.clamp(min=1e-12)) for at in levels]
        assert steps == 5 and falls(torch.tensor(noise[:-1])) and noise[-1] < noise[-2]
    flow = bool(options.get("use_flow_sigmas"))
    assert noise[1:5] == pytest.approx([5.0, 1.0, 0.3, 0.1], rel=1e-4 if flow or "Euler" in name else 0.1)
    steered = SteeredPipeline(toy_pipeline, BestOfN(2, eta=0.0), decoder="none", schedule=Karras())
    out = steered("a red circle", num_inference_steps=5, seed=0)
    assert out.ledger.evaluations == steered.estimate(1, 5).evaluations and bool(out.latents.isfinite().all())
    by_rows = SteeredPipeline(toy_pipeline, BestOfN(2, eta=0.0), decoder="none", schedule=Karras(), chunk=1)
    torch.testing.assert_close(
        by_rows("a red circle", num_inference_steps=5, seed=0).latents, out.latents, rtol=1e-3, atol=1e-4
    )


def test_a_flow_matching_scheduler_walks_what_it_is_given() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from diffsteer.grids import walk

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    walk(scheduler, Given((1.0, 0.8, 0.5, 0.1), "sigmas"))
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0]))
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 800.0, 500.0, 100.0]))
    walk(scheduler, Karras())
    assert float(scheduler.sigmas[0]) == 1.0


@pytest.mark.parametrize("path", MODELS)
def test_the_profile_of_a_mixture_is_that_of_its_errors(path: str) -> None:
    model = MODELS[path]
    profile = loss_mass(model, PROMPTS * 8, cells=16, steps=40)
    assert all(math.isfinite(m) for m in profile.masses)
    assert loss_mass(model, PROMPTS * 8, cells=16, steps=40) is profile  # from memory
    assert loss_mass(model, PROMPTS * 8, cells=16, steps=40, seed=1) is not profile
    for steps in range(1, 51):
        noise = [float(at.sigma) for at in model.grid(steps, profile)[1]]
        assert noise == sorted(noise, reverse=True) and len(set(noise)) == steps + 1


def test_profiles_of_one_gaussian_are_their_closed_form() -> None:
    """N(0, s^2) as a flow: E (x0 - estimate)^2 = s^2 t^2 / ((1 - t)^2 s^2 + t^2), on all paths."""
    s, mixture = 0.5, GaussianMixture([0.0], [0.5])
    samples = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)) * s
    for path in MODELS:
        profile = loss_mass(mixture.model(path, "x0"), ["any"] * 4000, cells=16, samples=samples, cache=False)
        t = torch.tensor(profile.times, dtype=torch.float64)
        density = s**2 / ((1 - t) ** 2 * s**2 + t**2)
        cells = (density[1:] + density[:-1]) / 2 * t.diff()
        torch.testing.assert_close(torch.tensor(profile.masses, dtype=torch.float64)[1:-1], cells[1:-1], rtol=0.1, atol=1e-3)


def test_profiles_are_kept_on_disk_and_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_pipeline: Any) -> None:
    from diffsteer import profiles

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = loss_mass(toy_pipeline, ["a red circle"], cells=4, steps=3)
    (file,) = (tmp_path / "diffsteer" / "profiles").glob("*.json")
    monkeypatch.setattr(profiles, "_measured", {})
    monkeypatch.setattr(profiles, "session_of", None)  # nothing is measured any more
    assert loss_mass(toy_pipeline, ["a red circle"], cells=4, steps=3) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(profiles, "_measured", {})
    file.write_text("{")  # not whole
    assert loss_mass(toy_pipeline, ["a red circle"], cells=4, steps=3) == first
    with torch.no_grad():
        next(toy_pipeline.unet.parameters()).add_(0.1)
    loss_mass(toy_pipeline, ["a red circle"], cells=4, steps=3)
    assert len(list(file.parent.glob("*.json"))) == 2


@pytest.mark.parametrize("path", MODELS)
def test_grids_by_local_deviation_end_nearer_than_even_ones(path: str) -> None:
    model = MODELS[path]
    teacher = trajectory(model, PROMPTS * 4, steps=60)
    cost = local_deviation(teacher)
    assert cost.shape == (61, 61) and float(cost.tril().abs().max()) == 0
    assert float(cost.diagonal(1).abs().max()) < 1e-3  # the teacher's own steps miss nothing
    chosen = gits_schedule(teacher, cost, 6)
    assert gits_schedule(teacher, cost, 60) == Given(gits_schedule(teacher, cost, 60).values)
    way, hops = gits(cost, 6), list(range(0, 61, 10))
    assert sum(float(cost[a, b]) for a, b in itertools.pairwise(way)) < sum(
        float(cost[a, b]) for a, b in itertools.pairwise(hops)
    )
    if path == "flow":
        return  # whose even grid is good already: the sum of local errors is not the error at the end
    evenly = Given(tuple(own_grid(model, 60).values[::10]))

    def missed(grid: Given) -> float:
        out = SteeredPipeline(model, BestOfN(1, eta=0.0), schedule=grid)(PROMPTS * 4, seed=0)
        return float((out.latents[:, 0] - teacher.states[-1]).square().mean().sqrt())

    assert missed(chosen) < missed(evenly)


def test_costs_of_a_reward_count_what_they_say() -> None:
    teacher = trajectory(MODELS["flow"], PROMPTS, steps=12)
    reward = lambda x, prompts: x[:, 0]  # noqa: E731
    cost = reward_change(teacher, reward, power=1.0)
    r = torch.stack([c[:, 0] for c in teacher.cleans]).double()
    assert float(cost[2, 7]) == pytest.approx(float((r[7] - r[2]).abs().mean()), rel=1e-6)
    assert float(reward_error(teacher, reward)[2, 7]) == pytest.approx(
        float((r[2] - r[-1]).abs().mean()) * (5 / 12) ** 2, rel=1e-5
    )
    assert len(gits_schedule(teacher, cost, 5).values) == 5


FLAT = Given((3.0, 2.0))


class Rising:
    name, source = "rising", ""

    def ratios(self, steps: int, high: float, low: float) -> Tensor:
        return torch.linspace(low, high, steps)


def walk_on(model: CallableModel, schedule: Any, steps: int | None = None, **call: Any) -> Any:
    return SteeredPipeline(model, BestOfN(1, eta=0.0), schedule=schedule)(["any"], num_inference_steps=steps, seed=0, **call)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: walk_on(MODELS["vp"], [1.0, 2.0]), "ratios must fall from step to step: 1, 2"),
        (lambda: walk_on(MODELS["vp"], Rising(), 4), "the schedule rising does not fall"),
        (lambda: walk_on(MODELS["vp"], [1.0, -2.0]), "does not fall from step to step, above 0"),
        (lambda: walk_on(MODELS["vp"], []), "ratios: give at least one"),
        (lambda: walk_on(MIXTURE.model("vp", "x0", 20), LogSNR(), 21), "21 steps; this model has 20 timesteps"),
        (lambda: walk_on(MODELS["vp"], FLAT, 3), "3 steps, but 2 ratios were given"),
        (lambda: walk_on(MODELS["vp"], Karras), "schedule is an object, such as Karras"),
        (lambda: walk_on(MODELS["vp"], "karras"), "schedule is an object"),
        (lambda: walk_on(MODELS["vp"], FLAT, sigmas=[2.0, 1.0]), "give one of sigmas and schedule, not both"),
        (lambda: walk_on(MODELS["vp"], None, timesteps=[1000, 1]), "timesteps lie in [0, 999]"),
        (lambda: walk_on(MODELS["flow"], None, sigmas=[2.0, 1.0]), "sigmas of a flow lie in (0, 1]"),
        (lambda: SteeredPipeline(MODELS["vp"], schedule=FLAT), "is the plain chain"),
        (lambda: SteeredPipeline(MODELS["vp"], BestOfN(2), transition="native", schedule=FLAT), "leave the schedule out"),
        (lambda: AYS("sd3"), "table='sd3' is unknown; valid: sd15, sdxl, svd"),
        (lambda: Given((1.0,), "logs"), "kind='logs' is unknown"),
        (lambda: Profile((0.0, 1.0), (0.0,)), "not all zero"),
        (lambda: Profile((0.0, 0.5, 0.2), (1.0, 1.0)), "rising within"),
        (lambda: from_profile([0.0], [1.0, 2.0]), "as many of each"),
        (lambda: gits(torch.zeros(3, 3), 3), "this cost has 1 to 2"),
        (lambda: gits(torch.zeros(3, 2), 1), "no square matrix"),
        (lambda: gits(torch.full((3, 3), math.nan), 2), "no numbers"),
        (lambda: loss_mass(MODELS["vp"], PROMPTS, samples=torch.zeros(2, 1)), "2 samples for 8 prompts"),
    ],
)
def test_wrong_grids_are_refused_in_one_line(wrong: Any, said: str) -> None:
    with pytest.raises(DiffsteerError) as error:
        wrong()
    assert said in str(error.value) and "\n" not in str(error.value)
