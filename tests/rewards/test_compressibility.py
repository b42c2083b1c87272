"""JPEG sizes against Pillow called by hand, and against what must be smaller."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from diffsteer.rewards import Compressibility
from diffsteer.types import Context, DiffsteerError

CTX = Context()


def score(reward: Compressibility, images: Tensor) -> Tensor:
    return reward.score(images, [""] * len(images), CTX)


@pytest.mark.parametrize("quality", [20, 95])
def test_sizes_are_those_of_the_files(images: Tensor, quality: int) -> None:
    expected = []
    for image in images:
        file = io.BytesIO()
        to_pil_image(image).save(file, "JPEG", quality=quality)
        expected.append(-len(file.getvalue()) / 1000)
    torch.testing.assert_close(score(Compressibility(quality), images), torch.tensor(expected))


def test_plain_beats_smooth_beats_noise(images: Tensor) -> None:
    order = torch.stack([torch.full_like(images[0], 0.5), images[0], images[-1]])
    plain, smooth, noisy = score(Compressibility(), order).tolist()
    assert 0 > plain > smooth > noisy
    assert score(Compressibility(incompressible=True), order).tolist() == [-plain, -smooth, -noisy]


def test_less_quality_makes_smaller_files(images: Tensor) -> None:
    assert bool((score(Compressibility(50), images) > score(Compressibility(95), images)).all())


def test_values_beyond_the_range_are_clipped(images: Tensor) -> None:
    stretched = images * 2 - 0.5
    assert torch.equal(score(Compressibility(), stretched), score(Compressibility(), stretched.clamp(0, 1)))


def test_nan_loses(images: Tensor) -> None:
    broken = images.clone()
    broken[1, 0, 3, 3] = float("nan")
    assert score(Compressibility(), broken).isnan().tolist() == [False, True, False, False, False]


def test_range_follows_the_direction() -> None:
    assert Compressibility().range == (float("-inf"), 0.0)
    assert Compressibility(incompressible=True).range == (0.0, float("inf"))


@pytest.mark.parametrize("quality", [0, 101, -5])
def test_quality_range(quality: int) -> None:
    with pytest.raises(DiffsteerError, match=f"quality={quality} is a JPEG quality, 1 to 100"):
        Compressibility(quality)
