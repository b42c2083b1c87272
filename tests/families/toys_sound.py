"""Toy pipelines of sound."""

from __future__ import annotations

from typing import Any

from families import parts

# ---- parts of AudioLDM2


def clap(tokenizer: Any) -> Any:
    """A `ClapModel` whose embeddings have 10 channels; the audio tower is there and never run."""
    from transformers import ClapConfig, ClapModel

    audio = {
        "patch_embeds_hidden_size": 8,
        "hidden_size": 8,
        "depths": [1],
        "num_attention_heads": [2],
        "num_hidden_layers": 1,
        "spec_size": 16,
        "window_size": 2,
        "num_mel_bins": 8,
        "num_classes": 2,
    }
    text = {**parts.TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": tokenizer.pad_token_id}
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=10))


def clap_features() -> Any:
    from transformers import ClapFeatureExtractor

    return ClapFeatureExtractor(feature_size=8, sampling_rate=100, fft_window_size=16, hop_length=8, frequency_max=50)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=8, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def hifi_gan(mels: int) -> Any:
    """A vocoder that makes 4 samples of each frame."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=mels,
            sampling_rate=100,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            initializer_range=0.2,
        )
    )


# ---- pipelines


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
        text_encoder=clap(tokenizer),
        text_encoder_2=parts.t5_encoder(tokenizer_2, width=12),
        projection_model=AudioLDM2ProjectionModel(text_encoder_dim=10, text_encoder_1_dim=12, langauge_model_dim=16),
        language_model=gpt2(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        feature_extractor=clap_features(),
        unet=unet,
        scheduler=parts.ddim(),
        vocoder=hifi_gan(mels=16),
    )
