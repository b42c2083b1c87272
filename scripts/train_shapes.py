"""Trains the embedded shapes models, stage by stage, and saves them in diffusers' and open_clip's own formats.

    python scripts/train_shapes.py data --work DIR      render the training scenes          (2 min)
    python scripts/train_shapes.py vae --work DIR       the autoencoder                     (15 min on one core)
    python scripts/train_shapes.py latents --work DIR   encode the scenes, fold the scaling (3 min)
    python scripts/train_shapes.py decoder --work DIR   polish the decoder                  (10 min on one core)
    python scripts/train_shapes.py unet --work DIR      text encoder and UNet               (3 h on one core)
    python scripts/train_shapes.py clip --work DIR      the miniature CLIP, on clean renders (40 min on one core)
    python scripts/train_shapes.py clip_halfway --work DIR    and on what is being painted  (2 h on one core)
    python scripts/train_shapes.py clip2 --work DIR     a second, smaller one               (30 min on one core)
    python scripts/train_shapes.py encode --work DIR    encode the scenes with the autoencoder that ships (2 min)
    python scripts/train_shapes.py flow --work DIR      the painter as a rectified flow, on those (30 min on one core)
    python scripts/train_shapes.py export_flow --work DIR     and into diffsteer/shapes/weights
    python scripts/train_shapes.py pixels --work DIR    the pixel-space model, 32 x 32      (50 min on one core)
    python scripts/train_shapes.py judge --work DIR     the classifier that judges it       (10 min on one core)
    python scripts/train_shapes.py export_pixels --work DIR   and both into diffsteer/shapes/weights
    python scripts/train_shapes.py clips --work DIR     render and encode moving scenes     (10 min)
    python scripts/train_shapes.py motion --work DIR    the motion module on the frozen painter (1 h on one core)
    python scripts/train_shapes.py export_motion --work DIR   and into diffsteer/shapes/weights
    python scripts/train_shapes.py chains --work DIR    chains of the first model, to be learnt in four steps (1 h on one core)
    python scripts/train_shapes.py turbo --work DIR     the few-step model, on those        (30 min on one core)
    python scripts/train_shapes.py export_turbo --work DIR    and into diffsteer/shapes/weights
    python scripts/train_shapes.py export --work DIR    fp16 safetensors into diffsteer/shapes/weights

Every stage keeps a checkpoint in DIR and goes on from it when it is started again; batches are keyed by the step, so an
interrupted training sees what an undisturbed one sees. Set OMP_NUM_THREADS=1 and run `vae` and `clip` side by side.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes_clips import stage_clip, stage_clip2, stage_clip_halfway
from shapes_flow import stage_encode, stage_export_flow, stage_flow
from shapes_motion import stage_clips, stage_export_motion, stage_motion
from shapes_networks import SCHEDULE, Painter, make_vae
from shapes_pixels import stage_export_pixels, stage_judge, stage_pixels
from shapes_training import pixels, tokenize, train
from shapes_turbo import stage_chains, stage_export_turbo, stage_turbo
from torch import Tensor, nn

from diffsteer.shapes.grammar import TASKS
from diffsteer.shapes.models import WEIGHTS
from diffsteer.shapes.scene import caption, render, sample_scene
from diffsteer.shapes.tokenizer import make_tokenizer

SCENES, ENCODED = 80_000, 48_000  # the autoencoder sees all, the painter the first of them
VAE_STEPS, SHARP_STEPS, DECODER_STEPS = 3_000, 4_500, 3_000


def stage_data(work: Path) -> None:
    images = np.lib.format.open_memmap(work / "images.npy", "w+", np.uint8, (SCENES, 64, 64, 3))
    captions = []
    for i in range(SCENES):
        scene = sample_scene(TASKS[i % len(TASKS)], np.random.default_rng((1, i)), pairs="seen")
        images[i] = np.asarray(render(scene))
        captions.append(caption(scene))
    (work / "captions.txt").write_text("\n".join(captions))


def stage_vae(work: Path) -> None:
    """Two rounds: all pixels alike, then smaller batches in which objects weigh more than the plain background."""
    torch.manual_seed(1)
    images, vae = np.load(work / "images.npy", mmap_mode="r"), make_vae()

    def loss_with(batch: int, emphasis: float, kl_weight: float) -> Callable[[int], Tensor]:
        def loss_of(step: int) -> Tensor:
            rows = np.random.default_rng((2, batch, step)).integers(0, len(images), batch)
            x = pixels(images[np.sort(rows)]) * 2 - 1
            with torch.autocast("cpu", dtype=torch.bfloat16):
                posterior = vae.encode(x).latent_dist
                y = vae.decode(posterior.sample()).sample
            error = y.float() - x
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
            background = x.flatten(2).median(2).values[:, :, None, None]
            weight = 1 + emphasis * ((x - background).abs().amax(1, keepdim=True) > 0.1)
            return (weight * (error.abs() + error.square())).mean() + kl_weight * kl.mean()

        return loss_of

    vae.load_state_dict(train("vae", work, vae, loss_with(16, 0.0, 5e-4), VAE_STEPS, 2e-3).state_dict())
    torch.save(train("vae_sharp", work, vae, loss_with(8, 4.0, 1e-4), SHARP_STEPS, 1.5e-3).state_dict(), work / "vae.pt")


@torch.no_grad()
def stage_latents(work: Path) -> None:
    """Encode all scenes; then fold the per-channel normalisation into the 1x1 convolutions around the latents."""
    images, vae = np.load(work / "images.npy", mmap_mode="r"), make_vae().eval()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
    chunks = [images[i : i + 100] for i in range(0, ENCODED, 100)]
    z = torch.cat([vae.encode(pixels(c) * 2 - 1).latent_dist.mean for c in chunks])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    print("latent mean", mean.tolist(), "std", std.tolist())
    w, b = vae.quant_conv.weight, vae.quant_conv.bias
    w[:4] /= std[:, None, None, None]
    b[:4] = (b[:4] - mean) / std
    b[4:] -= 2 * std.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
    torch.save(vae.state_dict(), work / "vae_folded.pt")
    torch.save(((z - mean[:, None, None]) / std[:, None, None]).half(), work / "latents.pt")


def stage_decoder(work: Path) -> None:
    """Polish the decoder alone; the latents are frozen. Gray backgrounds, which have the least contrast, come more often."""
    latents, vae = torch.load(work / "latents.pt", weights_only=True), make_vae()
    images = np.load(work / "images.npy", mmap_mode="r")[: len(latents)]
    vae.load_state_dict(torch.load(work / "vae_folded.pt", weights_only=True))
    gray = np.flatnonzero((images[:, 0, 0].astype(int).mean(1) > 100) & (images[:, 0, 0].astype(int).mean(1) < 160))
    reader = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((4, step))
        rows = np.sort(np.concatenate([rng.choice(gray, 5), rng.integers(0, len(latents), 3)]))
        x = pixels(images[rows]) * 2 - 1
        z = latents[torch.from_numpy(rows)].float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = reader["decoder"](reader["post_quant_conv"](z + 0.02 * torch.randn_like(z)))
        error = y.float() - x
        weight = 1 + 6 * ((x - x.flatten(2).median(2).values[:, :, None, None]).abs().amax(1, keepdim=True) > 0.1)
        return (weight * (error.abs() + error.square())).mean()

    weights = train("decoder", work, reader, loss_of, DECODER_STEPS, 1e-3).state_dict()
    torch.save(vae.state_dict() | weights, work / "vae_final.pt")


def stage_unet(work: Path) -> None:
    """Four rounds. Backgrounds, colours and places are decided at the highest noise levels, of which Stable Diffusion's
    schedule has few and which count little in the loss of the noise: the later rounds take DDPM's and let them count more."""
    from diffusers import DDIMScheduler

    torch.manual_seed(2)
    if not (work / "tokenizer").exists():
        make_tokenizer().save_pretrained(work / "tokenizer")
    ids = tokenize(work / "tokenizer", (work / "captions.txt").read_text().split("\n")[:ENCODED])
    empty = tokenize(work / "tokenizer", [""])
    latents, painter = torch.load(work / "latents.pt", weights_only=True), Painter(int(ids.max()) + 1)

    def loss_with(schedule: dict[str, Any], heaviest: float, batch: int, offset: int) -> Callable[[int], Tensor]:
        noising = DDIMScheduler(**schedule)
        weights = (1 / noising.alphas_cumprod).clamp(max=heaviest)
        weights /= weights.mean()

        def loss_of(step: int) -> Tensor:
            rng = torch.Generator().manual_seed(offset + step)
            rows = torch.randint(len(latents), (batch,), generator=rng)
            x, noise = latents[rows].float(), torch.randn(batch, 4, 16, 16, generator=rng)
            t = torch.randint(1000, (batch,), generator=rng)
            words = torch.where(torch.rand(batch, 1, generator=rng) < 0.1, empty, ids[rows])
            error = painter(noising.add_noise(x, noise, t), t, words) - noise
            return (weights[t] * error.square().mean((1, 2, 3))).mean()

        return loss_of

    stable = SCHEDULE | {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for name, loss_of, steps, lr in (
        ("unet", loss_with(stable, 1.0, 48, 0), 7_000, 2e-3),
        ("unet_noisy", loss_with(SCHEDULE, 30.0, 48, 10**6), 4_000, 1.5e-3),
        ("unet_long", loss_with(SCHEDULE, 30.0, 64, 2 * 10**6), 9_000, 1.5e-3),
        ("unet_dark", loss_with(SCHEDULE, 300.0, 64, 3 * 10**6), 3_000, 1e-3),
    ):
        painter.load_state_dict(train(name, work, painter, loss_of, steps, lr).state_dict())
        torch.save(painter.state_dict(), work / f"{name}.pt")


def stage_export(work: Path, out: Path = WEIGHTS) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from safetensors.torch import save_file
    from transformers import CLIPTokenizer

    vae, ids = make_vae(), tokenize(work / "tokenizer", [""])
    vae.load_state_dict(torch.load(work / "vae_final.pt", weights_only=True))
    painter = Painter(int(ids.max()) + 1)
    painter.load_state_dict(torch.load(work / "unet_dark.pt", weights_only=True))
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=painter.text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=painter.unet,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(out / "sd", ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(out / "sd", safe_serialization=True)
    config = out / "sd" / "text_encoder" / "config.json"
    # A plain load would keep the stored half precision of this part alone, and crash beside a float32 UNet.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2))
    for name, trained in (("clip", "clip_place.pt"), ("clip2", "clip2.pt")):
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(work / name, out / name)
        weights = {k: v.half().contiguous() for k, v in torch.load(work / trained, weights_only=True).items()}
        save_file(weights, out / name / "open_clip_model.safetensors")
    print(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6, "MB")


STAGES = {
    f.__name__.removeprefix("stage_"): f
    for f in (
        stage_data,
        stage_vae,
        stage_latents,
        stage_decoder,
        stage_unet,
        stage_clip,
        stage_clip_halfway,
        stage_clip2,
        stage_encode,
        stage_flow,
        stage_export,
        stage_export_flow,
        stage_pixels,
        stage_judge,
        stage_export_pixels,
        stage_clips,
        stage_motion,
        stage_export_motion,
        stage_chains,
        stage_turbo,
        stage_export_turbo,
    )
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    STAGES[arguments.stage](arguments.work)
