"""What a finished folder of results is written as, beside its files: webdataset shards, and the manifest as a table."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffsteer.files import replacing
from diffsteer.types import DiffsteerError, nearest

SHARDS, TABLE = "shards", "manifest.parquet"
SAMPLES = 1000  # of a shard, at most
Entries = Sequence[dict[str, Any]]


def check_sinks(names: Sequence[str]) -> None:
    """Refuse a sink that there is not, or whose package is missing.

    Raises:
        DiffsteerError: with those that there are.
    """
    for name in names:
        if name not in SINKS:
            raise DiffsteerError(f"sinks: {name!r} is unknown{nearest(str(name), SINKS)}")
    if "parquet" in names:
        _pyarrow()


def write_webdataset(folder: Path, entries: Entries) -> None:
    """``shards/00000.tar`` and so on, a thousand prompts each: of every one its picture (clip, sound), its prompt as KEY.txt,
    and as KEY.json what was asked for, so that shards can be asked for again, and its line of the manifest, ``made``. KEY is
    the name of its picture. The same entries give the same bytes."""
    shards = folder / SHARDS
    shards.mkdir(exist_ok=True)
    wanted = {f"{n:05d}.tar": entries[i : i + SAMPLES] for n, i in enumerate(range(0, len(entries), SAMPLES))}
    for old in shards.glob("*.tar"):
        if old.name not in wanted:
            old.unlink()
    for name, part in wanted.items():
        with replacing(shards / name) as path, tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            for entry in part:
                image = folder / entry["image"]
                asked = {"id": entry["id"], "prompt": entry["prompt"], "seed": entry["seed"], **entry.get("overrides", {})}
                told = json.dumps({**asked, "made": entry}, ensure_ascii=False, sort_keys=True).encode()
                for ending, data in ((image.suffix, image.read_bytes()), (".txt", entry["prompt"].encode()), (".json", told)):
                    info = tarfile.TarInfo(f"{image.stem}{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def write_parquet(folder: Path, entries: Entries) -> None:
    """``manifest.parquet``: a row a prompt, its numbers as columns (those of the ledger and of held-out rewards by
    ``ledger.NAME`` and ``held_out.NAME``), everything else as JSON in the column ``rest``."""
    pyarrow, parquet = _pyarrow()
    rows = [_row(entry) for entry in entries]
    columns = sorted({name for row in rows for name in row})
    kinds = {"id": pyarrow.string(), "prompt": pyarrow.string(), "image": pyarrow.string(), "rest": pyarrow.string()}
    kinds["seed"] = pyarrow.int64()
    kinds |= {name: pyarrow.int64() for name in columns if name.startswith("ledger.")}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.float64())) for name in columns])
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows], schema=schema)
    with replacing(folder / TABLE) as path:
        parquet.write_table(table, path)


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    names = ("prompt", "image", "seed", "reward", "log_weight", "log_z", "exponent")
    plain: dict[str, Any] = {str(key): entry[key] for key in names if key in entry}
    counts = {f"ledger.{key}": value for key, value in entry["ledger"].items()}
    held = {f"held_out.{name}": one["score"] for name, one in entry.get("held_out", {}).items()}
    rest = {k: v for k, v in entry.items() if k not in (*plain, "id", "ledger", "held_out")}
    return {"id": str(entry["id"]), **plain, **counts, **held, "rest": json.dumps(rest, ensure_ascii=False, sort_keys=True)}


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DiffsteerError("sinks: parquet wants pyarrow (pip install 'diffsteer[parquet]')") from error
    return pyarrow, pyarrow.parquet


SINKS: dict[str, Callable[[Path, Entries], None]] = {"webdataset": write_webdataset, "parquet": write_parquet}
