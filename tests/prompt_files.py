"""Files of prompts for tests, in the forms that people have them in."""

from __future__ import annotations

import csv
import io
import tarfile
from typing import Any

import pytest

from diffsteer.prompts import Item

THREE = ["a red star", "Two, three; circles", 'a "ring" ünder ☂']


def tar_of(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def table(rows: list[list[str]], delimiter: str) -> bytes:
    made = io.StringIO(newline="")
    csv.writer(made, delimiter=delimiter).writerows(rows)
    return made.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    tables, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    made = io.BytesIO()
    files.write_table(tables.Table.from_pylist(rows), made)
    return made.getvalue()


def rows(n: int) -> list[Item]:
    """Items of so many prompts."""
    return [Item(i, i, f"a star {i}") for i in range(n)]
