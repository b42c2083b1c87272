"""Rows in blocks, and blocks that shrink when memory runs out."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsteer import CallableModel, DiffsteerError, SteeredPipeline
from diffsteer.blocks import Blocks
from diffsteer.samplers import BestOfN, FeynmanKac

PROMPTS = ["a red circle", "two stars"]
STEPS = 6


def brightness(x: Tensor, prompts: object) -> Tensor:
    return 100 * x.mean((1, 2, 3))


def test_every_row_once_and_in_order() -> None:
    for size, pad in ((None, False), (3, False), (3, True), (20, True), (1, False)):
        found = Blocks(size, pad).run(8, lambda block: list(dict.fromkeys(block)))
        assert [row for block in found for row in block] == list(range(8))
    assert Blocks(3, True).run(8, len) == [3, 3, 3] and Blocks(3).run(8, len) == [3, 3, 2]


def test_auto_halves_for_good_and_says_so_once() -> None:
    tried: list[int] = []

    def work(block: list[int]) -> int:
        tried.append(len(block))
        if len(block) > 3:
            raise torch.OutOfMemoryError("planted")
        return len(block)

    cut = Blocks("auto")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert sum(cut.run(10, work)) == 10 and sum(cut.run(4, work)) == 4
    assert tried == [10, 5, 3, 3, 3, 1, 3, 1] and len(said) == 1 and "out of memory with 10 rows" in str(said[0].message)
    with pytest.raises(torch.OutOfMemoryError):
        Blocks(5).run(10, work)


def test_a_row_that_does_not_fit_is_the_users_to_know() -> None:
    def never(block: list[int]) -> int:
        raise torch.OutOfMemoryError("planted")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch.OutOfMemoryError):
            Blocks("auto").run(4, never)


@pytest.mark.parametrize("chunk", [0, -1, "all"])
def test_sizes_that_are_none(toy_pipeline: Any, chunk: Any) -> None:
    with pytest.raises(DiffsteerError, match="chunk="):
        SteeredPipeline(toy_pipeline, BestOfN(2), brightness, chunk=chunk)
    with pytest.raises(DiffsteerError, match="chunk=auto cannot be deterministic"):
        SteeredPipeline(toy_pipeline, BestOfN(2), brightness, chunk="auto", deterministic=True)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_run_goes_on_where_memory_ends(toy_pipeline: Any, part: str) -> None:
    """Planted in the denoiser, or in the decoder; the result is that of a run in small blocks."""
    module = toy_pipeline.unet if part == "unet" else toy_pipeline.vae.decoder

    def planted(module: Any, args: tuple[Any, ...]) -> None:
        if len(args[0]) > (6 if part == "unet" else 3):
            raise torch.OutOfMemoryError("planted")

    pipe = SteeredPipeline(toy_pipeline, FeynmanKac(4), brightness, chunk="auto")
    whole = pipe(PROMPTS, num_inference_steps=STEPS, seed=0)
    handle = module.register_forward_pre_hook(planted)
    try:
        with pytest.warns(UserWarning, match="out of memory"):
            out = pipe(PROMPTS, num_inference_steps=STEPS, seed=0)
    finally:
        handle.remove()
    torch.testing.assert_close(out.samples, whole.samples, rtol=1e-3, atol=1e-3)


def test_two_texts_as_experts_are_one_mixed_prediction(toy_pipeline: Any) -> None:
    """Against the mix done by hand: guidance is linear, so half of each prompt's guided prediction."""
    from diffsteer.backend import DiffusersSession

    both = DiffusersSession(
        toy_pipeline, [("a red circle", "two stars")], particles=3, seed=0, num_inference_steps=STEPS, experts=(0.5, 0.5)
    )
    single = [
        DiffusersSession(toy_pipeline, [text], particles=3, seed=0, num_inference_steps=STEPS)
        for text in ("a red circle", "two stars")
    ]
    x = both.noise()
    assert x.shape == (3, 4, 8, 8) and torch.equal(x, single[0].noise())
    for k in range(3):
        arrival = both.segment(x, k, k + 1)
        x0 = sum(0.5 * s.segment(x, k, k + 1).x0 for s in single)
        torch.testing.assert_close(arrival.x0, x0, rtol=1e-4, atol=1e-4)
        x = arrival.x
    assert both.ledger.evaluations == 3 * 3 * 2 * 2
    same = DiffusersSession(
        toy_pipeline, [("two stars", "two stars")], particles=3, seed=0, num_inference_steps=STEPS, experts=(0.3, 0.7)
    )
    z = same.noise()
    torch.testing.assert_close(same.segment(z, 0, STEPS).x, single[1].segment(z, 0, STEPS).x, rtol=1e-3, atol=1e-4)


def test_experts_through_the_python_face(toy_pipeline: Any) -> None:
    pipe = SteeredPipeline(toy_pipeline, FeynmanKac(2), brightness, experts=(0.5, 0.5))
    pairs = [("a red circle", "two stars"), ("a ring", "a cross")]
    out = pipe(pairs, num_inference_steps=STEPS, seed=0, reward_prompts=["one", "two"])
    assert out.samples.shape[:2] == (2, 2) and out.ledger.counts == pipe.estimate(2, STEPS).counts
    with pytest.raises(DiffsteerError, match="reward_prompts="):
        pipe(pairs, num_inference_steps=STEPS, seed=0)
    with pytest.raises(DiffsteerError, match="2 experts want as many texts"):
        pipe(PROMPTS, num_inference_steps=STEPS, seed=0, reward_prompts=PROMPTS)


def test_experts_of_a_function() -> None:
    """x0 = the condition itself: the mixed estimate is the weighted mean of the conditions."""
    model = CallableModel(
        lambda x, t, c: torch.tensor(c, dtype=x.dtype)[:, None].expand_as(x), prediction="x0", path="flow", shape=(2,)
    )
    pipe = SteeredPipeline(model, BestOfN(1), lambda x, p: x.sum(1), experts=(0.25, 0.75))
    out = pipe([(0.0, 4.0)], num_inference_steps=5, seed=0, reward_prompts=["x"])
    torch.testing.assert_close(out.samples, torch.full((1, 1, 2), 3.0))
