"""The command line on a toy pipeline saved to a folder, without a GPU or a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diffsteer.cli import main

STEPS = 4


class Result(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def toy_folder(toy_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> Result:
        capsys.readouterr()
        code = main(list(argv))
        said = capsys.readouterr()
        return Result(code, said.out, said.err)

    return call


@pytest.fixture
def generate(command: Callable[..., Result], toy_folder: Path) -> Callable[..., Result]:
    """`diffsteer generate` with the toy pipeline, few steps and a reward without a network."""

    def call(*argv: str) -> Result:
        toy = (f"model={toy_folder}", "reward=compressibility", f"num_inference_steps={STEPS}", "sampler.particles=2")
        return command("generate", *toy, *argv)

    return call


@pytest.fixture
def manifest() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a folder's manifest."""
    return lambda folder: [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
