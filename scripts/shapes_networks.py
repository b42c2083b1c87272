"""The networks of the embedded shapes models, untrained; `train_shapes.py` trains them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffsteer.shapes.tokenizer import CONTEXT, make_tokenizer

# The noise that the painter is trained on at last, and the scheduler that ships with it.
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
}


def make_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def text_config(vocab: int, width: int, layers: int, heads: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
    )


class Painter(nn.Module):
    """Text encoder and UNet, trained as one: predicts the noise from noisy latents, timesteps and token ids."""

    def __init__(self, vocab: int) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        super().__init__()
        self.text_encoder = CLIPTextModel(text_config(vocab, width=96, layers=2, heads=4))
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=96,
            attention_head_dim=4,
            norm_num_groups=8,
        )

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        words = self.text_encoder(ids).last_hidden_state
        return self.unet(x, t, encoder_hidden_states=words).sample


# Two of them, of other sizes, seeds and data: one steers, the other may judge or make the final choice.
CLIPS: dict[str, dict[str, Any]] = {
    "clip": {"vision": {"layers": 4, "width": 128}, "text": {"width": 96, "heads": 4, "layers": 3}, "stream": 3},
    "clip2": {"vision": {"layers": 3, "width": 96}, "text": {"width": 64, "heads": 2, "layers": 2}, "stream": 12},
}


def make_clip(folder: Path, name: str) -> nn.Module:
    """An open_clip model of our own; `hf_tokenizer_name` only has to be non-empty, the files beside it are read."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    if not (folder / "tokenizer.json").exists():
        tokenizer.save_pretrained(folder)
    text = {"context_length": CONTEXT, "vocab_size": len(tokenizer), "hf_tokenizer_name": "shapes"}
    config = {
        "embed_dim": 96,
        "vision_cfg": {"image_size": 64, "head_width": 32, "patch_size": 8, **CLIPS[name]["vision"]},
        "text_cfg": {**text, "tokenizer_kwargs": {"clean": "lower"}, **CLIPS[name]["text"]},
    }
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2))
    return open_clip.create_model(f"local-dir:{folder}", load_weights=False)
