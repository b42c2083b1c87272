"""``diffsteer status DIR``: how far a folder of results is. It only looks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffsteer.folder import ERRORS, MANIFEST, RUN, TIMINGS, paced, was_interrupted
from diffsteer.types import DiffsteerError

COMPARISON = "evaluate.json"  # of a folder of `diffsteer evaluate`
SHOWN = 10  # failed prompts that are shown


def status(folder: str | Path) -> tuple[list[str], bool]:
    """Lines for a person, and is everything done?

    Raises:
        DiffsteerError: this is no folder of results.
    """
    path = Path(folder)
    if (path / COMPARISON).is_file():
        return _comparison(path)
    if not (path / RUN).is_file() and not (path / MANIFEST).is_file():
        raise DiffsteerError(f"{folder} is no folder of results: it has neither {RUN} nor {MANIFEST}")
    prompts = _prompts(path / RUN)
    done = {e["id"] for e in _made(path) if prompts is None or _index(e["image"]) < prompts}  # lines of other prompts stay, too
    failed = {e["id"]: e for e in lines_of(path / ERRORS, "id", "prompt", "error") if e["id"] not in done}
    unknown, prompts = prompts is None, len(done) + len(failed) if prompts is None else prompts
    missing = max(0, prompts - len(done) - len(failed))
    parts = [f"{len(done)} of {prompts} prompts done"]
    if unknown:
        parts = [f"{len(done)} prompts done; {RUN} is lost, which says of how many"]
    parts += [f"{len(failed)} failed"] if failed else []
    parts += [f"{missing} to do"] if missing else []
    lines = [f"{folder}: {', '.join(parts)}"]
    pace = paced(list(lines_of(path / TIMINGS, "ids", "seconds")))
    if pace is not None:
        rate, outside = pace
        left = f"; what is left takes about {_duration((missing + len(failed)) / rate)}" if missing + len(failed) else ""
        lines.append(f"{rate:.3g} prompts a second, {outside:.0%} of the time outside the denoiser{left}")
    lines += [f"failed: {e['prompt']!r}: {e['error']}" for e in list(failed.values())[:SHOWN]]
    lines += [f"and {len(failed) - SHOWN} more in {ERRORS}"] if len(failed) > SHOWN else []
    return lines, not missing and not failed and not unknown


def _comparison(path: Path) -> tuple[list[str], bool]:
    """Of the folders that samplers and seeds have in there."""
    told = json.loads((path / COMPARISON).read_text())
    asked = {json.dumps(id) for id in told["ids"]}
    lines, finished, wanted = [], 0, len(told["folders"]) * len(asked)
    for name in told["folders"]:
        if not (path / name / RUN).is_file():
            continue
        done = {json.dumps(e["id"]) for e in _made(path / name)} & asked
        finished += len(done)
        if len(done) < len(asked):
            lines.append(f"{name}: {len(done)} of {len(asked)}")
        lines += [f"{name}: {line}" for line in status(path / name)[0] if line.startswith("failed")]
    return [f"{path}: {finished} of {wanted} prompts done, in {len(told['folders'])} folders", *lines], finished == wanted


def _made(path: Path) -> list[dict[str, Any]]:
    """The lines of a folder's manifest that need not be done again."""
    there = lines_of(path / MANIFEST, "id", "image")
    return [e for e in there if is_inside(path, e["image"]) and not was_interrupted(e)]


def is_inside(folder: Path, name: Any) -> bool:
    """Is that a file in the folder, wherever a manifest says it is?"""
    path = folder / str(name)
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _index(image: str) -> int:
    """The place in the list of prompts that a picture's name tells."""
    stem = Path(image).stem
    return int(stem) if stem.isascii() and stem.isdigit() else 0


def lines_of(path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """The whole lines of a file that are objects with such keys; one that is being written is passed over."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in text.rpartition("\n")[0].split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and all(key in entry for key in keys):
            yield entry


def _prompts(path: Path) -> int | None:
    try:
        return int(json.loads(path.read_text())["prompts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
