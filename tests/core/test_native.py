"""Steps of the user's own stochastic scheduler as the transition: keyed, cut and resampled like ours."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from diffsteer import SteeredPipeline, UnsupportedError
from diffsteer.backend import DiffusersSession
from diffsteer.samplers import BestOfN, FeynmanKac

PROMPTS = ["a red circle", "two stars"]
STEPS = 7
NATIVE: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
}


def brightness(x: Tensor, prompts: object) -> Tensor:
    return 100 * x.mean((1, 2, 3))


def with_scheduler(pipe: Any, name: str, **options: Any) -> Any:
    pipe = copy.copy(pipe)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return pipe


def open_session(pipe: Any, **options: Any) -> DiffusersSession:
    given = {"particles": 3, "seed": 0, "num_inference_steps": STEPS, "transition": "native", **options}
    return DiffusersSession(pipe, PROMPTS, **given)


@pytest.mark.parametrize("name", NATIVE)
def test_pieces_and_blocks_are_the_whole(toy_pipeline: Any, name: str) -> None:
    pipe = with_scheduler(toy_pipeline, name, **NATIVE[name])
    session = open_session(pipe)
    x = session.noise()
    whole = session.segment(x, 0, STEPS)
    y = session.segment(x, 0, 3).x
    y = session.segment(y, 3, 4).x
    assert torch.equal(session.segment(y, 4, STEPS).x, whole.x)
    blocks = open_session(pipe, chunk=2)
    z = blocks.segment(blocks.noise(), 0, 3).x
    torch.testing.assert_close(blocks.segment(z, 3, STEPS).x, whole.x, rtol=1e-3, atol=1e-4)
    assert not torch.equal(open_session(pipe, seed=1).segment(x, 0, STEPS).x, whole.x), "it is stochastic"


@pytest.mark.parametrize("name", NATIVE)
def test_the_result_is_that_of_the_survivors_simulated_alone(toy_pipeline: Any, name: str) -> None:
    pipe = with_scheduler(toy_pipeline, name, **NATIVE[name])
    sampler = FeynmanKac(3, events=(0.3, 0.6), trigger="always", resampling="multinomial")
    out = SteeredPipeline(pipe, sampler, brightness, transition="native")(PROMPTS, num_inference_steps=STEPS, seed=0)
    *cuts, end = [e.done for e in out.trace.events]
    assert bool(torch.stack(out.trace.ancestors).ne(torch.arange(3)).any()), "somebody must be replaced"
    for p in range(2):
        for k in range(3):
            slots = [k]
            for info in reversed(out.trace.events[:-1]):
                slots.insert(0, int(info.ancestors[p, slots[0]]))
            session = open_session(pipe)
            row, at = 3 * p + slots[0], 0
            x = session.noise([row])
            for slot, stop in zip(slots, [*cuts, end], strict=True):
                if at:  # the survivor goes on in its new slot, and takes what its solver remembers along
                    if (row, at) in session.history._rows:
                        session.history._rows[3 * p + slot, at] = session.history._rows[row, at]
                    row = 3 * p + slot
                x, at = session.segment(x, at, stop, [row]).x, stop
            torch.testing.assert_close(x[0], out.latents[p, k], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_in_one_call_and_in_segments_it_is_the_same(toy_pipeline: Any, name: str) -> None:
    pipe = with_scheduler(toy_pipeline, name, **NATIVE[name])
    steered = SteeredPipeline(pipe, FeynmanKac(3, events=2, trigger="always"), brightness, transition="native")
    between = steered(PROMPTS, num_inference_steps=STEPS, seed=0)
    inside = steered(PROMPTS, num_inference_steps=STEPS, seed=0, callback_on_step_end=lambda pipe, i, t, tensors: {})
    assert torch.equal(between.latents, inside.latents) and torch.equal(between.log_weights, inside.log_weights)


@pytest.mark.parametrize("name", NATIVE)
def test_it_costs_what_was_said(toy_pipeline: Any, name: str) -> None:
    """Also with what diffsteer's own transition refuses."""
    pipe = with_scheduler(toy_pipeline, name, **NATIVE[name], thresholding=True)
    steered = SteeredPipeline(pipe, FeynmanKac(3, events=2), brightness, transition="native")
    said = steered.estimate(2, STEPS).counts
    assert steered(PROMPTS, num_inference_steps=STEPS, seed=0).ledger.counts == said


