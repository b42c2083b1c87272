"""Pieces that several toy pipelines share: tokenizers made in memory, text encoders and autoencoders with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from diffsteer.shapes.grammar import WORDS

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
ALPHABET = (*LETTERS, *(c.upper() for c in LETTERS), *"0123456789.,:;<>|/_-{}()'")


def seeded(build: Callable[[], Any]) -> Callable[[], Any]:
    """The same weights at every call: seed, build, evaluation mode, no progress bar."""

    def build_seeded() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = build()
        pipe.set_progress_bar_config(disable=True)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval()
        return pipe

    return build_seeded


def amplified(model: Any, factor: float) -> Any:
    """`model` with its matrices times `factor`, where default weights are so small that the text hardly counts."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(factor)
    return model


# ---- tokenizers


def bpe(space: str, first: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary, and merges that grow each word of the shapes world letter by letter, with and without `space` before it."""
    words = [space + word for word in WORDS] + list(WORDS)
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    tokens = dict.fromkeys([*first, space, *ALPHABET, *(a + b for a, b in merges)])
    return {token: i for i, token in enumerate(tokens)}, merges


def clip_tokenizer() -> Any:
    from diffsteer.shapes.tokenizer import make_tokenizer

    return make_tokenizer()


def t5_tokenizer(length: int = 13) -> Any:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [("▁" + word, -1.0) for word in WORDS] + [(piece, -9.0) for piece in ("▁", *ALPHABET)]
    return T5Tokenizer(vocab=[*special, *pieces], extra_ids=0, model_max_length=length)


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, *("##" + c for c in LETTERS)]
    return BertTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))}, model_max_length=77)


def roberta_tokenizer(length: int = 11) -> Any:
    from transformers import RobertaTokenizer

    vocab, merges = bpe("Ġ", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def gemma_tokenizer() -> Any:
    from transformers import GemmaTokenizer

    vocab, merges = bpe("▁", ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def llama_tokenizer() -> Any:
    from transformers import LlamaTokenizer

    vocab, merges = bpe("▁", ["<unk>", "<s>", "</s>", "<pad>"])
    return LlamaTokenizer(vocab=vocab, merges=merges, pad_token="<pad>", padding_side="right", add_bos_token=True)


QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    vocab, merges = bpe("Ġ", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ċ"])
    marks = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab=vocab, merges=merges, additional_special_tokens=marks, chat_template=QWEN_CHAT)


# ---- text encoders

TEXT = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256}


def clip_encoder(tokenizer: Any, projected: bool = False, width: int = 16, positions: int = 16) -> Any:
    """A `CLIPTextModel`, or the one with a projection; it pools at the end token."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **{**TEXT, "hidden_size": width},
        vocab_size=len(tokenizer),
        projection_dim=width,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_encoder(tokenizer: Any, width: int = 16, multilingual: bool = False) -> Any:
    """A `T5EncoderModel`, or a `UMT5EncoderModel`."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config, model = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    return model(config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=20, num_layers=1, num_heads=2))


def bert(tokenizer: Any) -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**TEXT, vocab_size=len(tokenizer), max_position_embeddings=77))


def gemma2(tokenizer: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**DECODER, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id))


def gemma3(tokenizer: Any) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={**DECODER, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config={**TEXT, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration(config)


def llama(tokenizer: Any) -> Any:
    """It has one layer more, since its pipeline reads the output of the last but two."""
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**{**DECODER, "num_hidden_layers": 3}, vocab_size=len(tokenizer)))


def qwen3(tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**DECODER, vocab_size=len(tokenizer)))


def qwen2_5_vl(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ends = {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **ends, "num_key_value_heads": 1, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16},
    )
    return Qwen2_5_VLForConditionalGeneration(config)


PIXTRAL_MARKS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
PIXTRAL_CHAT = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endif %}{% endfor %}"


def pixtral_processor() -> Any:
    """A `PixtralProcessor` whose chat template leaves the long system message out."""
    from transformers import PixtralImageProcessor, PixtralProcessor, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=llama_tokenizer().backend_tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(PIXTRAL_MARKS),
    )
    return PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=PIXTRAL_CHAT)


def mistral3(tokenizer: Any) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config={**DECODER, "model_type": "mistral", "vocab_size": len(tokenizer)},
        vision_config={
            **TEXT,
            "model_type": "pixtral",
            "num_hidden_layers": 1,
            "head_dim": 8,
            "image_size": 16,
            "patch_size": 8,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(PIXTRAL_MARKS[0]),
    )
    return Mistral3ForConditionalGeneration(config)


# ---- autoencoders


def autoencoder_kl(latents: int = 4, levels: int = 2, shift: float | None = None, images: int = 3) -> Any:
    """An `AutoencoderKL` that divides height and width by 2 ** (levels - 1)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=images,
        out_channels=images,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(4,) * levels,
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=2,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=shift,
        mid_block_add_attention=False,
    )


def statistics(channels: int) -> dict[str, list[float]]:
    """Latent means and deviations that are neither 0 nor 1."""
    return {"latents_mean": [0.1 * i - 0.2 for i in range(channels)], "latents_std": [0.8 + 0.1 * i for i in range(channels)]}


def set_statistics(vae: Any, channels: int) -> None:
    """The same for an autoencoder that keeps them as buffers."""
    for name, values in statistics(channels).items():
        getattr(vae, name).copy_(torch.tensor(values))


# ---- U-Nets and schedulers of the Stable Diffusion kind


def unet_sizes() -> dict[str, Any]:
    """What a `UNet2DConditionModel` and its `ControlNetModel` have in common."""
    return {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }


def unet(inputs: int = 4, cross: int = 16, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    up = ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes = {**unet_sizes(), "cross_attention_dim": cross}
    return UNet2DConditionModel(sample_size=8, in_channels=inputs, out_channels=4, up_block_types=up, **sizes, **more)


def ddim() -> Any:
    """DDIM as Stable Diffusion ships it."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def euler() -> Any:
    """Euler as SDXL ships it."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


UNCHECKED: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
