"""The node pack: the folder that ComfyUI finds under its `custom_nodes`, and what may be wrong with one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from diffsteer import __version__
from diffsteer.comfy.catalogue import nodes
from diffsteer.comfy.examples import EXAMPLES
from diffsteer.comfy.graph import facts
from diffsteer.comfy.node import Node
from diffsteer.types import DiffsteerError

NAME = "diffsteer"
MARK = 'name = "diffsteer-nodes"'  # by which a pack of ours is known
LEAST_COMFYUI, LEAST_TORCH = (0, 3, 40), (2, 4)
INIT = '''\
"""diffsteer as nodes of ComfyUI. Everything is in the installed package; this file hands it over."""

from diffsteer.comfy.catalogue import for_comfyui

globals().update(for_comfyui())
'''
PYPROJECT = """\
[project]
name = "diffsteer-nodes"
description = "Steer any model with rewards: particles, noise search, gradient guidance"
version = "{version}"
license = {{ text = "Apache-2.0" }}
dependencies = ["diffsteer=={version}"]

[tool.comfy]
PublisherId = "diffsteer"
DisplayName = "diffsteer"
requires-comfyui = ">={comfyui}"
"""
REQUIREMENTS = """\
# torch is ComfyUI's: nothing here names it, and any from {torch} on will do.
diffsteer=={version}
"""
README = """\
# diffsteer for ComfyUI

Particles, noise search and gradient guidance, driven by rewards, for whatever MODEL, VAE and CLIP a graph has. This folder
only hands the installed package `diffsteer` to ComfyUI; install that into the Python that runs ComfyUI:

    python -m pip install diffsteer=={version}

and look whether all is well:

    diffsteer comfy doctor PATH-TO-COMFYUI

The example graphs run on small models that come with the package, so they need no download. In ComfyUI they stand under
Workflow, Browse Templates, diffsteer; or drop a file of `example_workflows/` on the canvas. Those in `api_workflows/` can be
posted to `/prompt`.

{table}
"""


def folder_of(path: Path) -> Path:
    """The pack's folder: itself, or the one inside a ComfyUI or its `custom_nodes`."""
    path = path.resolve()
    if (path / "custom_nodes").is_dir():
        return path / "custom_nodes" / NAME
    return path / NAME if path.name == "custom_nodes" else path


def export(path: str | Path) -> Path:
    """Write the node pack, and return its folder; a pack that is there is renewed.

    Raises:
        DiffsteerError: the folder holds something else.
    """
    folder = folder_of(Path(path))
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _is_ours(folder))):
        raise DiffsteerError(f"{folder} holds something that is no node pack of diffsteer's: choose another folder")
    examples = {name: make() for name, make in EXAMPLES.items()}
    files = {
        "__init__.py": INIT,
        "pyproject.toml": PYPROJECT.format(version=__version__, comfyui=_dotted(LEAST_COMFYUI)),
        "requirements.txt": REQUIREMENTS.format(version=__version__, torch=_dotted(LEAST_TORCH)),
        "README.md": README.format(version=__version__, table=_table()),
        **{f"example_workflows/{name}.json": json.dumps(g.canvas(), indent=1) for name, g in examples.items()},
        **{f"api_workflows/{name}.json": json.dumps(g.api(), indent=1) for name, g in examples.items()},
    }
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


def doctor(path: str | Path) -> Iterator[tuple[bool, str]]:
    """Look at an installation: is each thing well, and what is it?

    Args:
        path: a ComfyUI, its `custom_nodes`, or the pack's own folder in there.
    """
    folder = folder_of(Path(path))
    comfyui = folder.parent.parent
    if not folder.is_dir():
        yield False, f"there is no node pack in {folder}: diffsteer comfy export {path}"
        return
    yield from _of_pack(folder)
    if folder.parent.name != "custom_nodes" or not (comfyui / "comfyui_version.py").is_file():
        yield False, f"{folder} lies in no custom_nodes folder of a ComfyUI, where it would be found"
        return
    said = re.search(r'__version__ = "([\d.]+)', _read(comfyui / "comfyui_version.py"))
    version = tuple(int(n) for n in said[1].split(".")) if said else ()
    yield (
        version >= LEAST_COMFYUI,
        f"ComfyUI {_dotted(version) or 'of unknown version'} (wanted: {_dotted(LEAST_COMFYUI)} or newer)",
    )
    twins = [p for p in folder.parent.glob("*/pyproject.toml") if p.parent != folder and _is_ours(p.parent)]
    yield (
        not twins,
        f"{len(twins)} other copies of the pack" + (f": {', '.join(str(p.parent) for p in twins)}" if twins else ""),
    )
    yield from _of_python(comfyui)


