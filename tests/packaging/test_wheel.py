"""The wheel holds every file once, and works where the checkout is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tracked(*suffixes: str) -> set[str]:
    """Files of the package in the checkout, by their names in the wheel."""
    found = {}
    for folder, name in (
        ("diffsteer", "diffsteer"),
        ("samplers", "diffsteer/samplers"),
        ("rewards", "diffsteer/rewards"),
        ("configs", "diffsteer/configs"),
    ):
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            linked = folder == "diffsteer" and inside.parts[0] in ("samplers", "rewards", "configs")
            if path.is_file() and not linked and path.suffix in suffixes:
                found[f"{name}/{inside.as_posix()}"] = path
    return set(found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_every_file_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    inside = {n for n in names if not n.split("/")[0].endswith(".dist-info")}
    wanted = tracked(".py", ".yaml", ".safetensors", ".json", ".typed", ".css", ".js") | {"diffsteer/shapes/weights/README.md"}
    assert inside == wanted, (sorted(wanted - inside), sorted(inside - wanted))
    assert wheel.stat().st_size < 17_000_000


def test_sdist_carries_the_tests(wheel: Path) -> None:
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
    for wanted in (
        "tests/samplers/cases.py",
        "tests/conftest.py",
        "samplers/feynman_kac.py",
        "configs/sampler/fk.yaml",
        "docs/architecture.md",
        "examples/diffsteer-warmth/pyproject.toml",
    ):
        assert any(n.endswith(wanted) for n in names), wanted


def test_it_generates_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, away = tmp_path / "site", tmp_path / "away"
    away.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    env = os.environ | {"PYTHONPATH": str(site)}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=away, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert str(site) in run("-c", "import diffsteer.samplers, diffsteer.rewards, diffsteer.configs as c; print(c.__file__)")
    run("-m", "diffsteer", "generate", "prompt=a red circle", "sampler.particles=2", "num_inference_steps=4", "out=here")
    record = json.loads((away / "here" / "manifest.jsonl").read_text())
    assert record["prompt"] == "a red circle" and (away / "here" / record["image"]).exists()
    failed = subprocess.run([sys.executable, "-c", "import samplers"], cwd=away, env=env, capture_output=True)
    assert failed.returncode != 0
