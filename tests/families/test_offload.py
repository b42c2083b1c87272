"""Offloaded pipelines, the CPU in the accelerator's place, model and group offload for real: steered as before, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from families.test_families import PROMPTS, call_of, level_of
from families.toys import SIX, TOYS
from torch import nn

from diffsteer import SteeredPipeline, UnsupportedError
from diffsteer.backend import DiffusersSession
from diffsteer.pipes import denoisers_of
from diffsteer.samplers import FeynmanKac

CPU = torch.device("cpu")


def group(pipe: Any) -> None:
    for part in (*denoisers_of(pipe), pipe.vae):
        part.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def sequential(pipe: Any) -> None:
    """The hooks of enable_sequential_cpu_offload, on the same modules, without moving weights: on a CPU accelerate cannot."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            attach_align_device_hook(part, execution_device=CPU)
            add_hook_to_module(part, AlignDevicesHook(execution_device=CPU, io_same_device=True), append=True)


WAYS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": sequential,
    "group": group,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SIX)
def test_an_offloaded_pipeline_steers_and_gives_no_gradients(name: str, way: str) -> None:
    toy = TOYS[name]
    pipe = toy.build()
    sampler = FeynmanKac(2, events=(0.5,), trigger="always")

    def steer(**options: Any) -> Any:
        return SteeredPipeline(pipe, sampler, level_of, output="all", **options)(PROMPTS, seed=0, **call_of(toy))

    plain = steer()
    WAYS[way](pipe)
    moved = [0]
    for module in (m for d in denoisers_of(pipe) for m in d.modules()):
        hook = getattr(module, "_hf_hook", None)
        moved[0] += hook is not None or getattr(module, "_diffusers_hook", None) is not None
    assert moved[0], "somebody must be hooked"
    out = steer()
    assert torch.equal(out.samples, plain.samples) and out.ledger.counts == plain.ledger.counts
    torch.testing.assert_close(steer(chunk=1).samples, plain.samples, rtol=1e-3, atol=1e-3)
    call = call_of(toy)
    session = DiffusersSession(
        pipe,
        PROMPTS,
        particles=1,
        seed=0,
        num_inference_steps=call.pop("num_inference_steps"),
        negative_prompt=call.pop("negative_prompt", None),
        call=call,
    )
    with pytest.raises(UnsupportedError, match=f"{name} is offloaded"):
        session.gradient(session.noise(), 0, lambda x0, rows: x0.flatten(1).sum(1))
    own = {**toy.arguments(PROMPTS), "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    assert bool(pipe(**own)[0].isfinite().all()), "the user's own calls go on"
