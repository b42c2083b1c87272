"""Whatever happens to a run, the user's pipeline stays as it was, and other runs on it stay what they were."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from families.test_families import PROMPTS, built, level_of, session
from families.toys import SIX, TOYS
from torch import Tensor, nn

from diffsteer import SteeredPipeline, UnsupportedError, steered
from diffsteer.hooks import Watch, _active
from diffsteer.ledger import Ledger
from diffsteer.pipes import denoisers_of
from diffsteer.samplers import BestOfN, FeynmanKac


def modules_of(pipe: Any) -> list[nn.Module]:
    return [m for c in pipe.components.values() if isinstance(c, nn.Module) for m in c.modules()]


def picture_of(pipe: Any) -> Any:
    """What a run must leave as it is."""
    modules = modules_of(pipe)
    return (
        {name: id(value) for name, value in vars(pipe).items()},
        {name: repr(value) for name, value in vars(pipe.scheduler).items()},
        [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training, "forward" in vars(m)) for m in modules],
        [(p.requires_grad, p.grad is None, p._version) for m in modules for p in m.parameters(recurse=False)],
        _active.get(),
    )


@contextmanager
def failing(pipe: Any, error: type[BaseException], forward: int) -> Iterator[None]:
    """The denoiser raises at its n-th evaluation."""
    calls = iter(range(10**6))

    def strike(*_: Any) -> None:
        if next(calls) == forward:
            raise error("struck")

    handles = [d.register_forward_pre_hook(strike) for d in denoisers_of(pipe)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def used(name: str) -> Any:
    """The pipeline after a call of its own: it notes its arguments, and its text encoders hang hooks into themselves."""
    toy, pipe = TOYS[name], built(name)
    SteeredPipeline(pipe)(PROMPTS, seed=0, negative_prompt=toy.each.get("negative_prompt"), **toy.call)
    return pipe


def run(name: str, **options: Any) -> Tensor:
    toy, call = TOYS[name], dict(TOYS[name].call)
    pipe = SteeredPipeline(built(name), FeynmanKac(2, events=(0.5,)), level_of, output="all", **options)
    negative = toy.each.get("negative_prompt")
    return pipe(PROMPTS, seed=0, negative_prompt=negative, **call).samples


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", SIX)
def test_a_run_that_ends_in_the_middle_leaves_nothing_behind(name: str, error: type[BaseException]) -> None:
    pipe = used(name)
    before, expected = picture_of(pipe), run(name)
    assert picture_of(pipe) == before
    with failing(pipe, error, 1), pytest.raises(error, match="struck"):
        run(name)
    assert picture_of(pipe) == before
    assert torch.equal(run(name), expected)


@pytest.mark.parametrize("name", SIX)
def test_a_gradient_that_ends_in_the_middle_leaves_nothing_behind(name: str) -> None:
    pipe = used(name)
    pipe_modules = modules_of(pipe)
    pipe_modules[0].train()  # a user's own choice, which must not be tidied away
    some = next(p for m in pipe_modules for p in m.parameters(recurse=False))
    some.requires_grad_(False)
    try:
        before, s = picture_of(pipe), session(name)
        x = s.noise()
        with failing(pipe, RuntimeError, 0), pytest.raises(RuntimeError, match="struck"):
            s.gradient(x, 0, lambda x0, rows: x0.flatten(1).sum(1))
        assert picture_of(pipe) == before
        s.gradient(x, 0, lambda x0, rows: x0.flatten(1).sum(1))
        assert picture_of(pipe) == before
    finally:
        pipe_modules[0].eval()
        some.requires_grad_(True)


def test_two_threads_on_one_pipeline_are_two_runs() -> None:
    name = "StableDiffusionPipeline"
    pipe, made = used(name), dict[Any, Any]()
    before = picture_of(pipe)

    def one(seed: int, keep: dict[Any, Any], key: Any) -> None:
        torch.set_num_threads(1)
        out = SteeredPipeline(pipe, FeynmanKac(2, events="all"), level_of, output="all")(
            PROMPTS, seed=seed, num_inference_steps=8
        )
        keep[key] = (out.samples, out.log_weights, out.ledger.counts)

    alone: dict[Any, Any] = {}
    for seed in range(3):
        one(seed, alone, seed)
    threads = [threading.Thread(target=one, args=(seed, made, seed)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert picture_of(pipe) == before
    for seed in range(3):
        assert all(torch.equal(a, b) for a, b in zip(made[seed][:2], alone[seed][:2], strict=True))
        assert made[seed][2] == alone[seed][2]


def test_a_hook_that_another_thread_is_removing_does_nothing() -> None:
    """torch reads a hook, then whether it wants keywords: in between, both may be gone."""
    watch, module = Watch(Ledger()), nn.Linear(1, 1)
    assert watch.enter(module, (torch.ones(1, 1),)) is None
    watch.leave(module, (torch.ones(1, 1),), torch.ones(1, 1))
    assert watch.ledger.forwards == 0


def test_a_run_inside_a_run_is_two_runs() -> None:
    name = "StableDiffusionPipeline"
    pipe, inside = used(name), []

    def inner() -> Any:
        return SteeredPipeline(pipe, BestOfN(2), level_of, output="all")("a star", seed=9, num_inference_steps=4)

    def nested(samples: Tensor, prompts: object) -> Tensor:
        inside.append(inner())
        return level_of(samples, prompts)

    def outer(reward: Any) -> Any:
        return SteeredPipeline(pipe, FeynmanKac(2, events=(0.5,)), reward, output="all")(PROMPTS, seed=0, num_inference_steps=4)

    before = picture_of(pipe)
    expected, expected_inside, out = outer(level_of), inner(), outer(nested)
    assert torch.equal(out.samples, expected.samples) and out.ledger.counts == expected.ledger.counts
    assert len(inside) == 2 and all(torch.equal(i.samples, expected_inside.samples) for i in inside)
    assert all(i.ledger.counts == expected_inside.ledger.counts for i in inside)
    assert picture_of(pipe) == before


def test_a_cache_by_row_is_refused_where_rows_are_permuted() -> None:
    pipe = built("FluxPipeline")
    call = {k: v for k, v in TOYS["FluxPipeline"].call.items() if k != "true_cfg_scale"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    try:
        with pytest.raises(UnsupportedError, match=r"FluxTransformer2DModel has a cache \(FirstBlockCache\).*disable_cache"):
            SteeredPipeline(pipe, FeynmanKac(2, events=(0.5,)), level_of)(PROMPTS, seed=0, **call)
        scheduler = steered(pipe.scheduler, FeynmanKac(2), reward=level_of, decoder=pipe, prompts=PROMPTS)
        own, pipe.scheduler = pipe.scheduler, scheduler
        try:
            with pytest.raises(UnsupportedError, match="FirstBlockCache"):
                pipe(PROMPTS, num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **call)
        finally:
            pipe.scheduler = own
        out = SteeredPipeline(pipe, BestOfN(2), level_of, output="all")(PROMPTS, seed=0, **call)
        assert bool(out.samples.isfinite().all())
    finally:
        pipe.transformer.disable_cache()
