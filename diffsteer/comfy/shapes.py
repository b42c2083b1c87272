"""The embedded models as ComfyUI's own objects: MODEL, CLIP and VAE of its classes with weights from diffusers' layout, so that
everything that patches a model there (LoRA, attention, hooks) finds what it expects."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsteer.pipeline import load_pipeline
from diffsteer.shapes.models import MODELS, SHARED

LATENT_SIZE, CHANNELS, FACTOR = 16, 4, 4
GROUPS = 8  # of its group norms; ComfyUI builds them with 32
# From a latent's channels to red, green, blue in [-1, 1]: least squares over rendered scenes.
TO_RGB = [[-1.277, -1.269, -1.167], [0.034, -0.114, -0.238], [-0.426, -0.503, -0.584], [-0.165, -0.15, -0.026]]
TO_RGB_BIAS = [0.045, 0.022, 0.019]


def load(name: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of an embedded model, in single precision."""
    import comfy.model_management as management

    with torch.inference_mode(False):
        return _model(name, management), _clip(name), _vae(name)


def empty_latent(count: int) -> dict[str, Any]:
    """An empty LATENT of their size."""
    return {"samples": torch.zeros(count, CHANNELS, LATENT_SIZE, LATENT_SIZE)}


def _model(name: str, management: Any) -> Any:
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base
    import comfy.utils

    class Format(comfy.latent_formats.LatentFormat):  # type: ignore[misc]
        latent_channels, latent_rgb_factors, latent_rgb_factors_bias = CHANNELS, TO_RGB, TO_RGB_BIAS

    class Shapes(comfy.supported_models_base.BASE):  # type: ignore[misc]
        unet_extra_config = {"num_heads": 4, "num_head_channels": -1}
        latent_format, memory_usage_factor = Format, 1.0

    config = Shapes(
        {
            "image_size": 32,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [0, 1],
            "transformer_depth_output": [0, 0, 1, 1],
            "transformer_depth_middle": 1,
            "context_dim": 96,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "legacy": False,
        }
    )
    told = json.loads((MODELS[name] / "scheduler" / "scheduler_config.json").read_text())
    kinds = comfy.model_base.ModelType
    if told["prediction_type"] == "flow_prediction":
        kind, config.sampling_settings = kinds.FLOW, {"shift": told["flow_shift"], "multiplier": 1000.0}
    else:
        kind = kinds.EPS
        config.sampling_settings = {  # "sqrt_linear" has betas that grow linearly
            "beta_schedule": "sqrt_linear",
            "linear_start": told["beta_start"],
            "linear_end": told["beta_end"],
        }
    device = management.unet_offload_device()
    model = comfy.model_base.BaseModel(config, model_type=kind, device=device)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    weights = _read(name, "unet")
    network = _with_our_norms(model.diffusion_model)
    network.load_state_dict({names[key]: value for key, value in weights.items()})
    model.diffsteer_embedded = True
    return comfy.model_patcher.ModelPatcher(model, load_device=management.get_torch_device(), offload_device=device)


def _clip(name: str) -> Any:
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models_base

    told = json.loads((MODELS[name] / "text_encoder" / "config.json").read_text())
    shape = {key: told[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")}
    shape |= {"hidden_act": told["hidden_act"], "max_position_embeddings": told["max_position_embeddings"]}
    shape |= {"vocab_size": told["vocab_size"], "eos_token_id": told["eos_token_id"], "layer_norm_eps": 1e-5}
    special = {"start": told["bos_token_id"], "end": told["eos_token_id"], "pad": told["pad_token_id"]}
    length, folder = told["max_position_embeddings"], SHARED.get(name, {}).get("tokenizer", MODELS[name] / "tokenizer")

    class Words(comfy.sd1_clip.SDTokenizer):  # type: ignore[misc]
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(
                tokenizer_path=str(folder),
                max_length=length,
                pad_with_end=False,
                embedding_directory=embedding_directory,
                embedding_size=shape["hidden_size"],
                tokenizer_data=tokenizer_data or {},
            )

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):  # type: ignore[misc]
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=Words)

    class Encoder(comfy.sd1_clip.SDClipModel):  # type: ignore[misc]
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device,
                dtype=dtype,
                max_length=length,
                textmodel_json_config=shape,
                special_tokens=special,
                return_projected_pooled=False,
                model_options=model_options or {},
            )

    class Model(comfy.sd1_clip.SD1ClipModel):  # type: ignore[misc]
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=Encoder)

    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(Tokenizer, Model))
    told_keys = _read(name, "text_encoder")
    weights = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in told_keys.items()}
    words = "text_model.embeddings.token_embedding.weight"
    rows = getattr(clip.cond_stage_model, clip.cond_stage_model.clip).transformer.get_input_embeddings().weight
    weights[words] = torch.nn.functional.pad(
        weights[words], (0, 0, 0, len(rows) - len(weights[words]))
    )  # always CLIP's own size
    weights["text_projection.weight"] = torch.eye(shape["hidden_size"])
    clip.load_sd(weights)
    return clip


class _Autoencoder(torch.nn.Module):
    """diffusers' autoencoder as ComfyUI calls one: its own cannot have so few channels."""

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside = inside

    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 4, H / 4, W / 4)."""
        mean: Tensor = self.inside.encode(pixels).latent_dist.mean
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        """The other way round."""
        pixels: Tensor = self.inside.decode(latents).sample
        return pixels


def _vae(name: str) -> Any:
    import comfy.model_patcher
    import comfy.sd

    smallest = {"z_channels": CHANNELS, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1]}
    smallest |= {"double_z": True, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    with _quiet():
        vae = comfy.sd.VAE(sd={}, config={"params": {"ddconfig": smallest, "embed_dim": CHANNELS}}, dtype=torch.float32)
    vae.first_stage_model = _Autoencoder(load_pipeline(name).vae).eval()
    old, vae.downscale_ratio, vae.upscale_ratio = vae.patcher, FACTOR, FACTOR
    vae.patcher = comfy.model_patcher.ModelPatcher(vae.first_stage_model, old.load_device, old.offload_device)
    return vae


def _read(name: str, part: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    folder: Path = SHARED.get(name, {}).get(part, MODELS[name] / part)
    return {key: value.float() for key, value in load_file(next(folder.glob("*.safetensors"))).items()}


def _with_our_norms(network: torch.nn.Module) -> torch.nn.Module:
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = GROUPS
    return network


@contextmanager
def _quiet() -> Iterator[None]:
    """ComfyUI would list the weights that its autoencoder did not get."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
