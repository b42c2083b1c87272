"""The example of a reward in a distribution of its own: installed as pip would, found by name, and conforming."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example is installed, in a folder of its own."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for file in (ROOT / "examples" / "diffsteer-warmth").glob("*.*"):
        (source / file.name).write_bytes(file.read_bytes())
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, cwd=source)
    return os.environ | {"PYTHONPATH": str(target)}


def run(command: list[str], env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=env, cwd=cwd, capture_output=True, text=True)


def test_it_is_a_reward_like_any_other(installed: dict[str, str], tmp_path: Path) -> None:
    listed = run(["-m", "diffsteer", "list", "rewards"], installed, tmp_path)
    assert listed.returncode == 0 and "warmth             pixels; differentiable; range -1 to 1; no weights" in listed.stdout
    fixed = ["-m", "diffsteer", "generate", "prompt=a red circle", "num_inference_steps=3", "sampler.particles=2", "out=o"]
    made = run([*fixed, "reward=clip + 0.3*z(warmth(middle=0.5))", "holdout=warmth"], installed, tmp_path)
    assert made.returncode == 0, made.stderr
    assert '"held_out": {"warmth": {"score": ' in (tmp_path / "o" / "manifest.jsonl").read_text()
    wrong = run([*fixed, "reward=warmth", "reward.middle=3"], installed, tmp_path)
    assert wrong.returncode == 2 and wrong.stderr == "diffsteer: warmth: middle=3; it lies in [0.1, 1]\n"


@pytest.mark.slow
def test_its_own_tests_pass_and_ours_take_it_in(installed: dict[str, str]) -> None:
    tests = ROOT / "examples" / "diffsteer-warmth" / "tests"
    own = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tests), str(tests)], installed, tests)
    assert own.returncode == 0 and "2 passed" in own.stdout, own.stdout
    ours = run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/rewards/test_conformance.py", "-k", "warmth"], installed, ROOT
    )
    assert ours.returncode == 0 and "1 passed" in ours.stdout, ours.stdout
