"""``diffsteer comfy``, and what pictures of ``generate`` carry for ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffsteer.comfy import pack


def kinds(graph: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {node["class_type"]: node["inputs"] for node in graph.values()}


def test_pictures_of_generate_carry_settings_and_graph(
    generate: Callable[..., Any], command: Callable[..., Any], tmp_path: Path
) -> None:
    def said(file: Path) -> dict[str, Any]:
        with Image.open(file) as image:
            return {key: json.loads(text) for key, text in image.text.items()}  # type: ignore[attr-defined]

    assert generate("prompt=a red star", "out=one", "seed=4").code == 0
    told = said(tmp_path / "one" / "images" / "000.png")
    assert set(told) == {"diffsteer"}  # a folder of diffusers is no checkpoint of ComfyUI's
    about = told["diffsteer"]
    assert about["prompt"] == "a red star" and about["settings"]["seed"] == 4
    assert about["settings"]["sampler"]["name"] == "fk" and about["settings"]["sampler"]["particles"] == 2
    few = ("num_inference_steps=2", "reward=compressibility", "sampler.particles=2")
    assert command("generate", "prompt=a red star", "out=two", "sampler=best_of_n", "output=all", *few).code == 0
    for name in ("000.png", "000_01.png"):
        graph = kinds(said(tmp_path / "two" / "images" / name)["prompt"])
        assert graph["PrimitiveStringMultiline"]["value"] == "a red star" and "DiffsteerSampler_best_of_n" in graph


def test_the_command(tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "custom_nodes").mkdir(parents=True)
    (comfyui / "comfyui_version.py").write_text('__version__ = "0.3.64"\n')
    done = command("comfy", "export", str(comfyui))
    assert done.code == 0 and str(comfyui / "custom_nodes" / "diffsteer") in done.out
    assert command("comfy", "doctor", str(comfyui)).out.endswith("all is well\n")
    monkeypatch.setattr(pack, "__version__", "9.9.9")
    done = command("comfy", "doctor", str(comfyui))
    assert done.code == 1 and "WRONG it is of diffsteer" in done.out and "things are wrong" in done.out
    for argv, said in (
        ((), ""),
        (("exprot",), "did you mean 'export'?"),
        (("export",), "the following arguments are required: DIR"),
        (("doctor", "a", "b"), "unrecognized arguments: b"),
        (("graph", "prompt=x", "sampler=fkk"), "sampler=fkk is unknown"),
        (("graph", "prompt=x", "-o", "/nowhere/at/all.json"), "/nowhere/at/all.json"),
    ):
        done = command("comfy", *argv)
        assert done.code == 2 and said in done.err and len(done.err.splitlines()) <= 1
    assert command("comfy", "--help").code == 0
