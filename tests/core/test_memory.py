"""Memory: what more particles, and more steps, need. Each run has a process of its own, which gives freed memory back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")

RUN = """
import sys
sys.path.insert(0, "tests")
import psutil, torch
from conftest import build_toy_pipeline
from diffusers import AutoencoderKL
from diffsteer import SteeredPipeline
from diffsteer.backend import DiffusersSession
from diffsteer.ledger import _high_water
from diffsteer.samplers import FeynmanKac

torch.set_num_threads(1)
pipe, call = build_toy_pipeline(), {"height": 64, "width": 64}
# a decoder that needs, as real ones do, far more than the picture that it makes
down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
small = {"layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 64}
pipe.vae = AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=(64, 64), **small)


def steer(particles, steps):
    reward = lambda samples, prompts: samples.flatten(1).mean(1)
    steered = SteeredPipeline(pipe, FeynmanKac(particles, events=(0.5,)), reward, chunk=4)
    steered(["a star"], seed=0, num_inference_steps=steps, **call)


def guide(particles, steps):
    session = DiffusersSession(pipe, ["a star"], particles=particles, seed=0, num_inference_steps=steps, call=call)
    x = session.noise()
    for i in range(steps):
        x = session.gradient(x, i, lambda x0, rows: x0.flatten(1).sum(1))[1].x


def path(particles, steps):
    session = DiffusersSession(pipe, ["a star"], particles=particles, seed=0, num_inference_steps=steps, call=call)
    x = session.noise().requires_grad_(True)
    torch.autograd.grad(session.trajectory(x).square().sum(), x)


{what}(1, 2)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the highest level starts anew
before = psutil.Process().memory_info().rss
{what}({particles}, {steps})
print(_high_water() - before)
"""


def needed(what: str, particles: int, steps: int) -> float:
    """Bytes above the level before the run."""
    code = RUN.replace("{what}", what).replace("{particles}", str(particles)).replace("{steps}", str(steps))
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


STEPS = [6, pytest.param(12, marks=pytest.mark.slow)]


@pytest.mark.parametrize("particles", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_many_particles_in_blocks_need_what_a_few_do(particles: int) -> None:
    few, many = needed("steer", 4, 3), needed("steer", particles, 3)
    assert few > 2**20 and many <= 1.3 * few, (few, many)


@pytest.mark.parametrize("steps", STEPS)
def test_gradients_need_the_same_whatever_the_number_of_steps(steps: int) -> None:
    few, many = needed("guide", 4, 2), needed("guide", 4, steps)
    assert few > 2**20 and many <= 1.1 * few, (few, many)


@pytest.mark.parametrize("steps", STEPS)
def test_a_whole_path_needs_what_one_step_does_and_its_states(steps: int) -> None:
    few, many = needed("path", 4, 2), needed("path", 4, steps)
    assert few > 2**20 and many <= 1.3 * few, (few, many)
