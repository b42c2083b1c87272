"""Toy pipelines of video."""

from __future__ import annotations

from typing import Any

from families import parts


def wan(second: bool = False) -> Any:
    """With a `second` denoiser for the low noise levels, as Wan 2.2 has it."""
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
    denoisers = [
        WanTransformer3DModel(
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
        for _ in range(1 + second)
    ]
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.t5_encoder(tokenizer, multilingual=True),
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=denoisers[0],
        transformer_2=denoisers[1] if second else None,
        boundary_ratio=0.8 if second else None,
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
        scheduler=parts.flow(use_dynamic_shifting=True, shift_terminal=0.1),
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
        scheduler=parts.flow(use_dynamic_shifting=True, shift_terminal=0.1),
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
        scheduler=parts.flow(shift=7.0),
        text_encoder_2=parts.clip_encoder(tokenizer_2, width=12, positions=77),
        tokenizer_2=tokenizer_2,
    )
