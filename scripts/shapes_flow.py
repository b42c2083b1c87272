"""How the flow model of the shapes world is trained and saved: the first painter's networks, taught to predict velocities."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes_networks import SCHEDULE, Painter
from shapes_training import pixels, tokenize, train
from torch import Tensor, nn

from diffsteer.shapes.models import MODELS, WEIGHTS

FLOW_STEPS, BATCH, RATE = 4_500, 48, 1.2e-3
# Of the scheduler that ships, and of the noise levels in training: places and colours are decided where noise is high.
SHIFT = 1.5
FLOW: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": SHIFT,
}
TOKENIZER = WEIGHTS / "sd" / "tokenizer"


@torch.no_grad()
def stage_encode(work: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(WEIGHTS / "sd" / "vae").float().eval()
    images = np.load(work / "images.npy", mmap_mode="r")
    chunks = [images[i : i + 100] for i in range(0, len(images), 100)]
    z = torch.cat([vae.encode(pixels(c) * 2 - 1).latent_dist.mean for c in chunks])
    print("latent mean", z.mean((0, 2, 3)).tolist(), "std", z.std((0, 2, 3)).tolist())
    torch.save(z.half(), work / "latents_shipped.pt")


def first_painter() -> Painter:
    from safetensors.torch import load_file

    text = load_file(WEIGHTS / "sd" / "text_encoder" / "model.safetensors")
    unet = load_file(WEIGHTS / "sd" / "unet" / "diffusion_pytorch_model.safetensors")
    painter = Painter(max(v.shape[0] for k, v in text.items() if k.endswith("token_embedding.weight")))
    painter.text_encoder.load_state_dict({k: v.float() for k, v in text.items()})
    painter.unet.load_state_dict({k: v.float() for k, v in unet.items()})
    return painter


def translate_times(unet: nn.Module, steps: int = 2_000) -> None:
    """Let the network read 1000 s where it used to read the timestep of DDPM's schedule with the same signal-to-noise ratio."""
    from diffusers import DDIMScheduler

    bars = DDIMScheduler(**SCHEDULE).alphas_cumprod
    s = torch.linspace(0.002, 0.998, 1000)
    t = (bars[None].logit() - 2 * ((1 - s) / s).log()[:, None]).abs().argmin(1)
    with torch.no_grad():
        wanted = unet.time_embedding(unet.time_proj(t))
    optimizer = torch.optim.Adam(unet.time_embedding.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = (unet.time_embedding(unet.time_proj(1000 * s)) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"times translated to {float(loss.sqrt() / wanted.std()):.3f}")


def stage_flow(work: Path) -> None:
    """Rectified flow: x = (1 - s) z + s noise, the network predicts noise - z; 10 % of the captions are left out."""
    torch.manual_seed(5)
    latents = torch.load(work / "latents_shipped.pt", weights_only=True)
    ids = tokenize(TOKENIZER, (work / "captions.txt").read_text().split("\n")[: len(latents)])
    empty, painter = tokenize(TOKENIZER, [""]), first_painter()
    if not (work / "flow.ckpt").exists():
        translate_times(painter.unet)

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(4 * 10**6 + step)
        rows = torch.randint(len(latents), (BATCH,), generator=rng)
        z, noise = latents[rows].float(), torch.randn(BATCH, *latents.shape[1:], generator=rng)
        u = torch.rand(BATCH, generator=rng)
        s = (SHIFT * u / (1 + (SHIFT - 1) * u))[:, None, None, None]
        words = torch.where(torch.rand(BATCH, 1, generator=rng) < 0.1, empty, ids[rows])
        return (painter((1 - s) * z + s * noise, 1000 * s.flatten(), words) - (noise - z)).square().mean()

    torch.save(train("flow", work, painter, loss_of, FLOW_STEPS, RATE).state_dict(), work / "flow.pt")


def export_painter(weights: Path, scheduler: dict[str, Any], out: Path) -> None:
    """A painter of flows as a pipeline, without autoencoder and tokenizer, which are those of the first model; `load_pipeline`
    puts them in."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    painter = first_painter()
    painter.load_state_dict(torch.load(weights, weights_only=True))
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(WEIGHTS / "sd" / "vae"),
        text_encoder=painter.text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=painter.unet,
        scheduler=DPMSolverMultistepScheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(out, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    for name in ("vae", "tokenizer"):
        shutil.rmtree(out / name)
    config = out / "text_encoder" / "config.json"  # as in the first model: a plain load would keep half precision here alone
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2))
    print(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6, "MB")


def stage_export_flow(work: Path, out: Path = MODELS["shapes-flow"]) -> None:
    export_painter(work / "flow.pt", FLOW, out)
