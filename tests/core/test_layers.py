"""Which module may import which, what importing costs, and what the project says of itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted(
    p
    for p in (ROOT / "diffsteer").rglob("*.py")
    if not {"samplers", "rewards", "configs"} & set(p.relative_to(ROOT / "diffsteer").parts)
)
COMFY = ROOT / "diffsteer" / "comfy"
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview", "nodes", "server"}
PLUGINS = sorted([*(ROOT / "samplers").glob("*.py"), *(ROOT / "rewards").glob("*.py")])
# what a lower floor may not know; later names may import earlier ones only
FLOORS = [
    ["rng", "algebra", "ledger", "types", "warn"],
    ["timing"],
    ["blocks", "media", "fingerprint", "budget", "proposals", "prior", "diversity", "files"],
    ["start"],
    ["levels", "events", "particles", "resampling", "reward", "hooks", "decoding", "conditions"]
    + ["guidance", "classifier_free", "schedules", "grids", "lineage", "correlation", "holdout", "conformance", "expression"],
    ["judging"],
    ["trial"],
    ["draft", "staged", "found", "ground", "noise_network"],
    ["playing"],
    ["finals"],
    ["families"],
    ["tiny"],
    ["pipes", "embedded"],
    ["control"],
    ["selection", "scheduler", "history"],
    ["segments"],
    ["session"],
    ["tapped", "clip_session"],
    ["guided", "timed", "session_ground"],
    ["searching"],
    ["callable", "run", "backend"],
    ["search_run", "plain"],
    ["loading", "forecast"],
    ["pipeline", "dropin", "toy"],
    ["profiles"],
    ["measured"],
    ["sheet", "charts"],
    [
        "registry",
        "calibration",
        "config",
        "overrides",
        "prompts",
        "leases",
        "traces",
        "sinks",
        "folder",
        "batch",
        "listing",
        "told",
        "work",
        "asked",
        "status",
        "report",
        "job",
        "generate",
        "cli",
        "__main__",
    ]
    + ["ranges", "tuning", "tuned", "tune"],
]
FACES = {"pipeline", "dropin", "cli", "generate", "batch", "config", "registry"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def floor_of(name: str) -> int | None:
    """Of a module of the core; the nodes of `diffsteer.comfy` stand above them all."""
    return next((i for i, floor in enumerate(FLOORS) if name in floor), None)


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_imports_run_one_way(path: Path) -> None:
    mine = None if path.parent == COMFY else floor_of(path.stem)
    for name in imports(path, top_level_only=True):
        parts = name.split(".")
        other = floor_of(parts[1]) if parts[0] == "diffsteer" and len(parts) > 1 else None
        if mine is not None and other is not None:
            assert other <= mine, f"{path.name} imports {name} from a floor above"


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_core_knows_no_method_and_only_the_lower_floor_of_the_backend_knows_diffusers(path: Path) -> None:
    for name in imports(path):
        if path.stem not in ("registry", "cli", "config", "batch"):
            assert not name.startswith(("diffsteer.samplers", "diffsteer.rewards")), f"{path.name} imports {name}"
        if path.stem not in ("pipes", "backend", "loading", "tiny", "embedded"):
            assert name.split(".")[0] != "diffusers", f"{path.name} imports {name}"


@pytest.mark.parametrize("path", [*CORE, *PLUGINS], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_only_the_nodes_know_comfyui_and_only_while_they_run(path: Path) -> None:
    for name in imports(path):
        if path.parent != COMFY:
            assert name.split(".")[0] not in COMFYUI, f"{path.name} imports {name}"
            if path.stem not in ("cli", "job"):
                assert not name.startswith("diffsteer.comfy"), f"{path.name} imports {name}"
    for name in imports(path, top_level_only=True):
        assert name.split(".")[0] not in COMFYUI and not (path.parent != COMFY and name.startswith("diffsteer.comfy"))


@pytest.mark.parametrize("path", PLUGINS, ids=lambda p: p.name)
def test_plug_ins_import_the_core_only(path: Path) -> None:
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("diffusers", "comfy")
        assert not (parts[0] == "diffsteer" and len(parts) > 1 and parts[1] in FACES), f"{path.name} imports {name}"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def test_import_is_light() -> None:
    """At most 0.2 s beyond torch's own import, the best of a dozen, since other tests run beside it, and no diffusers."""
    code = (
        "import sys, torch, time; t = time.perf_counter(); import diffsteer; from diffsteer import SteeredPipeline; "
        "print(time.perf_counter() - t, 'diffusers' in sys.modules or 'open_clip' in sys.modules)"
    )
    results = [run(code).split()]
    while float(results[-1][0]) >= 0.2 and len(results) < 12:
        results.append(run(code).split())
    assert {r[1] for r in results} == {"False"}
    assert min(float(r[0]) for r in results) < 0.2


def test_plug_in_folders_refuse_the_wrong_name() -> None:
    for folder in ("samplers", "rewards", "configs"):
        code = f"import {folder}"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode != 0 and f"import diffsteer.{folder}" in result.stderr


def test_files_stay_readable() -> None:
    for path in [*CORE, *PLUGINS]:
        assert len(path.read_text().splitlines()) <= 360, f"{path.name} is too long to read top-down"
