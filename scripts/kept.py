"""Records of measurements that are kept with the project, so that its tables can be made again without measuring anew."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parents[1] / "docs" / "measured"
Record = dict[str, Any]


def kept(name: str) -> list[Record]:
    """The records of ``docs/measured/NAME.jsonl.gz``; none where there is no such file."""
    path = MEASURED / f"{name}.jsonl.gz"
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()] if path.exists() else []


def keep(name: str, records: list[Record]) -> None:
    """Keep records: numbers to three digits behind the point."""
    path = MEASURED / f"{name}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(rounded(r), sort_keys=True) + "\n" for r in records)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(records)} records, {path.stat().st_size / 1e6:.2f} MB")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 3) if isinstance(value, float) else value
