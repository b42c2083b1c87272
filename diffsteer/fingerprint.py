"""Files that a run's result depends on, told apart by what is in them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCKS, SIZE = 64, 16_384  # of a large file that many blocks of that many bytes are read, its two ends among them


def fingerprint(path: Path) -> str:
    """SHA-256 over the names, sizes and contents of a file, or of all files of a folder; hidden ones are left out.

    Of a file of more than a megabyte, 64 blocks of 16 kB at even distances stand for its contents: other weights differ there,
    and a model of many gigabytes takes no time. A change of a few bytes between the blocks is not seen.
    """
    sha = hashlib.sha256()
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        if any(part.startswith(".") for part in name.split("/") if part):
            continue
        size = file.stat().st_size
        sha.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= BLOCKS * SIZE:
                sha.update(stream.read())
                continue
            for i in range(BLOCKS):
                stream.seek((size - SIZE) * i // (BLOCKS - 1))
                sha.update(stream.read(SIZE))
    return sha.hexdigest()


def fingerprints(settings: dict[str, Any], out: Path) -> dict[str, str]:
    """Of every value of nested settings that names a file or folder that is there, plainly, after a ``scheme:``, or quoted
    within an expression.

    Args:
        out: the folder of results, which a setting may happen to share its name with.
    """
    found = {}
    for key, value in _leaves("", settings):
        named = [(key, value), (key, value.partition(":")[2])]
        named += [(f"{key} {quoted}", quoted) for _, quoted in re.findall(r"""(['"])(.*?)\1""", value)]
        for place, name in named:
            if name and place not in found and exists(name) and not out.resolve().is_relative_to(Path(name).resolve()):
                found[place] = fingerprint(Path(name))
    return found


def exists(name: str) -> bool:
    """Is there a file or a folder of that name? No name is too long, or holds what none may hold, to be asked after."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a name, or holding what no name may hold
        return False


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}" if key else str(name), inner)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _leaves(f"{key}.{number}", inner)
    elif isinstance(value, str):
        yield key, value
