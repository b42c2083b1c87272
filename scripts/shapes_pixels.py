"""The pixel-space model of the shapes world (32 x 32, DDPM, no captions), and the classifier whose features judge it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes_networks import SCHEDULE
from shapes_training import train
from torch import Tensor, nn

from diffsteer.shapes.grammar import BACKGROUNDS, COLORS, SHAPES, TASKS
from diffsteer.shapes.models import WEIGHTS
from diffsteer.shapes.scene import Scene, sample_scene

PIXELS = WEIGHTS / "pixels"
PIXEL_STEPS, PIXEL_BATCH, JUDGE_STEPS = 13_000, 32, 2_500
PAIRS = [(c, s) for c in COLORS for s in SHAPES]


def small(images: np.ndarray) -> Tensor:
    """(N, 64, 64, 3) bytes -> (N, 3, 32, 32) in [-1, 1], two by two pixels averaged."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return nn.functional.avg_pool2d(x, 2) / 127.5 - 1


def make_pixel_unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        block_out_channels=(16, 32, 64, 80),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )


class PixelJudge(nn.Module):
    """Says which coloured shapes a picture (N, 3, 32, 32) in [-1, 1] holds, how many, and on what; `features` are (N, 64)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 96)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, len(PAIRS) + 4 + len(BACKGROUNDS))

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def stage_pixels(work: Path) -> None:
    """The noise is predicted, all levels count alike: as Ho et al. (2020) train on CIFAR-10."""
    from diffusers import DDIMScheduler

    torch.manual_seed(7)
    images, noising = small(np.load(work / "images.npy")), DDIMScheduler(**SCHEDULE)
    print("mean", images.mean((0, 2, 3)).tolist(), "variance a picture", float(images.flatten(1).var(1).mean()))

    unet = make_pixel_unet()

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(5 * 10**6 + step)
        rows = torch.randint(len(images), (PIXEL_BATCH,), generator=rng)
        x, noise = images[rows], torch.randn(PIXEL_BATCH, 3, 32, 32, generator=rng)
        t = torch.randint(1000, (PIXEL_BATCH,), generator=rng)
        return (unet(noising.add_noise(x, noise, t), t).sample - noise).square().mean()

    torch.save(train("pixels", work, unet, loss_of, PIXEL_STEPS, 1e-3).state_dict(), work / "pixels.pt")


def labels_of(scene: Scene) -> np.ndarray:
    found = np.zeros(len(PAIRS) + 4 + len(BACKGROUNDS), np.float32)
    for thing in scene.things:
        found[PAIRS.index((thing.color, thing.shape))] = 1
    found[len(PAIRS) + len(scene.things) - 1] = 1
    found[len(PAIRS) + 4 + list(BACKGROUNDS).index(scene.background)] = 1
    return found


def stage_judge(work: Path) -> None:
    """Trained on clean pictures; the last 4,000 are kept back and tell how good it is."""
    torch.manual_seed(8)
    images = small(np.load(work / "images.npy"))
    scenes = [sample_scene(TASKS[i % len(TASKS)], np.random.default_rng((1, i)), pairs="seen") for i in range(len(images))]
    labels, kept = torch.from_numpy(np.stack([labels_of(s) for s in scenes])), len(images) - 4_000
    judge = PixelJudge()

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(6 * 10**6 + step)
        rows = torch.randint(kept, (128,), generator=rng)
        return nn.functional.binary_cross_entropy_with_logits(judge(images[rows]), labels[rows])

    train("judge", work, judge, loss_of, JUDGE_STEPS, 2e-3)
    # the weights as trained: averages of them do not go with the statistics of batches
    judge.load_state_dict(torch.load(work / "judge.ckpt", weights_only=True)["model"])
    judge.eval()
    with torch.no_grad():
        right = (judge(images[kept:]) > 0).float() == labels[kept:]
    print(f"all labels right: {float(right.all(1).float().mean()):.3f}, a label: {float(right.float().mean()):.4f}")
    torch.save(judge.state_dict(), work / "judge.pt")


def stage_export_pixels(work: Path, out: Path = PIXELS) -> None:
    """`unet/` and `scheduler/` in diffusers' format, the classifier, and what real pictures are: moments of its features."""
    from diffusers import DDIMPipeline, DDIMScheduler
    from safetensors.torch import save_file

    unet, judge = make_pixel_unet(), PixelJudge().eval()
    unet.load_state_dict(torch.load(work / "pixels.pt", weights_only=True))
    judge.load_state_dict(torch.load(work / "judge.pt", weights_only=True))
    shutil.rmtree(out, ignore_errors=True)
    DDIMPipeline(unet, DDIMScheduler(**SCHEDULE)).to(torch.float16).save_pretrained(out, safe_serialization=True)
    save_file(
        {k: v.half().contiguous() for k, v in judge.state_dict().items() if v.is_floating_point()}, out / "judge.safetensors"
    )
    images = small(np.load(work / "images.npy"))
    with torch.no_grad():
        features = torch.cat([judge.features(c) for c in images.split(1000)]).double()
    facts: dict[str, Any] = {"mean": features.mean(0), "covariance": torch.cov(features.T)}
    variances = images.flatten(1).var(1).double()
    facts |= {"variance": variances.mean(), "variance_std": variances.std(), "picture_mean": images.mean((0, 2, 3)).double()}
    save_file(facts, out / "real.safetensors")
    print(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6, "MB")