def test_ddim_at_eta_one_is_our_own_transition(toy_pipeline: Any) -> None:
    """The same law (the tests of the transition put the same noise in); here the same clean estimate."""
    native, own = open_session(toy_pipeline), open_session(toy_pipeline, transition="own")
    x = own.noise()
    torch.testing.assert_close(native.segment(x, 0, 1).x0, own.segment(x, 0, 1).x0)


def test_the_same_step_may_be_taken_twice(toy_pipeline: Any) -> None:
    """What a solver remembers belongs to a row at a level: walking on from there again gives the same again."""
    session = open_session(with_scheduler(toy_pipeline, "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"))
    x = session.segment(session.noise(), 0, 3).x
    first = session.segment(x, 3, STEPS)
    assert torch.equal(session.segment(x, 3, STEPS).x, first.x)
    found, arrival = session.gradient(x, 3, lambda x0, rows: x0.flatten(1).sum(1))
    assert torch.equal(session.segment(x, 3, 4).x, arrival.x) and bool(found.isfinite().all())
    with pytest.raises(UnsupportedError, match="remembers its last steps, and row 0 was not carried to step 4 before"):
        open_session(session.user).segment(x, 4, STEPS)
    with pytest.raises(UnsupportedError, match="remembers its last steps, which get no gradient"):
        session.trajectory(session.noise())


CUTTABLE: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepScheduler of third order": {"solver_order": 3},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
}


@pytest.mark.parametrize("name", CUTTABLE)
def test_deterministic_solvers_are_cut_too(toy_pipeline: Any, name: str) -> None:
    """With eta = 0 the user's own solver, bit for bit the plain pipeline: in pieces, in blocks, some rows only, and twice."""
    pipe = with_scheduler(toy_pipeline, name.split()[0], **CUTTABLE[name])
    session = open_session(pipe, transition="own", eta=0.0)
    x = session.noise()
    whole = session.segment(x, 0, STEPS).x
    start = x / float(pipe.scheduler.init_noise_sigma) if "Euler" not in name else None
    if start is not None:
        texts = [p for p in PROMPTS for _ in range(3)]
        assert torch.equal(pipe(texts, latents=start, num_inference_steps=STEPS, output_type="latent").images, whole)
    y, at = x, 0
    for stop in (1, 3, 4, STEPS):
        before, y, at = y, session.segment(y, at, stop).x, stop
    assert torch.equal(y, whole) and torch.equal(session.segment(before, 4, STEPS).x, whole)
    torch.testing.assert_close(session.segment(before[[4, 1]], 4, STEPS, rows=[4, 1]).x, whole[[4, 1]], rtol=1e-3, atol=1e-4)
    blocks = open_session(pipe, transition="own", eta=0.0, chunk=4)
    z = blocks.segment(blocks.segment(x, 0, 3).x, 3, STEPS).x
    torch.testing.assert_close(z, whole, rtol=1e-3, atol=1e-4)


def test_the_whole_path_of_a_plain_solver_has_a_gradient(toy_pipeline: Any) -> None:
    """Of the ODE, eta = 0, against a finite difference."""
    pipe = copy.copy(toy_pipeline)
    for name in ("unet", "text_encoder", "vae"):
        setattr(pipe, name, copy.deepcopy(getattr(pipe, name)).double())
    session = open_session(pipe, transition="own", eta=0.0, particles=1)
    z = session.noise()
    along = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z)
    leaf = z.clone().requires_grad_(True)
    found = torch.autograd.grad(session.trajectory(leaf).square().sum(), leaf)[0]
    with torch.no_grad():
        up, down = (session.segment(z + s * along, 0, STEPS).x.square().sum() for s in (1e-5, -1e-5))
    assert float((found * along).sum()) == pytest.approx(float(up - down) / 2e-5, rel=1e-4)


def test_others_are_refused_by_name(toy_pipeline: Any) -> None:
    for name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"):
        with pytest.raises(UnsupportedError, match=f"{name} of its own noise.*transition=native takes DDIMScheduler"):
            open_session(with_scheduler(toy_pipeline, name))
    with pytest.raises(UnsupportedError, match="algorithm_type='dpmsolver\\+\\+'"):
        open_session(with_scheduler(toy_pipeline, "DPMSolverMultistepScheduler"))
    from diffsteer import DiffsteerError

    with pytest.raises(DiffsteerError, match="transition='mine' is unknown; valid: own, native"):
        SteeredPipeline(toy_pipeline, BestOfN(2), brightness, transition="mine")
