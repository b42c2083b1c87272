"""Time-shift and epsilon scaling: exactness on Gaussian data, reductions, cost, and warnings where the rule says nothing."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from core.test_backend import with_scheduler
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from families.toys import TOYS
from torch import Tensor

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.algebra import Level, level
from diffsteer.backend import DiffusersSession
from diffsteer.callable import CallableModel, CallableSession
from diffsteer.rewards import Compressibility
from diffsteer.samplers import BestOfN, EpsilonScaling, FeynmanKac, TimeShift
from diffsteer.shapes import render, sample_scene
from diffsteer.timed import TimedWalk
from diffsteer.timing import Clock, Timing, match, reference_variance, sample_variance
from diffsteer.types import DiffsteerError, UnsupportedError

BARS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def gaussian(variance: float, path: str = "vp", shape: tuple[int, ...] = (3, 64, 64)) -> CallableModel:
    """Data N(0, variance): the exact clean estimate is linear."""

    def fn(x: Tensor, t: Tensor, conditions: list[str]) -> Tensor:
        bars = BARS[t.long()] if path == "vp" else None
        at = Level(bars.sqrt(), (1 - bars).sqrt()) if bars is not None else level(1 - t.double(), t.double())
        alpha, sigma = at.like(x.double())
        x0: Tensor = alpha * variance / (alpha**2 * variance + sigma**2) * x.double()
        return x0.to(x.dtype)

    return CallableModel(fn, "x0", path, shape, BARS if path == "vp" else None)


def clock_of(model: CallableModel, steps: int) -> Clock:
    return Clock(torch.tensor(model.grid(steps)[0], dtype=torch.float64), model.table())


def states(variance: float, at: Level, rows: int = 8, count: int = 3 * 64 * 64) -> Tensor:
    z = torch.randn(2, rows, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (z - z.mean(2, keepdim=True)) / z.std(2, keepdim=True)  # their variance is exactly what the level says
    z[1] -= (z[0] * z[1]).mean(1, keepdim=True) * z[0]
    z[1] /= z[1].std(1, keepdim=True)
    x: Tensor = float(at.alpha) * variance**0.5 * z[0] + float(at.sigma) * z[1]
    return x


@pytest.mark.parametrize("variance", [0.085, 0.25, 0.5])
def test_exact_states_are_left_where_they_are(variance: float) -> None:
    model = gaussian(variance)
    clock, timing = clock_of(model, 10), Timing(reference="data_var", data_variance=variance)
    for nominal in (900.0, 500.0, 300.0):
        x = states(variance, clock.level(torch.tensor([nominal])))
        found = match(x, nominal, timing, clock, torch.full((8,), variance, dtype=torch.float64))
        assert found.by.abs().max() <= 1


def test_noise_left_over_is_found() -> None:
    variance, clock = 0.25, clock_of(gaussian(0.25), 10)
    timing = Timing(reference="data_var", data_variance=variance)
    for true in (492.0, 507.0, 515.0):
        x = states(variance, clock.level(torch.tensor([true])))
        found = match(x, 500.0, timing, clock, torch.full((8,), variance, dtype=torch.float64))
        assert (found.times - true).abs().max() <= 1
        assert not found.edge.any()


@pytest.mark.parametrize(("variance", "at", "bias"), [(0.25, 500, 28), (0.25, 900, 16), (0.5, 500, 64), (0.5, 900, 37)])
def test_the_published_rule_is_biased_by_the_data(variance: float, at: int, bias: int) -> None:
    """The known error of comparing with sigma^2 alone, on perfect samples."""
    clock = clock_of(gaussian(variance), 10)
    x = states(variance, clock.level(torch.tensor([float(at)])))
    found = match(x, float(at), Timing(window=400, reference="noise"), clock, torch.zeros(8, dtype=torch.float64))
    assert (found.by - bias).abs().max() <= 2


def test_data_of_unit_variance_is_degenerate_and_said_to_be() -> None:
    model = gaussian(1.0)
    with pytest.warns(UserWarning, match="edge of the window"):
        out = SteeredPipeline(model, TimeShift(reference="noise"))(["", ""], num_inference_steps=10, seed=0)
    assert torch.cat([s.edge for s in out.trace.shifts]).all()
    with pytest.warns(UserWarning, match="varies by more than"):
        SteeredPipeline(model, TimeShift(reference="data_var", data_variance=1.0))([""], num_inference_steps=10, seed=0)


def test_no_warning_where_there_is_nothing_to_warn_of() -> None:
    timing = TimeShift(reference="data_var", data_variance=0.01, window=80)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = SteeredPipeline(gaussian(0.01), timing)(["", ""], num_inference_steps=50, seed=0)
    assert len(out.trace.shifts) == 34  # of the times above the cutoff, the first one aside


def test_a_chain_on_gaussian_data_keeps_its_law() -> None:
    """DDPM with few steps ends too narrow; where the drift is known, the calibrated shift changes the end by little."""
    variance = 0.25
    model = gaussian(variance)
    plain = SteeredPipeline(model, BestOfN(1, eta=0.0))([""] * 4, num_inference_steps=20, seed=0)
    shifted = SteeredPipeline(model, TimeShift(reference="data_var", data_variance=variance))(
        [""] * 4, num_inference_steps=20, seed=0
    )
    before, after = (float(sample_variance(out.samples.flatten(0, 1)).mean()) for out in (plain, shifted))
    assert abs(after - variance) < abs(before - variance) + 0.01


@pytest.mark.parametrize("path", ["vp", "flow"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_without_a_window_it_is_the_plain_chain(path: str, eta: float) -> None:
    model = gaussian(0.3, path, (3, 8, 8))
    plain = SteeredPipeline(model, BestOfN(2, eta=eta))(["a", "b"], num_inference_steps=7, seed=1)
    for sampler in (TimeShift(2, eta=eta, window=0.0), EpsilonScaling(2, eta=eta, scale=1.0)):
        assert torch.equal(SteeredPipeline(model, sampler)(["a", "b"], num_inference_steps=7, seed=1).samples, plain.samples)


def test_a_shift_by_nothing_is_the_plain_chain_to_rounding() -> None:
    """The path with levels of the rows' own, at the grid's levels."""
    model = gaussian(0.3, shape=(3, 8, 8))
    plain = SteeredPipeline(model, BestOfN(2, eta=1.0))(["a"], num_inference_steps=7, seed=1)
    scaled = SteeredPipeline(model, EpsilonScaling(2, eta=1.0, scale=1 + 1e-12))(["a"], num_inference_steps=7, seed=1)
    torch.testing.assert_close(scaled.samples, plain.samples, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("order", "steps", "evaluations"), [(1, 10, 10), (2, 10, 11), (4, 10, 19), (4, 5, 14), (4, 2, 5), (2, 1, 1)]
)
@pytest.mark.parametrize("reference", ["noise", "calibrated"])
def test_declared_cost_is_counted_cost(order: int, steps: int, evaluations: int, reference: str) -> None:
    steered = SteeredPipeline(gaussian(0.3, shape=(3, 8, 8)), TimeShift(2, order=order, reference=reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counted = steered(["a", "b"], num_inference_steps=steps, seed=0).ledger
    assert counted.evaluations == 4 * (evaluations + steps * (reference == "calibrated"))
    declared = steered.estimate(2, steps)
    assert (declared.evaluations, declared.forwards) == (counted.evaluations, counted.forwards)


def test_other_rows_change_nothing() -> None:
    sampler = TimeShift(2, eta=1.0, window=100)
    steered = SteeredPipeline(gaussian(0.2, shape=(3, 8, 8)), sampler, chunk=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        three = steered(["a", "b", "c"], num_inference_steps=8, seed=2, ids=[5, 6, 7])
        one = steered(["b"], num_inference_steps=8, seed=2, ids=[6])
    torch.testing.assert_close(three.samples[1], one.samples[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_a_changed_picture_is_calibrated_from_the_picture(strength: float) -> None:
    """What is measured is the variance that a plain run of the same class has at its end."""
    pipe = StableDiffusionImg2ImgPipeline(**load_pipeline("shapes").components)
    pipe.set_progress_bar_config(disable=True)
    picture = render(sample_scene("two_object", np.random.default_rng(3)))
    call: dict[str, Any] = {"image": picture, "strength": strength, "num_inference_steps": 10, "ids": [1, 2, 3]}
    prompts = ["a red circle"] * 3
    plain = SteeredPipeline(pipe, BestOfN(4, eta=0.0), Compressibility())(prompts, seed=1, **call)
    session = DiffusersSession(
        pipe,
        prompts,
        particles=4,
        seed=2,
        eta=0.0,
        own=True,
        num_inference_steps=10,
        call={"image": picture, "strength": strength, "guidance_scale": 4.0},
    )
    variances, _ = TimedWalk(session, Timing())._data_variance()
    assert float(variances.mean()) == pytest.approx(float(sample_variance(plain.latents.flatten(0, 1)).mean()), rel=0.15)
    first, again = session.noise(), session.noise()
    assert torch.equal(first, again), "the run to come begins as ever"


def test_other_rows_change_nothing_where_estimates_are_clipped() -> None:
    """Some rows are shifted and some are not; those that are not must not know."""
    pipe = TOYS["DDPMPipeline"].build()
    pipe.scheduler = DDIMScheduler(clip_sample=True, clip_sample_range=0.1)
    bars = pipe.scheduler.alphas_cumprod

    def exact(sample: Tensor, timestep: Tensor, **options: Any) -> Any:
        bar = bars[torch.as_tensor(timestep).long()].view(-1, 1, 1, 1)
        return SimpleNamespace(sample=(1 - bar).sqrt() / (bar * 0.2 + 1 - bar) * sample)

    pipe.unet.forward = exact
    sampler = TimeShift(eta=1.0, window=6, cutoff=100, reference="data_var", data_variance=0.2)

    def run(ids: list[int]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return SteeredPipeline(pipe, sampler)([""] * len(ids), num_inference_steps=8, seed=0, ids=ids)

    together = run(list(range(60)))
    moved = torch.stack([s.by for s in together.trace.shifts]) != 0
    stayed = (~moved).any(0).nonzero().flatten().tolist()
    assert stayed and bool(moved.any())
    for i in stayed[:4]:
        torch.testing.assert_close(together.latents[i], run([i]).latents[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [2, 4])
def test_higher_orders_are_nearer_to_the_solution(order: int) -> None:
    model = gaussian(0.3, shape=(3, 8, 8))

    def end(sampler: TimeShift, steps: int) -> Tensor:
        return SteeredPipeline(model, sampler)(["a"], num_inference_steps=steps, seed=1).samples

    exact, single, several = (
        end(TimeShift(window=0.0), 1000),
        end(TimeShift(window=0.0), 40),
        end(TimeShift(window=0.0, order=order), 40),
    )
    assert (several - exact).norm() < 0.5 * (single - exact).norm()


@pytest.mark.parametrize("scale", [0.98, 1.05])
def test_scaling_divides_the_noise(scale: float) -> None:
    """One step by hand."""
    session = CallableSession(gaussian(0.3, shape=(3, 8, 8)), ["a"], num_inference_steps=8, particles=2, seed=0, eta=0.0)
    walk = TimedWalk(session, Timing(window=0.0, epsilon_scale=scale))
    x, k = session.noise(), 3
    at, to = session.levels[k], session.levels[k + 1]
    alpha, sigma = float(at.alpha), float(at.sigma)
    eps = (x - alpha * session.segment(x, k, k + 1).x0) / sigma / scale
    x0 = (x - sigma * eps) / alpha
    stepped, clean = walk._step(x, k, walk._nominal(k))
    torch.testing.assert_close(clean, x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stepped, float(to.alpha) * x0 + float(to.sigma) * eps, rtol=1e-4, atol=1e-5)


def test_the_data_s_variance_is_measured() -> None:
    for variance in (0.1, 0.8):
        session = CallableSession(gaussian(variance), ["a", "b"], num_inference_steps=100, particles=2, seed=0, eta=0.0)
        found, _ = TimedWalk(session, Timing(window=40.0))._data_variance()
        assert found.shape == (4,) and found.tolist() == pytest.approx([variance] * 4, rel=0.15)  # of 100 steps


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 1.001])
def test_levels_without_signal_are_stepped_from_by_the_network_s_own_estimate(order: int, scale: float) -> None:
    """A flow begins with none: nothing there is divided by alpha."""
    steered = SteeredPipeline(gaussian(0.3, "flow", (3, 8, 8)), EpsilonScaling(2, scale=scale, order=order))
    out = steered(["a"] * 8, num_inference_steps=20, seed=0)
    assert float(out.samples.var()) == pytest.approx(0.3, rel=0.2)
    assert out.ledger.evaluations == steered.estimate(8, 20).evaluations


def test_a_window_is_in_thousandths_of_the_model_s_times() -> None:
    vp, flow = clock_of(gaussian(0.3), 10), clock_of(gaussian(0.3, "flow"), 10)
    assert vp.unit == 1.0 and flow.unit == pytest.approx(1e-3, rel=1e-2)
    near = flow.window(0.5, 40.0)
    assert float(near.max() - near.min()) == pytest.approx(0.04, abs=0.002)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steered = SteeredPipeline(gaussian(0.3, "flow", (3, 8, 8)), TimeShift(2))
        assert len(steered(["a"], num_inference_steps=10, seed=0).trace.shifts) > 3


@pytest.mark.parametrize("name", ["DDPMScheduler", "PNDMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedulers_and_precisions(toy_pipeline: Any, name: str, dtype: torch.dtype) -> None:
    pipe = with_scheduler(copy.deepcopy(toy_pipeline).to(dtype), name)
    for sampler in (
        TimeShift(2, reference="noise", cutoff=0.0),
        EpsilonScaling(2, scale=1.01),
        TimeShift(2, window=0.0, order=4),
    ):
        steered = SteeredPipeline(pipe, sampler, decoder="none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = steered(["a circle"], num_inference_steps=6, seed=0)
        assert bool(out.latents.isfinite().all()) and out.latents.dtype == dtype
        assert out.ledger.counts == steered.estimate(1, 6).counts
    plain = SteeredPipeline(pipe, TimeShift(2, window=0.0), decoder="none")(["a circle"], num_inference_steps=6, seed=0)
    ddim = SteeredPipeline(with_scheduler(pipe, "DDIMScheduler"), BestOfN(2, eta=0.0), decoder="none")
    if dtype == torch.float32 and name == "DDIMScheduler":
        assert torch.equal(plain.latents, ddim(["a circle"], num_inference_steps=6, seed=0).latents)


def test_levels_between_those_of_the_table() -> None:
    for path in ("vp", "flow"):
        clock = clock_of(gaussian(0.3, path), 10)
        t = clock.table[[10, 500], 0]
        assert torch.allclose(clock.level(t).sigma, clock.table[[10, 500], 2])
        between = clock.level((t + clock.table[[11, 501], 0]) / 2)
        assert (clock.table[[10, 500], 2] < between.sigma).all() and (between.sigma < clock.table[[11, 501], 2]).all()
    assert float(clock.level(torch.tensor([0.33333])).alpha) == pytest.approx(0.66667)


def test_the_embedded_model_is_asked_for_times_of_its_rows() -> None:
    pipe = load_pipeline("shapes")
    asked: list[Tensor] = []  # by the layer that turns times into numbers, which hooks of ours cannot be behind
    handle = pipe.unet.time_proj.register_forward_pre_hook(lambda module, args: asked.append(args[0].clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = SteeredPipeline(pipe, TimeShift(2, reference="noise", window=60))(["a red circle"], num_inference_steps=6, seed=0)
    handle.remove()
    moved = out.trace.shifts[0]
    assert asked[-6 + moved.step].tolist() == [*moved.times.tolist(), *moved.times.tolist()]  # both halves of guidance
    assert moved.times.shape == (2,) and bool((moved.by != 0).any())
    plain = SteeredPipeline(pipe, BestOfN(2, eta=0.0))(["a red circle"], num_inference_steps=6, seed=0)
    assert not torch.allclose(out.latents, plain.latents)
    assert out.ledger.evaluations == plain.ledger.evaluations
    still = SteeredPipeline(pipe, TimeShift(2, window=0.0))(["a red circle"], num_inference_steps=6, seed=0)
    assert torch.equal(still.latents, plain.latents)


def test_times_reach_network_and_update() -> None:
    """A session whose rows are at levels of their own gives what two sessions at these levels give."""
    seen: list[Tensor] = []
    inner = gaussian(0.3, shape=(3, 8, 8))

    def fn(x: Tensor, t: Tensor, conditions: list[str]) -> Tensor:
        seen.append(t.clone())
        return inner.fn(x, t, conditions)

    model = CallableModel(fn, "x0", "vp", (3, 8, 8), BARS)
    session = CallableSession(model, ["a", "b"], num_inference_steps=5, particles=1, seed=0, eta=0.0)
    walk = TimedWalk(session, Timing(window=1.0, cutoff=0.0, reference="noise"))
    x, times = session.noise(), torch.tensor([799.0, 750.0], dtype=torch.float64)
    x1, x0 = walk._step(x, 1, times)
    assert seen[-1].tolist() == [799.0, 750.0]
    at = walk.clock.level(times)
    bars = (at.alpha**2)[:, None, None, None]
    torch.testing.assert_close(x0.double(), (bars.sqrt() * 0.3 / (bars * 0.3 + 1 - bars) * x.double()), rtol=1e-4, atol=1e-5)
    walk.timing = Timing(window=1.0, cutoff=0.0, reference="noise", side="update")
    walk._step(x, 1, times)
    assert seen[-1].tolist() == [float(walk.clock.times[1])] * 2
    assert torch.allclose(reference_variance(at, torch.tensor([0.3])), at.alpha**2 * 0.3 + at.sigma**2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TimeShift(window=-1), "window=-1"),
        (lambda: TimeShift(reference="best"), "valid: calibrated, noise, data_var"),
        (lambda: TimeShift(reference="data_var"), "data_variance="),
        (lambda: TimeShift(data_variance=0.3), "reference=data_var"),
        (lambda: TimeShift(order=3), "valid: 1, 2, 4"),
        (lambda: TimeShift(order=4, eta=1.0), "set eta=0"),
        (lambda: TimeShift(side="left"), "valid: conditioning, update"),
        (lambda: EpsilonScaling(scale=0.0), "must be positive"),
        (lambda: EpsilonScaling(order=2, eta=0.5), "set eta=0"),
    ],
)
def test_wrong_values_are_told(make: object, said: str) -> None:
    with pytest.raises(DiffsteerError, match=said):
        make()  # type: ignore[operator]


def test_models_without_a_clock_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="alphas_cumprod"):
        SteeredPipeline(load_pipeline("shapes-flow"), TimeShift())(["a red circle"], num_inference_steps=4, seed=0)
    with pytest.raises(UnsupportedError, match="one element"):
        SteeredPipeline(gaussian(0.3, shape=(1,)), TimeShift())(["a"], num_inference_steps=4, seed=0)
    with pytest.raises(DiffsteerError, match="guide"):
        SteeredPipeline(gaussian(0.3), TimeShift(), lambda x, p: x.mean((1, 2, 3)), guide=FeynmanKac(2))(["a"], seed=0)
