"""One toy pipeline for each class of diffusers: real classes and call paths, random weights, nothing downloaded.

Heights and widths differ, and so do lengths of texts, latents and channels where a class allows it: no axis passes for
another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from families import parts
from torch import Tensor

NEGATIVE = "a square"


@dataclass(frozen=True)
class Toy:
    """How to build one pipeline, and what a short call of it wants."""

    build: Callable[[], Any]
    call: dict[str, Any]
    each: dict[str, Any] = field(default_factory=dict)  # wanted once a prompt: given as a list
    rows: str = "prompt"  # the argument that says how many samples: prompts, class labels, or a number
    output: str = "images"  # where the pipeline's output keeps the samples

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The whole call for these prompts; a class without prompts draws as many samples."""
        given: dict[str, Any] = {"prompt": list(prompts), "class_labels": [1] * len(prompts), "batch_size": len(prompts)}
        lists = {name: [value] * len(prompts) for name, value in self.each.items()}
        return {self.rows: given[self.rows], **self.call, **lists}


def picture(height: int, width: int) -> Tensor:
    """Three ramps, (3, height, width) in [0, 1]."""
    down, right = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([down, right, down * right])


def flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def euler() -> Any:
    """Euler as SDXL ships it."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


# ---- Stable Diffusion and its relatives


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


UNCHECKED: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}


def stable_diffusion() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(**sd_parts(), **UNCHECKED)


def stable_diffusion_img2img() -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline

    return StableDiffusionImg2ImgPipeline(**sd_parts(), **UNCHECKED)


def stable_diffusion_inpaint() -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    return StableDiffusionInpaintPipeline(**sd_parts(), **UNCHECKED)


def stable_diffusion_controlnet() -> Any:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    control = ControlNetModel(**parts.unet_sizes(), conditioning_embedding_out_channels=(4, 8))
    for convolution in [*control.controlnet_down_blocks, control.controlnet_mid_block]:
        torch.nn.init.normal_(convolution.weight, std=0.3)  # they start at zero, which would make the control image inert
    return StableDiffusionControlNetPipeline(**sd_parts(), **UNCHECKED, controlnet=control)


def latent_consistency() -> Any:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    members = sd_parts(time_cond_proj_dim=8)
    members["scheduler"] = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return LatentConsistencyModelPipeline(**members, **UNCHECKED)


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
        "scheduler": euler(),
        "add_watermarker": False,
    }


def stable_diffusion_xl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(**sdxl_parts())


def stable_diffusion_xl_img2img() -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    return StableDiffusionXLImg2ImgPipeline(**sdxl_parts())


# ---- images, transformers


def stable_diffusion_3(t5: bool = True) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer = parts.clip_tokenizer()
    tokenizer_3 = parts.t5_tokenizer() if t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=6,
        out_channels=6,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 12,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow(shift=3.0),
        vae=parts.autoencoder_kl(latents=6, shift=0.1),
        text_encoder=parts.clip_encoder(tokenizer, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=parts.clip_encoder(tokenizer, projected=True, width=12),
        tokenizer_2=tokenizer,
        text_encoder_3=parts.t5_encoder(tokenizer_3, width=32) if t5 else None,
        tokenizer_3=tokenizer_3,
    )


def flux() -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    tokenizer, tokenizer_2 = parts.clip_tokenizer(), parts.t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=4 * 5,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )
    return FluxPipeline(
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        vae=parts.autoencoder_kl(latents=5, shift=0.1),
        text_encoder=parts.clip_encoder(tokenizer, width=12),
        tokenizer=tokenizer,
        text_encoder_2=parts.t5_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def flux2() -> Any:
    from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=5,
        norm_num_groups=2,
        sample_size=16,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.uniform_(-0.2, 0.2)
    vae.bn.running_var.uniform_(0.5, 1.5)
    transformer = Flux2Transformer2DModel(
        in_channels=4 * 5,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    )
    processor = parts.pixtral_processor()
    return Flux2Pipeline(
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=parts.mistral3(processor.tokenizer),
        tokenizer=processor,
        transformer=transformer,
    )


def pixart_sigma() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    tokenizer = parts.t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer, width=12),
        vae=parts.autoencoder_kl(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


def sana() -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    tokenizer = parts.gemma_tokenizer()
    levels = 4
    vae = AutoencoderDC(
        latent_channels=6,
        attention_head_dim=4,
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        encoder_layers_per_block=(1,) * levels,
        decoder_layers_per_block=(1,) * levels,
        encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels,
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        scaling_factor=0.5,
    )
    transformer = SanaTransformer2DModel(
        in_channels=6,
        out_channels=6,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=parts.gemma2(tokenizer), vae=vae, transformer=transformer, scheduler=scheduler
    )


def qwen_image() -> Any:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    tokenizer = parts.qwen_tokenizer()
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=5, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], **parts.statistics(5)
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * 5,
        out_channels=5,
        num_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4),
    )
    return QwenImagePipeline(
        scheduler=flow(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.02),
        vae=vae,
        text_encoder=parts.qwen2_5_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def z_image() -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    tokenizer = parts.qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=6,
        dim=24,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 4],
        axes_lens=[64, 32, 32],
    )
    return ZImagePipeline(
        scheduler=flow(shift=3.0),
        vae=parts.autoencoder_kl(latents=6, shift=0.1),
        text_encoder=parts.qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def hunyuan_dit() -> Any:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

    tokenizer, tokenizer_2 = parts.bert_tokenizer(), parts.t5_tokenizer(256)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=16,
        cross_attention_dim_t5=24,
        pooled_projection_dim=8,
        text_len=77,
        text_len_t5=256,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1
    )
    return HunyuanDiTPipeline(
        vae=parts.autoencoder_kl(levels=4),
        text_encoder=parts.bert(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=scheduler,
        feature_extractor=None,
        text_encoder_2=parts.t5_encoder(tokenizer_2, width=24),
        tokenizer_2=tokenizer_2,
        **UNCHECKED,
    )


def lumina2() -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer = parts.gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=6,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=4,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 32, 32),
        cap_feat_dim=16,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=flow(shift=6.0),
        vae=parts.autoencoder_kl(latents=6, levels=4, shift=0.1),
        text_encoder=parts.gemma2(tokenizer),
        tokenizer=tokenizer,
    )


def aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    tokenizer = parts.t5_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer, width=12, multilingual=True),
        vae=parts.autoencoder_kl(),
        transformer=parts.amplified(transformer, 2.0),
        scheduler=flow(shift=1.73),
    )


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


# ---- video


def wan() -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    tokenizer = parts.t5_tokenizer()
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=6,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        **parts.statistics(6),
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=6,
        out_channels=6,
        text_dim=16,
        freq_dim=16,
        ffn_dim=20,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer, multilingual=True),
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    )


def cogvideox() -> Any:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    tokenizer = parts.t5_tokenizer()
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4),
        latent_channels=6,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=16,
        sample_width=40,
        scaling_factor=0.7,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=6,
        out_channels=6,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=1,
        sample_width=10,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=13,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing"
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer, width=12),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )


def ltx() -> Any:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    tokenizer = parts.t5_tokenizer()
    vae = AutoencoderKLLTXVideo(
        latent_channels=6,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1, 1),
    )
    parts.set_statistics(vae, 6)
    transformer = LTXVideoTransformer3DModel(
        in_channels=6,
        out_channels=6,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=12,
    )
    return LTXPipeline(
        scheduler=flow(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=vae,
        text_encoder=parts.t5_encoder(tokenizer, width=12),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def ltx2() -> Any:
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2Pipeline, LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    tokenizer = parts.gemma_tokenizer()
    vae = AutoencoderKLLTX2Video(
        latent_channels=6,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("spatiotemporal",) * 2,
        upsample_type=("spatiotemporal",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1, 1),
    )
    mels, audio_channels = 8, 5
    audio_width = audio_channels * mels // 4
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=audio_width,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        resolution=mels,
        latent_channels=audio_channels,
        mel_hop_length=120,
        mel_bins=mels,
    )
    parts.set_statistics(vae, 6)
    parts.set_statistics(audio_vae, audio_width)
    transformer = LTX2VideoTransformer3DModel(
        in_channels=6,
        out_channels=6,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        vae_scale_factors=(2, 8, 8),
        audio_in_channels=audio_width,
        audio_out_channels=audio_width,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        audio_hop_length=120,
        num_layers=1,
        caption_channels=16,
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=7,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=7,
    )
    vocoder = LTX2Vocoder(
        in_channels=2 * mels,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 5],
        upsample_factors=[2, 3],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
    )
    return LTX2Pipeline(
        scheduler=flow(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=parts.gemma3(tokenizer),
        tokenizer=tokenizer,
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )


def hunyuan_video() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    tokenizer, tokenizer_2 = parts.llama_tokenizer(), parts.clip_tokenizer()
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=6,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=6,
        out_channels=6,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 4, 4),
    )
    return HunyuanVideoPipeline(
        text_encoder=parts.llama(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=flow(shift=7.0),
        text_encoder_2=parts.clip_encoder(tokenizer_2, width=12, positions=77),
        tokenizer_2=tokenizer_2,
    )


def stable_audio() -> Any:
    from diffusers import AutoencoderOobleck, EDMDPMSolverMultistepScheduler, StableAudioDiTModel, StableAudioPipeline
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    tokenizer = parts.t5_tokenizer()
    vae = AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 3],
        channel_multiples=[1, 1],
        decoder_channels=4,
        decoder_input_channels=6,
        audio_channels=2,
        sampling_rate=60,
    )
    transformer = StableAudioDiTModel(
        sample_size=20,
        in_channels=6,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=6,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=2 * 12,
        cross_attention_input_dim=12,
    )
    return StableAudioPipeline(
        vae=vae,
        text_encoder=parts.t5_encoder(tokenizer, width=12),
        projection_model=StableAudioProjectionModel(text_encoder_dim=12, conditioning_dim=12, min_value=0, max_value=32),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, solver_order=2),
    )


def audioldm2() -> Any:
    from diffusers import AudioLDM2Pipeline, AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel

    tokenizer, tokenizer_2 = parts.roberta_tokenizer(), parts.t5_tokenizer()
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=6,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=([None, 16, 12], [None, 16, 12]),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return AudioLDM2Pipeline(
        vae=parts.autoencoder_kl(images=1),
        text_encoder=parts.clap(tokenizer),
        text_encoder_2=parts.t5_encoder(tokenizer_2, width=12),
        projection_model=AudioLDM2ProjectionModel(text_encoder_dim=10, text_encoder_1_dim=12, langauge_model_dim=16),
        language_model=parts.gpt2(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        feature_extractor=parts.clap_features(),
        unet=unet,
        scheduler=parts.ddim(),
        vocoder=parts.hifi_gan(mels=16),
    )


IMAGE: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 5, "guidance_scale": 3.0}
VIDEO: dict[str, Any] = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 5, "guidance_scale": 3.0}
SHORT = {"max_sequence_length": 13}
ONE_PASS = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
SIZED_BY_IMAGE: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0, "strength": 0.8}

TOYS: dict[str, Toy] = {
    "StableDiffusionPipeline": Toy(stable_diffusion, IMAGE),
    "StableDiffusionXLPipeline": Toy(stable_diffusion_xl, IMAGE),
    "StableDiffusion3Pipeline": Toy(stable_diffusion_3, {**IMAGE, **SHORT}),
    "StableDiffusion3Pipeline without T5": Toy(lambda: stable_diffusion_3(t5=False), {**IMAGE, "max_sequence_length": 1}),
    "FluxPipeline": Toy(flux, {**IMAGE, **SHORT, "true_cfg_scale": 2.0}, each={"negative_prompt": NEGATIVE}),
    "WanPipeline": Toy(wan, {**VIDEO, **SHORT}, output="frames"),
    "AnimateDiffPipeline": Toy(animatediff, {**IMAGE, "num_frames": 5}, output="frames"),
    "PixArtSigmaPipeline": Toy(pixart_sigma, {**IMAGE, **SHORT, "use_resolution_binning": False, "clean_caption": False}),
    "SanaPipeline": Toy(
        sana,
        {**IMAGE, **SHORT, "height": 32, "width": 64, "use_resolution_binning": False, "complex_human_instruction": None},
    ),
    "QwenImagePipeline": Toy(
        qwen_image,
        {"height": 16, "width": 24, "num_inference_steps": 5, "true_cfg_scale": 3.0},
        each={"negative_prompt": NEGATIVE},
    ),
    "ZImagePipeline": Toy(z_image, {**IMAGE, **SHORT}),
    "Flux2Pipeline": Toy(flux2, {**IMAGE, **SHORT, "text_encoder_out_layers": (1, 2)}),
    "HunyuanDiTPipeline": Toy(hunyuan_dit, {**IMAGE, "height": 48, "width": 64, "use_resolution_binning": False}),
    "Lumina2Pipeline": Toy(lumina2, {**IMAGE, "height": 32, "width": 64, "system_prompt": "", "max_sequence_length": 26}),
    "AuraFlowPipeline": Toy(aura_flow, {**IMAGE, **SHORT}),
    "CogVideoXPipeline": Toy(cogvideox, {**VIDEO, **SHORT, "width": 40, "num_frames": 9}, output="frames"),
    "LTXPipeline": Toy(ltx, {**VIDEO, **SHORT, "height": 32, "width": 64}, output="frames"),
    "LTX2Pipeline": Toy(
        ltx2,
        {**VIDEO, "height": 32, "width": 64, "max_sequence_length": 14, **ONE_PASS},
        output="frames",
    ),
    "HunyuanVideoPipeline": Toy(
        hunyuan_video,
        {
            **VIDEO,
            **SHORT,
            "true_cfg_scale": 2.0,
            "height": 32,
            "width": 80,
            "num_frames": 9,
            "prompt_template": {"template": "video of {}", "crop_start": 2},
        },
        each={"negative_prompt": NEGATIVE},
        output="frames",
    ),
    "StableAudioPipeline": Toy(
        stable_audio, {"num_inference_steps": 5, "guidance_scale": 3.0, "audio_end_in_s": 1.5}, output="audios"
    ),
    "AudioLDM2Pipeline": Toy(
        audioldm2,
        {"num_inference_steps": 5, "guidance_scale": 3.0, "audio_length_in_s": 0.4, "max_new_tokens": 5},
        output="audios",
    ),
    "AudioLDM2Pipeline of its own length": Toy(
        audioldm2, {"num_inference_steps": 5, "guidance_scale": 3.0, "max_new_tokens": 5}, output="audios"
    ),
    "StableDiffusionControlNetPipeline": Toy(
        stable_diffusion_controlnet,
        {"num_inference_steps": 5, "guidance_scale": 3.0},
        each={"image": picture(16, 24)},
    ),
    "StableDiffusionInpaintPipeline": Toy(
        stable_diffusion_inpaint, IMAGE, each={"image": picture(16, 24), "mask_image": (picture(16, 24)[:1] > 0.5).float()}
    ),
    "StableDiffusionXLImg2ImgPipeline": Toy(stable_diffusion_xl_img2img, SIZED_BY_IMAGE, each={"image": picture(16, 24)}),
    "StableDiffusionImg2ImgPipeline": Toy(stable_diffusion_img2img, SIZED_BY_IMAGE, each={"image": picture(16, 24)}),
    "LatentConsistencyModelPipeline": Toy(latent_consistency, IMAGE),
    "DDPMPipeline": Toy(ddpm, {"num_inference_steps": 5}, rows="batch_size"),
    "DiTPipeline": Toy(dit, {"num_inference_steps": 5, "guidance_scale": 3.0}, rows="class_labels"),
}
TOYS = {name: replace(toy, build=parts.seeded(toy.build)) for name, toy in TOYS.items()}

# The families that everything is tried on.
SIX = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "WanPipeline",
    "AnimateDiffPipeline",
)
