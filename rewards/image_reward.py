"""How people would rate a picture for its prompt: ImageReward (Xu et al., 2023, arXiv 2304.05977), loaded by our own code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffsteer.reward import Reward
from diffsteer.rewards.checkpoint import fetched, fill, frozen_in_silence, located, read_tensors, usual_device
from diffsteer.rewards.open_clip_model import RESIZE, check_resize, prepared
from diffsteer.types import Context, DiffsteerError, setting

WHERE = "ImageReward.pt of huggingface.co/zai-org/ImageReward"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pictures, as BLIP's
CENTRE, SCALE = 0.16717362830052426, 1.0333394966054072  # of the ratings on the authors' data
WORDS, HEAD = 35, 64  # tokens that are read; width of an attention head, in both towers
# From the names of BLIP's own code to those of transformers.
_RENAMED = (
    (r"^visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)
_BUFFERS = ("text.embeddings.position_ids",)


class Network(nn.Module):
    """BLIP's image tower, its text tower, which looks at the picture, and the head on the first token.

    Args:
        sizes: of the towers, see `sizes_of`.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        self.size = sizes["image"]
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=sizes["vision"],
                intermediate_size=sizes["vision_inner"],
                num_hidden_layers=sizes["vision_layers"],
                num_attention_heads=max(1, sizes["vision"] // HEAD),
                image_size=sizes["image"],
                patch_size=sizes["patch"],
                layer_norm_eps=1e-6,
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=sizes["vocabulary"],
                hidden_size=sizes["text"],
                encoder_hidden_size=sizes["vision"],
                intermediate_size=sizes["text_inner"],
                num_hidden_layers=sizes["text_layers"],
                num_attention_heads=max(1, sizes["text"] // HEAD),
                max_position_embeddings=sizes["positions"],
                layer_norm_eps=1e-12,
                is_decoder=True,  # has cross-attention; it is called as an encoder
            ),
            add_pooling_layer=False,
        )
        widths = [sizes["text"], 1024, 128, 64, 16, 1]
        linear = [nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        drop = nn.Identity
        self.head = nn.Sequential(linear[0], drop(), linear[1], drop(), linear[2], drop(), linear[3], linear[4])

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Pictures (N, 3, S, S), tokens and their mask (N, L) -> ratings (N,)."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=everywhere, is_decoder=False
        )
        rating: Tensor = self.head(read.last_hidden_state[:, 0])[:, 0]
        return (rating - CENTRE) / SCALE


def renamed(key: str) -> str:
    """What a tensor of the checkpoint is called in `Network`."""
    key = key.removeprefix("blip.")
    for pattern, name in _RENAMED:
        key, done = re.subn(pattern, name, key)
        if done:
            break
    return key


def sizes_of(state: dict[str, Tensor]) -> dict[str, int]:
    """The sizes of the towers, told by the tensors of a checkpoint under their new names.

    Raises:
        DiffsteerError: it lacks what tells them.
    """

    def layers(of: str) -> int:
        return len({key[len(of) :].split(".")[0] for key in state if key.startswith(of)})

    try:
        patch = state["vision.embeddings.patch_embedding.weight"].shape
        tokens = state["vision.embeddings.position_embedding"].shape[1] - 1
        words = state["text.embeddings.word_embeddings.weight"].shape
        return {
            "image": round(tokens**0.5) * patch[-1],
            "patch": patch[-1],
            "vision": patch[0],
            "vision_inner": state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "vision_layers": layers("vision.encoder.layers."),
            "vocabulary": words[0],
            "text": words[1],
            "text_inner": state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "text_layers": layers("text.encoder.layer."),
            "positions": state["text.embeddings.position_embeddings.weight"].shape[0],
        }
    except KeyError as error:
        raise DiffsteerError(f"image_reward: the checkpoint lacks {error.args[0]}: is it {WHERE}?") from error


@dataclass(eq=False)
class ImageReward(Reward):
    """A rating in standard deviations of the authors' data, about -2 to 2, of a BLIP (ViT-L/16) that reads the prompt while it
    looks at the picture.

    The authors crop pictures to a square (`resize="crop"`).

    Cost: one pass of both towers a sample; nothing can be kept of a prompt but its tokens.

    Args:
        checkpoint: a file, or OWNER/REPOSITORY/FILE of huggingface.co.
        tokenizer: a folder or an id of huggingface.co: BERT's, without capitals.
        resize: squash | crop | pad.
        device: where it runs; None for the accelerator if there is one.

    Raises:
        DiffsteerError: an unknown `resize`; later, a checkpoint or a tokenizer that cannot be opened.
    """

    checkpoint: str = "zai-org/ImageReward/ImageReward.pt"
    tokenizer: str = "google-bert/bert-base-uncased"
    resize: str = setting("squash", choices=RESIZE)
    device: str | None = None

    name: ClassVar[str] = "image_reward"
    range: ClassVar[tuple[float, float]] = (-10.0, 10.0)
    differentiable: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = True
    licence: ClassVar[str | None] = "Apache-2.0"
    weights: ClassVar[str | None] = WHERE
    weights_bytes: ClassVar[int] = 1_790_000_000

    def __post_init__(self) -> None:
        check_resize(self.name, self.resize)
        self._loaded: tuple[Network, Any] | None = None

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        """Load the checkpoint and the tokenizer."""
        self._load()

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,)."""
        network, tokenizer = self._load()
        device = next(network.parameters()).device
        # always as long, or a score would depend on what else is scored
        told = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt").to(device)
        x = prepared(samples.to(device), (network.size, network.size), self.resize, MEAN, STD)
        rating: Tensor = network(x, told.input_ids, told.attention_mask)
        return rating.to(samples.device)

    def _load(self) -> tuple[Network, Any]:
        if self._loaded is None:
            path = located(self.name, self.checkpoint)
            state = {renamed(key): value.float() for key, value in read_tensors(self.name, path, WHERE).items()}
            from transformers import BertTokenizerFast

            tokenizer: Any = fetched(self.name, self.tokenizer, lambda: BertTokenizerFast.from_pretrained(self.tokenizer))
            sizes = sizes_of(state)
            if (
                not 5 < len(tokenizer) <= sizes["vocabulary"]
            ):  # transformers makes one of special tokens alone of an empty folder
                has = f"{len(tokenizer)} words, and {path.name} {sizes['vocabulary']}"
                raise DiffsteerError(
                    f"image_reward: the tokenizer {self.tokenizer} has {has}: it is not that of the checkpoint"
                )
            with frozen_in_silence():
                network = Network(sizes)
            fill(self.name, path.name, network, state, _BUFFERS)
            self._loaded = network.eval().requires_grad_(False).to(usual_device(self.device)), tokenizer
        return self._loaded