def _of_pack(folder: Path) -> Iterator[tuple[bool, str]]:
    files = ("__init__.py", "pyproject.toml", "requirements.txt", *(f"example_workflows/{name}.json" for name in EXAMPLES))
    missing = [name for name in files if not (folder / name).is_file()]
    yield not missing, f"node pack in {folder}" + (f", without {', '.join(missing)}" if missing else "")
    if missing:
        return
    yield _read(folder / "__init__.py") == INIT, "its __init__.py is as exported, and only hands the package over"
    version = re.search(r'^version = "(.*)"', _read(folder / "pyproject.toml"), re.M)
    found = version[1] if version else "unknown"
    yield found == __version__, f"it is of diffsteer {found}; this is {__version__}"
    wanted = [line.split("#")[0].strip() for line in _read(folder / "requirements.txt").splitlines()]
    touched = [line for line in wanted if re.match(r"(torch|torchvision|torchaudio)\b", line)]
    yield not touched, "its requirements leave torch alone" if not touched else f"its requirements touch {', '.join(touched)}"
    known = facts()
    for file in sorted((folder / "example_workflows").glob("*.json")):
        try:
            kinds = {n["type"] for n in json.loads(_read(file))["nodes"]}
            strange = sorted(k for k in kinds if k not in known and k != "MarkdownNote")
        except (ValueError, KeyError, TypeError) as error:
            yield False, f"{file.name} is no graph ({error})"
            continue
        yield (
            not strange,
            f"{file.name}" + (f" wants nodes that are not there: {', '.join(strange)}" if strange else ": its nodes are there"),
        )


def python_of(comfyui: Path) -> Path:
    """The Python that runs a ComfyUI, where it has one of its own, in it or beside it; else this one."""
    places = [comfyui / v / b for v in (".venv", "venv") for b in ("bin/python", "Scripts/python.exe")]
    places += [comfyui.parent / v / "bin/python" for v in (".venv", "venv")] + [
        comfyui.parent / "python_embeded" / "python.exe"
    ]
    return next((p for p in places if p.is_file()), Path(sys.executable))


def _of_python(comfyui: Path) -> Iterator[tuple[bool, str]]:
    python = python_of(comfyui)
    code = (
        "import json, importlib.metadata as m\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        "found = {n: version(n) for n in ('diffsteer', 'torch', 'open_clip_torch', 'diffusers')}\n"
        "try:\n"
        "    from diffsteer.comfy.catalogue import nodes\n"
        "    found['nodes'] = str(len(nodes()))\n"
        "except Exception as error: found['nodes'] = None; found['error'] = f'{type(error).__name__}: {error}'\n"
        "print(json.dumps(found))"
    )
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=120, check=True)
        found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
        made, error_there = found.pop("nodes", None), found.pop("error", None)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, AttributeError) as error:
        yield False, f"{python} cannot be asked ({error})"
        return
    for name, version in found.items():
        well = version is not None
        if name == "diffsteer":
            well = version == __version__
        if name == "torch" and version:
            well = tuple(int(n) for n in re.findall(r"\d+", version)[:2]) >= LEAST_TORCH
        yield well, f"{name} {version or 'is missing'} in {python}"
    yield made is not None, f"{made} nodes" if made else f"the nodes cannot be made there ({error_there})"


def _is_ours(folder: Path) -> bool:
    return MARK in _read(folder / "pyproject.toml")


def _read(file: Path) -> str:
    """A text file, whatever is in it; nothing where there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _table() -> str:
    def line(node: Node) -> str:
        first = re.split(r"(?<=[.:]) ", node.description, maxsplit=1)[0]
        return f"| {node.title} | {first} |"

    return "\n".join(["| node | what it does |", "|---|---|", *(line(node) for node in nodes())])
