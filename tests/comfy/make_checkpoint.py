"""Run by ComfyUI's Python, in its folder: a small Stable Diffusion with random weights in the layout that it loads, and a LoRA
and a ControlNet for it. Argument: the folder to write them in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "model_channels": 320,  # by which the layout is known; one level of it is small
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "num_heads": 8,
    "num_head_channels": -1,
}
VAE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4]}


def main(folder: Path) -> None:
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["make_checkpoint", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cldm.cldm
    import comfy.ldm.models.autoencoder
    import comfy.ldm.modules.diffusionmodules.openaimodel as openai
    import comfy.ops
    import comfy.sd1_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    ops = comfy.ops.disable_weight_init
    unet = openai.UNetModel(**UNET, out_channels=4, transformer_depth_output=[1, 1], dtype=torch.float32, operations=ops)
    autoencoder = comfy.ldm.models.autoencoder.AutoencoderKL(
        ddconfig=VAE | {"num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}, embed_dim=4
    )
    clip = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32)
    checkpoint = {
        **named("model.diffusion_model.", unet),
        **named("first_stage_model.", autoencoder),
        **named("cond_stage_model.transformer.", clip.transformer),
    }
    for kind in ("checkpoints", "loras", "controlnet"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    save_file(checkpoint, folder / "checkpoints" / "small.safetensors")

    part = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    lora = {f"{part}.lora_up.weight": torch.randn(320, 4), f"{part}.lora_down.weight": torch.randn(4, 768)}
    save_file(lora | {f"{part}.alpha": torch.tensor(4.0)}, folder / "loras" / "small.safetensors")

    control = comfy.cldm.cldm.ControlNet(**UNET, hint_channels=3, dtype=torch.float32, operations=ops)
    save_file(named("control_model.", control), folder / "controlnet" / "small.safetensors")


def named(prefix: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its weights in half precision: small and random, norms as they begin."""
    weights = {}
    for key, value in module.state_dict().items():
        if value.ndim > 1:
            value = torch.randn(value.shape) * value[0].numel() ** -0.5
        elif value.is_floating_point():
            value = torch.full(value.shape, float(key.endswith(".weight")))
        weights[prefix + key] = value.half().contiguous() if value.is_floating_point() else value
    return weights


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
