"""A noise network is nothing before training, low in rank, counted, and a first stage of any search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffsteer import DiffsteerError, SteeredPipeline, load_pipeline
from diffsteer.noise_network import noise_network_of
from diffsteer.rewards import ClipScore, Compressibility, SecondClip
from diffsteer.samplers import BestOfN, RandomSearch, SuccessiveHalving, ZeroOrder
from diffsteer.shapes.grammar import TASKS
from diffsteer.shapes.scene import caption, sample_scene
from diffsteer.types import Context

PROMPTS = ["a red circle", "two blue stars"]


def changed(rank: int = 2, seed: int = 0):  # type: ignore[no-untyped-def]
    network = noise_network_of(load_pipeline("shapes"), rank=rank)
    torch.manual_seed(seed)
    for parameter in network.changes.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.requires_grad_(False)


def test_before_training_it_does_nothing() -> None:
    pipe = load_pipeline("shapes")
    network = noise_network_of(pipe)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    z = torch.randn(2, 4, 16, 16)
    assert not network.delta(z, PROMPTS).any()
    plain, moved = (
        SteeredPipeline(pipe, BestOfN(2, eta=0.0), Compressibility(), start=start)(PROMPTS, num_inference_steps=3, seed=0)
        for start in (None, network)
    )
    assert torch.equal(plain.samples, moved.samples)
    assert moved.ledger.evaluations == plain.ledger.evaluations + 4  # one a noise
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert not pipe.unet.conv_in._forward_hooks  # the pipeline's own network has none of its hooks


def test_it_is_low_in_rank_and_asks_for_the_text() -> None:
    network = changed()
    for change in network.changes.values():
        assert min(change.down.weight.shape[0], change.up.weight.shape[1]) == 2
    z = torch.randn(1, 4, 16, 16)
    one, other = (network.delta(z, [p]) for p in PROMPTS)
    assert one.abs().mean() > 1e-4 and not torch.allclose(one, other)
    together = network.delta(torch.cat([z, z]), PROMPTS)
    torch.testing.assert_close(together, torch.cat([one, other]), rtol=1e-4, atol=1e-5)


def test_what_is_saved_is_loaded_and_nothing_else_is(tmp_path: Path) -> None:
    network, pipe = changed(), load_pipeline("shapes")
    network.save(tmp_path / "change.safetensors")
    again = noise_network_of(pipe, tmp_path / "change.safetensors", rank=2)
    z = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(again.delta(z, PROMPTS[:1]), network.delta(z, PROMPTS[:1]), rtol=1e-2, atol=1e-3)
    assert not any(p.requires_grad for p in again.parameters())
    for path, rank in (("change.safetensors", 3), ("none.safetensors", 2)):
        with pytest.raises(DiffsteerError, match="noise network"):
            noise_network_of(pipe, tmp_path / path, rank=rank)
    with pytest.raises(DiffsteerError, match="object has not"):
        noise_network_of(object())


@pytest.mark.parametrize("search", [RandomSearch(3), ZeroOrder(2, 2), SuccessiveHalving(3)], ids=lambda s: s.name)
def test_it_is_the_first_stage_of_any_search_and_its_cost_is_declared(search) -> None:  # type: ignore[no-untyped-def]
    pipe, network = load_pipeline("shapes"), changed()
    steered = SteeredPipeline(pipe, search, Compressibility(), start=network, draft=False)
    out = steered(PROMPTS, num_inference_steps=4, seed=0)
    spent = out.trace.searches[0].spent
    assert sum(f.spent.evals for f in out.trace.searches) == out.ledger.evaluations
    bare = SteeredPipeline(pipe, search, Compressibility(), draft=False)(PROMPTS, num_inference_steps=4, seed=0)
    begun = spent.evals - bare.trace.searches[0].spent.evals
    assert begun == {"random_search": 3, "zero_order": 5, "successive_halving": 3}[search.name]
    assert steered.estimate(2, 4).evaluations == out.ledger.evaluations
    best = out.trace.searches[0].outcomes[0]
    assert best.noise is not None or best.trial.given is not None
    given = best.noise if best.noise is not None else best.trial.given
    assert best.root is not None and given is not None and not torch.equal(given, best.root)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_works_in_half_precision_and_in_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load_pipeline("shapes").to(dtype=dtype)
    network = noise_network_of(pipe, rank=2)
    asked: list[int] = []
    for parameter in network.changes.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    delta = network.delta

    def noted(noise: torch.Tensor, texts: list[str]) -> torch.Tensor:
        asked.append(len(noise))
        return delta(noise, texts)

    monkeypatch.setattr(network, "delta", noted)
    out = SteeredPipeline(pipe, RandomSearch(5), Compressibility(), start=network, draft=False, chunk=2)(
        PROMPTS, num_inference_steps=2, seed=0
    )
    assert out.samples.isfinite().all() and max(asked) == 2 and sum(asked) == 10


def test_the_embedded_network_gains_on_captions_that_it_has_not_seen() -> None:
    """At one step, by the reward that it was trained for and by one that it was not: each more than its scatter."""
    pipe = load_pipeline("shapes-turbo")
    network = noise_network_of(pipe, "shapes-turbo")
    scenes = [sample_scene(TASKS[i % 6], np.random.default_rng((55, i)), pairs="all") for i in range(96)]
    texts = [caption(scene) for scene in scenes]
    made = {
        name: SteeredPipeline(pipe, BestOfN(1, eta=0.0), ClipScore(), start=start)(texts, num_inference_steps=1, seed=0)
        for name, start in (("plain", None), ("moved", network))
    }
    own = made["moved"].rewards[:, 0] - made["plain"].rewards[:, 0]
    scores = {k: SecondClip().score(out.samples[:, 0], texts, Context(1, 1, True)).double() for k, out in made.items()}
    for gain in (own, scores["moved"] - scores["plain"]):
        assert float(gain.mean()) > 2 * float(gain.std()) / len(gain) ** 0.5 > 0
