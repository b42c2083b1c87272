"""The node pack: what is exported, what is left alone, and what the doctor sees."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffsteer import __version__
from diffsteer.comfy.examples import EXAMPLES
from diffsteer.comfy.pack import doctor, export
from diffsteer.types import DiffsteerError

# What the Python of a ComfyUI says of itself where all is well.
WELL = {"diffsteer": __version__, "torch": "2.9.1+cpu", "open_clip_torch": "3.3.0", "diffusers": "0.42.1", "nodes": "20"}


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """What looks like a ComfyUI."""
    folder = tmp_path / "ComfyUI"
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "comfyui_version.py").write_text('__version__ = "0.3.64"\n')
    python(folder, f"print('{json.dumps(WELL)}')")
    return folder


def wrong(folder: Path) -> list[str]:
    return [text for well, text in doctor(folder) if not well]


def test_it_goes_where_comfyui_finds_it(comfyui: Path, tmp_path: Path) -> None:
    assert export(comfyui) == export(comfyui / "custom_nodes") == export(comfyui / "custom_nodes" / "diffsteer")
    assert export(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    folder = comfyui / "custom_nodes" / "diffsteer"
    names = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    graphs = {f"{kind}_workflows/{name}.json" for kind in ("example", "api") for name in EXAMPLES}
    assert names == graphs | {"__init__.py", "pyproject.toml", "requirements.txt", "README.md"}
    for name in EXAMPLES:
        assert json.loads((folder / f"api_workflows/{name}.json").read_text()) == EXAMPLES[name]().api()
        assert json.loads((folder / f"example_workflows/{name}.json").read_text())["version"] == 0.4


def test_its_files_say_what_they_must(comfyui: Path) -> None:
    folder = export(comfyui)
    project = (folder / "pyproject.toml").read_text()
    for said in (
        f'version = "{__version__}"',
        "[tool.comfy]",
        "PublisherId",
        "DisplayName",
        'license = { text = "Apache-2.0" }',
    ):
        assert said in project
    wanted = [line for line in (folder / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert wanted == [f"diffsteer=={__version__}"]
    readme = (folder / "README.md").read_text()
    assert "Steered KSampler" in readme and max(map(len, readme.splitlines())) < 400


def test_the_pack_hands_over_the_nodes(comfyui: Path) -> None:
    """As ComfyUI loads it, in a process where no ComfyUI is."""
    folder = export(comfyui)
    code = (
        "import importlib.util as u; "
        f"s = u.spec_from_file_location('x', r'{folder / '__init__.py'}'); m = u.module_from_spec(s); s.loader.exec_module(m); "
        "print(len(m.NODE_CLASS_MAPPINGS), m.NODE_DISPLAY_NAME_MAPPINGS['DiffsteerKSampler'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d\d Steered KSampler\n", done.stdout)


def test_other_people_s_folders_are_left_alone(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text('[project]\nname = "diffsteer"\n')
    (project / "README.md").write_text("mine")
    for folder in (project, project / "README.md"):
        with pytest.raises(DiffsteerError, match="no node pack of diffsteer's"):
            export(folder)
    assert (project / "README.md").read_text() == "mine" and sorted(p.name for p in project.iterdir()) == [
        "README.md",
        "pyproject.toml",
    ]


def test_the_doctor_finds_nothing_where_nothing_is(comfyui: Path) -> None:
    export(comfyui)
    for folder in (comfyui, comfyui / "custom_nodes", comfyui / "custom_nodes" / "diffsteer"):
        assert wrong(folder) == []


def test_the_doctor_asks_the_python_that_runs_it(comfyui: Path) -> None:
    shutil.rmtree(comfyui / ".venv")  # then it is this one
    export(comfyui)
    assert wrong(comfyui) == []
    said = [text for _, text in doctor(comfyui)]
    assert f"diffsteer {__version__} in {sys.executable}" in said and any(re.fullmatch(r"\d\d nodes", text) for text in said)


def test_folders_may_be_named_from_inside(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(comfyui / "custom_nodes")
    assert export(".") == comfyui / "custom_nodes" / "diffsteer"
    monkeypatch.chdir(comfyui / "custom_nodes" / "diffsteer")
    assert wrong(Path(".")) == []


Spoil = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: (c / "custom_nodes/diffsteer/__init__.py").unlink(), "without __init__.py"),
        (lambda c: (c / "comfyui_version.py").write_text('__version__ = "0.2.7"'), "ComfyUI 0.2.7"),
        (lambda c: (c / "comfyui_version.py").write_text(""), "ComfyUI of unknown version"),
        (lambda c: (c / "comfyui_version.py").unlink(), "lies in no custom_nodes folder"),
        (lambda c: (c / "custom_nodes/diffsteer").rename(c / "custom_nodes/other"), "there is no node pack"),
        (lambda c: edit(c, "pyproject.toml", __version__, "0.0.1"), "it is of diffsteer 0.0.1"),
        (lambda c: edit(c, "requirements.txt", "diffsteer==", "torch==2.4\ndiffsteer=="), "its requirements touch torch==2.4"),
        (
            lambda c: edit(c, "example_workflows/flow.json", "DiffsteerRewardSum", "Gone"),
            "wants nodes that are not there: Gone",
        ),
        (lambda c: edit(c, "example_workflows/flow.json", "{", "", 1), "flow.json is no graph"),
        (lambda c: export(c / "custom_nodes/copy"), "1 other copies of the pack"),
        (lambda c: says(c, diffsteer=None), "diffsteer is missing"),
        (lambda c: says(c, torch="2.3.1"), "torch 2.3.1"),
        (lambda c: says(c, nodes=None, error="ImportError: no open_clip"), "cannot be made there (ImportError: no open_clip)"),
        (lambda c: edit(c, "__init__.py", "globals", "syntax error here("), "its __init__.py is as exported"),
        (lambda c: shutil.rmtree(c / "custom_nodes/diffsteer/example_workflows"), "without example_workflows/"),
        (lambda c: (c / "custom_nodes/diffsteer/pyproject.toml").write_bytes(b"\xff\xfe"), "it is of diffsteer unknown"),
        (lambda c: python(c, "print()"), "cannot be asked"),
        (lambda c: python(c, "raise SystemExit(3)"), "cannot be asked"),
    ],
)
def test_the_doctor_says_what_is_wrong(comfyui: Path, spoil: Spoil, said: str) -> None:
    export(comfyui)
    spoil(comfyui)
    assert any(said in text for text in wrong(comfyui)), wrong(comfyui)


def edit(comfyui: Path, name: str, old: str, new: str, count: int = -1) -> None:
    file = comfyui / "custom_nodes" / "diffsteer" / name
    file.write_text(file.read_text().replace(old, new, count))


def says(comfyui: Path, **changed: Any) -> None:
    python(comfyui, f"print('{json.dumps(WELL | changed)}')")


def python(comfyui: Path, code: str) -> None:
    """Another Python beside ComfyUI."""
    file = comfyui / ".venv" / "bin" / "python"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!{sys.executable}\n{code}\n")
    file.chmod(0o755)
