"""Toy pipelines of images whose denoiser is a transformer."""

from __future__ import annotations

from typing import Any

from families import parts


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
        scheduler=parts.flow(shift=3.0),
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
        scheduler=parts.flow(shift=3.0, use_dynamic_shifting=True),
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
        scheduler=parts.flow(shift=3.0, use_dynamic_shifting=True),
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
        scheduler=parts.flow(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.02),
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
        scheduler=parts.flow(shift=3.0),
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
        **parts.UNCHECKED,
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
        scheduler=parts.flow(shift=6.0),
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
        scheduler=parts.flow(shift=1.73),
    )
