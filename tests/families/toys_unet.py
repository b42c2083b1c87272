"""Toy pipelines of the Stable Diffusion kind, and those without prompts."""

from __future__ import annotations

from typing import Any

import torch
from families import parts


def sd_parts(**options: Any) -> dict[str, Any]:
    """What every class of the first Stable Diffusion is made of; `options` go to the U-Net."""
    tokenizer = parts.clip_tokenizer()
    return {
        "vae": parts.autoencoder_kl(),
        "text_encoder": parts.clip_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": parts.unet(**options),
        "scheduler": parts.ddim(),
        "feature_extractor": None,
    }


def stable_diffusion() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(**sd_parts(), **parts.UNCHECKED)


def stable_diffusion_img2img() -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline

    return StableDiffusionImg2ImgPipeline(**sd_parts(), **parts.UNCHECKED)


def stable_diffusion_inpaint() -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    return StableDiffusionInpaintPipeline(**sd_parts(), **parts.UNCHECKED)


def stable_diffusion_controlnet() -> Any:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    control = ControlNetModel(**parts.unet_sizes(), conditioning_embedding_out_channels=(4, 8))
    for convolution in [*control.controlnet_down_blocks, control.controlnet_mid_block]:
        torch.nn.init.normal_(convolution.weight, std=0.3)  # they start at zero, which would make the control image inert
    return StableDiffusionControlNetPipeline(**sd_parts(), **parts.UNCHECKED, controlnet=control)


def latent_consistency() -> Any:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    members = sd_parts(time_cond_proj_dim=8)
    members["scheduler"] = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return LatentConsistencyModelPipeline(**members, **parts.UNCHECKED)


def animatediff() -> Any:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    motion = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )
    return AnimateDiffPipeline(**sd_parts(), motion_adapter=motion)


def sdxl_parts() -> dict[str, Any]:
    tokenizer = parts.clip_tokenizer()
    return {
        "vae": parts.autoencoder_kl(),
        "text_encoder": parts.clip_encoder(tokenizer),
        "text_encoder_2": parts.clip_encoder(tokenizer, projected=True, width=12),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": parts.unet(
            cross=16 + 12,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
        ),
        "scheduler": parts.euler(),
        "add_watermarker": False,
    }


def stable_diffusion_xl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(**sdxl_parts())


def stable_diffusion_xl_img2img() -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    return StableDiffusionXLImg2ImgPipeline(**sdxl_parts())


# ---- images without prompts


def ddpm() -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=(8, 12),
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


def dit() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8
    )
    return DiTPipeline(
        transformer=transformer,
        vae=parts.autoencoder_kl(),
        scheduler=DDIMScheduler(clip_sample=False),
        id2label={1: "a red circle, a circle", 2: "a blue square"},
    )
