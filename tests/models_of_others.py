"""Tiny models in the layouts of other people's checkpoints, with random weights, and a judge behind HTTP that answers."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageStat
from torch import Tensor

TEXT = "a the does this figure show please answer yes no or red blue star two rings left of ring cross yellow"
WORDS = list(dict.fromkeys(TEXT.split()))
WIDTH, INNER, SIDE, PATCH = 64, 96, 32, 16  # of ImageReward's towers


def make(folder: Path) -> None:
    """All of them, in folders and files of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        tokenizer(folder / "bert")
        torch.save(image_reward_state(len(vocabulary()) + 2), folder / "ImageReward.pt")
        pick(folder / "pick")
        vqa(folder / "vqa")
        from safetensors.torch import save_file

        save_file({"weight": torch.randn(3, 768), "bias": torch.randn(3)}, folder / "linear.safetensors")


def vocabulary() -> dict[str, int]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>", '"', "?", "."]
    return {word: i for i, word in enumerate([*special, *WORDS])}


def tokenizer(folder: Path) -> Any:
    """BERT's, with a few words."""
    from transformers import BertTokenizerFast

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary()))
    made = BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True)
    made.save_pretrained(folder)
    return made


def image_reward_state(words: int, layers: int = 2) -> dict[str, Tensor]:
    """The names and shapes of ImageReward.pt, as the code of BLIP and of ImageReward gives them."""
    state: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        state[f"{name}.weight"] = torch.randn(rows, columns) / columns**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(rows)

    def norm(name: str) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(WIDTH)
        state[f"{name}.bias"] = 0.1 * torch.randn(WIDTH)

    see, read = "blip.visual_encoder", "blip.text_encoder"
    state[f"{see}.cls_token"] = torch.randn(1, 1, WIDTH)
    state[f"{see}.pos_embed"] = torch.randn(1, 1 + (SIDE // PATCH) ** 2, WIDTH)
    state[f"{see}.patch_embed.proj.weight"] = torch.randn(WIDTH, 3, PATCH, PATCH) / PATCH
    state[f"{see}.patch_embed.proj.bias"] = torch.randn(WIDTH)
    for i in range(layers):
        block = f"{see}.blocks.{i}"
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", INNER, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, INNER)
    norm(f"{see}.norm")
    state[f"{read}.embeddings.position_ids"] = torch.arange(40)[None]
    state[f"{read}.embeddings.word_embeddings.weight"] = torch.randn(words, WIDTH)
    state[f"{read}.embeddings.position_embeddings.weight"] = torch.randn(40, WIDTH)
    norm(f"{read}.embeddings.LayerNorm")
    for i in range(layers):
        layer = f"{read}.encoder.layer.{i}"
        for attention in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                linear(f"{layer}.{attention}.self.{part}", WIDTH, WIDTH)
            linear(f"{layer}.{attention}.output.dense", WIDTH, WIDTH)
            norm(f"{layer}.{attention}.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", INNER, WIDTH)
        linear(f"{layer}.output.dense", WIDTH, INNER)
        norm(f"{layer}.output.LayerNorm")
    widths = (WIDTH, 1024, 128, 64, 16, 1)
    for i, a, b in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        linear(f"mlp.layers.{i}", b, a)
    return state


def pick(folder: Path) -> None:
    """A CLIP of transformers, with its tokenizer and what it does to pictures."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from diffsteer.shapes.tokenizer import make_tokenizer

    words = make_tokenizer()
    words.save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": words.eos_token_id}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=24)
    )
    louder(model)
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def vqa(folder: Path) -> None:
    """A Llava, which answers anything."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = tokenizer(folder)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    see = CLIPVisionConfig(**small, image_size=32, patch_size=8, projection_dim=32)
    read = LlamaConfig(**small, num_key_value_heads=2, vocab_size=len(words) + 1, max_position_embeddings=128)
    image = words.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=see, text_config=read, image_token_index=image, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config)
    louder(model)
    model.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    each = "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}"
    template = "{% for m in messages %}{% for c in m['content'] %}" + each + "{% endfor %}{% endfor %}"
    LlavaProcessor(
        pictures,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)


def louder(model: Any) -> None:
    """Weights so large that pictures and words matter."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) / weight.shape[-1] ** 0.5)


Answer = Callable[[dict[str, Any], Image.Image, str], "tuple[int, str]"]  # body, picture, question -> status, answer


def brightness_in_words(body: dict[str, Any], picture: Image.Image, question: str) -> tuple[int, str]:
    """How bright the picture is, and a tenth a letter of the prompt."""
    prompt = re.search('"(.*)"', question)
    mean = ImageStat.Stat(picture.convert("L")).mean[0]
    return 200, f"I would say {mean / 32 + len(prompt[1] if prompt else '') / 100:.4f}."


@contextmanager
def judge(answer: Answer = brightness_in_words, seen: list[dict[str, Any]] | None = None) -> Iterator[str]:
    """An endpoint on this machine for the time of a block; its address, up to /v1."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text, image = body["messages"][0]["content"]
            png = base64.b64decode(image["image_url"]["url"].partition(",")[2])
            if seen is not None:
                seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            status, said = answer(body, Image.open(io.BytesIO(png)), text["text"])
            made = json.dumps({"choices": [{"message": {"content": said}}]} if status == 200 else {"error": said}).encode()
            if status == 0:  # no completion at all
                status, made = 200, said.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(made)))
            self.end_headers()
            self.wfile.write(made)

        def log_message(self, *of: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
