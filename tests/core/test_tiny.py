"""Tiny decoders: on the way only, counted apart, read from what is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, Flux2Pipeline
from safetensors.torch import save_file
from torch import Tensor

from diffsteer import DiffsteerError, SteeredPipeline, UnsupportedError
from diffsteer.families import FAMILIES
from diffsteer.pipes import tiny_decoder_of
from diffsteer.samplers import FeynmanKac
from diffsteer.tiny import flux2_decoder, load_flux2, tiny_layout

PROMPTS = ["a red circle", "two stars"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny")
    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**small, **blocks, latent_channels=4).save_pretrained(folder)
    return folder


def test_scores_on_the_way_come_from_the_tiny_one_and_the_last_from_the_full(toy_pipeline: Any, tiny: Path) -> None:
    shown: list[Tensor] = []

    def reward(x: Tensor, prompts: object) -> Tensor:
        shown.append(x)
        return 100 * x.mean((1, 2, 3))

    pipe = SteeredPipeline(toy_pipeline, FeynmanKac(3, events=(0.5,), scale=0.0), reward, decoder=f"tiny:{tiny}")
    out = pipe(PROMPTS, num_inference_steps=6, seed=0)
    assert out.ledger.tiny_decodes == 6 and out.ledger.decodes == 6 and "tiny decode" in out.ledger.seconds
    assert out.ledger.counts == pipe.estimate(2, 6).counts
    full = SteeredPipeline(toy_pipeline, FeynmanKac(3, events=(0.5,), scale=0.0), reward)
    whole = full(PROMPTS, num_inference_steps=6, seed=0)
    torch.testing.assert_close(out.samples, whole.samples)
    assert not torch.allclose(shown[0], shown[2], atol=1e-3) and torch.equal(shown[1], shown[3])
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    own = AutoencoderTiny.from_pretrained(tiny).decode(z).sample
    torch.testing.assert_close(tiny_decoder_of(toy_pipeline, str(tiny))(z), (own / 2 + 0.5).clamp(0, 1))


def test_what_is_missing_is_said(toy_pipeline: Any) -> None:
    with pytest.raises(DiffsteerError, match="no tiny decoder in '/nowhere'"):
        tiny_decoder_of(toy_pipeline, "/nowhere")
    with pytest.raises(DiffsteerError, match="no tiny decoder in '/nowhere'"):
        load_flux2("/nowhere")
    with pytest.raises(UnsupportedError, match="has no tiny decoder"):
        tiny_layout(toy_pipeline, FAMILIES["WanPipeline"])


def test_flux2_weights_as_they_are_published(tmp_path: Path) -> None:
    """One file of numbered layers, or one of encoder and decoder with names; others are refused."""
    torch.manual_seed(0)
    own = flux2_decoder().eval()
    state = own.state_dict()
    assert state["3.pool.1.weight"].shape == (256,) and "8.pool.0.weight" not in state and len(state) == 79
    torch.save(state, tmp_path / "taef2_decoder.pth")
    named = {f"decoder.layers.{int(k.split('.')[0]) - 1}.{k.split('.', 1)[1]}": v for k, v in state.items()}
    save_file(named | {"encoder.layers.0.weight": torch.zeros(1)}, tmp_path / "taef2.safetensors")
    z = torch.randn(1, 32, 3, 5, generator=torch.Generator().manual_seed(0))
    for path in (tmp_path / "taef2_decoder.pth", tmp_path / "taef2.safetensors", tmp_path):
        assert torch.equal(load_flux2(path)(z), own(z)) and own(z).shape == (1, 3, 24, 40)
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(DiffsteerError, match="holds no tiny decoder"):
        load_flux2(tmp_path / "other.pth")


def test_flux2_latents_are_only_unpacked(tmp_path: Path) -> None:
    """No batch norm is undone: the tiny decoder takes what the model denoises."""
    torch.manual_seed(0)
    own = flux2_decoder().eval()
    torch.save(own.state_dict(), tmp_path / "taef2_decoder.pth")

    class Pipe:
        vae_scale_factor, _execution_device = 8, torch.device("cpu")
        _unpatchify_latents = staticmethod(Flux2Pipeline._unpatchify_latents)

    from diffsteer.decoding import Size

    z = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(0))
    layout = tiny_layout(Pipe(), FAMILIES["Flux2Pipeline"], str(tmp_path))
    square = Flux2Pipeline._unpatchify_latents(z.permute(0, 2, 1).reshape(2, 128, 2, 3))
    torch.testing.assert_close(layout(Pipe(), Size(32, 48), z), own(square).clamp(0, 1))
