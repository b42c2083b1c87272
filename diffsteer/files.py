"""Files that are whole at any moment: written aside and put in place at once, or lines that are added to the end."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write instead of `path`, which it replaces at once when it is whole."""
    part = path.with_name(f".{path.name}.part")
    yield part
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def append(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Add lines, on disk when this returns."""
    cut_unfinished(path)  # of a process that was killed while it wrote, or found the disk full
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(as_line(entry) for entry in entries))
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[str]:
    """The lines of a file; a last one that a stopped run left unfinished is cut off it."""
    cut_unfinished(path)
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []


def cut_unfinished(path: Path) -> None:
    """Cut off a last line that a stopped run left unfinished."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        kept = size
        while kept:
            step = min(kept, 65536)
            file.seek(kept - step)
            at = file.read(step).rfind(b"\n")
            if at >= 0:
                kept += at + 1 - step
                break
            kept -= step
        if kept < size:
            file.truncate(kept)


def as_line(entry: dict[str, Any]) -> str:
    """An entry as a line of JSON, which has no numbers but finite ones."""
    return json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> float | None:
    """A finite number, or None: JSON has no others."""
    value = float(value)
    return value if math.isfinite(value) else None


def finite_all(values: Any) -> Any:
    """Numbers of a tensor, or of tensors within lists, as lists."""
    return [finite_all(v) if getattr(v, "ndim", 0) else finite(v) for v in values]
