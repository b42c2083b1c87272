"""How the flow model of the shapes world is trained and saved: a miniature Stable Diffusion 3 on the same autoencoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from shapes_networks import FlowPainter
from shapes_training import pixels, tokenize, train
from torch import Tensor

from diffsteer.shapes.models import WEIGHTS

FLOW_STEPS, BATCH, RATE = 7_500, 64, 3e-3
# Of the scheduler that ships, and of the noise levels in training: places and colours are decided where noise is high.
SHIFT = 1.5
OUT, TOKENIZER = WEIGHTS / "sd3", WEIGHTS / "sd" / "tokenizer"


@torch.no_grad()
def stage_encode(work: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(WEIGHTS / "sd" / "vae").float().eval()
    images = np.load(work / "images.npy", mmap_mode="r")
    chunks = [images[i : i + 100] for i in range(0, len(images), 100)]
    z = torch.cat([vae.encode(pixels(c) * 2 - 1).latent_dist.mean for c in chunks])
    print("latent mean", z.mean((0, 2, 3)).tolist(), "std", z.std((0, 2, 3)).tolist())
    torch.save(z.half(), work / "latents_shipped.pt")


def stage_flow(work: Path) -> None:
    """Rectified flow: x = (1 - s) z + s noise, the network predicts noise - z; 10 % of the captions are left out."""
    torch.manual_seed(5)
    latents = torch.load(work / "latents_shipped.pt", weights_only=True)
    ids = tokenize(TOKENIZER, (work / "captions.txt").read_text().split("\n")[: len(latents)])
    empty, painter = tokenize(TOKENIZER, [""]), FlowPainter(int(ids.max()) + 1)

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(4 * 10**6 + step)
        rows = torch.randint(len(latents), (BATCH,), generator=rng)
        z, noise = latents[rows].float(), torch.randn(BATCH, *latents.shape[1:], generator=rng)
        u = torch.rand(BATCH, generator=rng)
        s = (SHIFT * u / (1 + (SHIFT - 1) * u))[:, None, None, None]
        words = torch.where(torch.rand(BATCH, 1, generator=rng) < 0.1, empty, ids[rows])
        return (painter((1 - s) * z + s * noise, 1000 * s.flatten(), words) - (noise - z)).square().mean()

    trained = train("flow", work, painter, loss_of, FLOW_STEPS, RATE, matrices=painter.matrices())
    torch.save(trained.state_dict(), work / "flow.pt")


def stage_export_flow(work: Path, out: Path = OUT) -> None:
    """Without autoencoder and tokenizers, which are those of `weights/sd`; `load_pipeline` puts them in."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTokenizer

    weights = torch.load(work / "flow.pt", weights_only=True)
    painter = FlowPainter(len(weights["text_encoder.text_model.embeddings.token_embedding.weight"]))
    painter.load_state_dict(weights)
    pipe = StableDiffusion3Pipeline(
        transformer=painter.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=AutoencoderKL.from_pretrained(WEIGHTS / "sd" / "vae"),
        text_encoder=painter.text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        text_encoder_2=painter.text_encoder_2,
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    shutil.rmtree(out, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    index = json.loads((out / "model_index.json").read_text())
    for name in ("vae", "tokenizer", "tokenizer_2"):
        shutil.rmtree(out / name)
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name in ("text_encoder", "text_encoder_2"):  # as in the first model: a plain load would keep half precision here alone
        config = out / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2))
    print(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6, "MB")
