"""The toys themselves: unmodified, each runs on two prompts, or draws two samples where its class takes no prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.toys import TOYS
from torch import nn

PROMPTS = ["a red circle", "a large blue square"]


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", TOYS)
def test_runs_on_two_prompts(name: str) -> None:
    toy = TOYS[name]
    pipe = toy.build()
    output = pipe(**toy.arguments(PROMPTS), output_type="pt", generator=torch.Generator().manual_seed(0))
    assert type(pipe).__name__ == name.split()[0]
    assert toy.output in output
    for samples in (value for value in output.values() if value is not None):
        assert samples.dtype == torch.float32
        assert len(samples) == len(PROMPTS)
        assert torch.isfinite(samples).all()
        assert (samples.flatten(1).std(dim=1) > 1e-3).all(), "a constant sample could hide any error"
        assert (samples[0] - samples[1]).abs().max() > 1e-3, "two noises must give two samples"


@pytest.mark.parametrize("name", TOYS)
def test_is_small_and_the_same_each_time(name: str) -> None:
    state = torch.random.get_rng_state()
    one, two = weights(TOYS[name].build()), weights(TOYS[name].build())
    assert torch.equal(torch.random.get_rng_state(), state), "building draws from no shared stream"
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert sum(value.numel() for value in one.values()) < 400_000
