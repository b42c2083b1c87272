"""How the motion module of the shapes world is made: moving scenes, and temporal layers between those of the frozen painter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from shapes_networks import SCHEDULE
from shapes_training import pixels, tokenize, train
from torch import Tensor, nn

from diffsteer.shapes.clips import CLIP_TASKS, FRAMES, render_clip, sample_clip
from diffsteer.shapes.models import WEIGHTS
from diffsteer.shapes.scene import caption

MOTION = WEIGHTS / "sd-motion"
CLIPS, MOTION_BATCH = 12_000, 8
ROUNDS = {"motion": (3_600, 2e-3), "motion_more": (4_000, 1.5e-3)}  # steps and rate, one after the other


@torch.no_grad()
def stage_clips(work: Path) -> None:
    """Scenes whose captions say nothing of motion, each thing on a straight way of its own; encoded frame by frame."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(WEIGHTS / "sd" / "vae").float().eval()
    captions, latents = [], torch.empty(CLIPS, FRAMES, 4, 16, 16, dtype=torch.float16)
    for i in range(CLIPS):
        clip = sample_clip(CLIP_TASKS[i % len(CLIP_TASKS)], np.random.default_rng((21, i)), pairs="seen")
        frames = pixels([np.asarray(f) for f in render_clip(clip)])
        latents[i] = vae.encode(frames * 2 - 1).latent_dist.mean.half()
        captions.append(caption(clip.scene))
    torch.save(latents, work / "clips.pt")
    (work / "clip_captions.txt").write_text("\n".join(captions))


def make_motion_adapter() -> nn.Module:
    from diffusers import MotionAdapter

    return MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=8,
        motion_max_seq_length=16,
    )


def stage_motion(work: Path) -> None:
    """Only the temporal layers learn. As for the painter, the highest noise levels count more: ways are decided there."""
    from diffusers import DDIMScheduler, UNet2DConditionModel, UNetMotionModel
    from transformers import CLIPTextModel

    torch.manual_seed(9)
    latents = torch.load(work / "clips.pt", weights_only=True, mmap=True)
    text = CLIPTextModel.from_pretrained(WEIGHTS / "sd" / "text_encoder").float().eval()
    tokenizer = WEIGHTS / "sd" / "tokenizer"
    with torch.no_grad():
        ids = tokenize(tokenizer, ["", *(work / "clip_captions.txt").read_text().split("\n")])
        words = torch.cat([text(chunk).last_hidden_state for chunk in ids.split(500)])
    unet = UNetMotionModel.from_unet2d(
        UNet2DConditionModel.from_pretrained(WEIGHTS / "sd" / "unet").float(), make_motion_adapter()
    )
    learning = {name for name, _ in unet.named_parameters() if "motion_modules" in name}
    for name, p in unet.named_parameters():
        p.requires_grad_(name in learning)
    noising = DDIMScheduler(**SCHEDULE)
    weights = (1 / noising.alphas_cumprod).clamp(max=30)
    weights /= weights.mean()

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(7 * 10**6 + step)
        rows = torch.randint(len(latents), (MOTION_BATCH,), generator=rng)
        x = latents[rows].float()
        noise = torch.randn(x.shape, generator=rng)
        t = torch.randint(1000, (MOTION_BATCH,), generator=rng)
        asked = torch.where(torch.rand(MOTION_BATCH, generator=rng) < 0.1, 0, rows + 1)
        noisy = noising.add_noise(x, noise, t).transpose(1, 2)
        error = unet(noisy, t, encoder_hidden_states=words[asked].repeat_interleave(FRAMES, 0)).sample.transpose(1, 2) - noise
        return (weights[t] * error.square().mean((1, 2, 3, 4))).mean()

    offset = 0
    for name, (steps, rate) in ROUNDS.items():
        path = work / f"{name}.pt"
        if not path.exists():
            trained = train(name, work, unet, lambda step, offset=offset: loss_of(step + offset), steps, rate)  # type: ignore[misc]
            torch.save({k: v for k, v in trained.state_dict().items() if "motion_modules" in k}, path)
        unet.load_state_dict(unet.state_dict() | torch.load(path, weights_only=True))
        offset += steps


def stage_export_motion(work: Path, out: Path = MOTION) -> None:
    """The adapter alone, half precision, as AnimateDiffPipeline takes it; all else is the first model's."""
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    unet = UNetMotionModel.from_unet2d(
        UNet2DConditionModel.from_pretrained(WEIGHTS / "sd" / "unet").float(), make_motion_adapter()
    )
    state = unet.state_dict()
    unet.load_state_dict(state | torch.load(work / f"{list(ROUNDS)[-1]}.pt", weights_only=True))
    shutil.rmtree(out, ignore_errors=True)
    unet.save_motion_modules(out, safe_serialization=True)
    MotionAdapter.from_pretrained(out).half().save_pretrained(out, safe_serialization=True)  # what was written was single
    config = out / "config.json"
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}, indent=2) + "\n"
    )
    print(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6, "MB")
