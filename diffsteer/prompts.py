"""Prompts from files: lines of text, JSON lines, CSV, TSV, Parquet, webdataset tars; with what is asked for one alone."""

from __future__ import annotations

import csv
import difflib
import io
import json
import lzma
import math
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsteer.types import DiffsteerError

COLUMNS = ("prompt", "Prompt", "prompts", "Prompts", "caption", "text")  # of what a table calls its prompts
# What may be asked for one prompt alone, and what it is.
OVERRIDES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda v: type(v) is int and 0 <= v < 2**63, "a whole number in [0, 2^63)"),
    "negative_prompt": (lambda v: isinstance(v, str), "a text"),
    "guidance_scale": (lambda v: type(v) in (int, float) and abs(v) < 1e6, "a number, less than a million"),
    "num_inference_steps": (lambda v: type(v) is int and v >= 1, "a whole number, at least 1"),
    "width": (lambda v: type(v) is int and v >= 1, "a whole number, at least 1"),
    "height": (lambda v: type(v) is int and v >= 1, "a whole number, at least 1"),
    "reward": (lambda v: isinstance(v, dict) and all(isinstance(k, str) for k in v), "a mapping of arguments"),
}
WHOLE = ("id", "seed", "num_inference_steps", "width", "height")
TEXTS = (".txt", ".caption", ".prompt")  # members of a tar that hold nothing but a prompt


@dataclass(frozen=True)
class Item:
    """A prompt to do.

    Attributes:
        index: its place in the list, which names what is made of it. id: keys its randomness.
        overrides: what is asked for it alone, of `OVERRIDES`.
        about: whatever else its line says, which the manifest keeps.
    """

    index: int
    id: int | str
    prompt: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its image (video, sound), without ending and folder."""
        return f"{self.index:03d}"

    @property
    def asked(self) -> str:
        """What is asked for it alone, as a key: items with the same one can run together."""
        return json.dumps(self.overrides, sort_keys=True) if self.overrides else ""


def as_items(prompts: Sequence[str]) -> list[Item]:
    """Items whose ids are their indices."""
    return [Item(i, i, prompt) for i, prompt in enumerate(prompts)]


def read_items(path: str | Path) -> list[Item]:
    """Prompts from a file, by its ending: .jsonl, .ndjson or .json (an object a line, or a list of them), .csv, .tsv, .parquet
    (with pyarrow), .tar, compressed or not (webdataset: a text or a JSON object a key), or else a prompt a line.

    An object or a row has a prompt (tables may call it Prompts, caption or text), an ``id`` if wanted, and any of `OVERRIDES`;
    a table has ``reward.NAME`` in the place of a mapping. So GenEval's metadata and DrawBench can be read as they are.

    Raises:
        DiffsteerError: no such file, nothing in it, an id twice, or a line that cannot be read: the first of them, with how
            many more there are.
    """
    path = Path(path)
    rows = _rows(path)
    items: list[Item] = []
    wrong: list[str] = []
    first: dict[int | str, str] = {}
    for where, row in rows:
        try:
            item = _item(len(items) + len(wrong), row, where)
            if first.setdefault(item.id, where) is not where:
                raise DiffsteerError(f"{where}: the id {item.id!r} was given in {first[item.id].rpartition(', ')[2]} already")
            items.append(item)
        except DiffsteerError as error:
            wrong.append(str(error))
    if wrong:
        more = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
        raise DiffsteerError(wrong[0] + more)
    if not items:
        raise DiffsteerError(f"prompts={path}: there is no prompt in it")
    return items


Row = tuple[str, Any]  # where it stands, and what it says: a text, a mapping, or an error


def _rows(path: Path) -> Iterable[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    if suffix in (".tar", ".tgz") or (suffix in (".gz", ".bz2", ".xz") and path.stem.lower().endswith(".tar")):
        return _tar(path)
    text = _text(path)
    if suffix in (".csv", ".tsv"):
        return _table(path, text, "\t" if suffix == ".tsv" else ",")
    if suffix == ".json" and text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DiffsteerError(f"{path}: no JSON ({error})") from error
        return ((f"{path}, entry {n}", row) for n, row in enumerate(listed, 1))
    lines = [(f"{path}, line {n}", line.rstrip("\r")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(where, _json(line)) for where, line in lines] if suffix in (".jsonl", ".ndjson", ".json") else lines


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DiffsteerError(_unreadable(path, error)) from error
    except UnicodeDecodeError as error:
        raise DiffsteerError(f"prompts={path}: it is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _unreadable(path: Path, error: OSError) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], 1)
    return f"prompts={path}: {error.strerror or error}" + (f"; did you mean {near[0]!r}?" if near else "")


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return DiffsteerError(f'no JSON ({error}); wanted {{"prompt": "..."}}')


def _table(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    quoted = True
    if delimiter == "\t":  # some write quotes in it as they stand
        try:
            list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
        except csv.Error:
            quoted = False
    kind: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=kind, strict=True)
    try:
        column = _column(path, list(reader.fieldnames or ()))
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                yield where, DiffsteerError(f"it has not {len(reader.fieldnames or ())} fields, as the first line")
            elif any(row.values()) and not row[column].strip():
                yield where, DiffsteerError(f"its {column} is empty")
            elif any(row.values()):
                yield where, _typed({"prompt" if k == column else k: v for k, v in row.items()})
    except csv.Error as error:
        raise DiffsteerError(f"{path}, line {reader.line_num}: this is no table ({error})") from error


def _column(path: Path, names: Sequence[str]) -> str:
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise DiffsteerError(f"{path}: two columns are called {twice!r}")
    found = next((name for name in COLUMNS if name in names), None)
    if found is None:
        raise DiffsteerError(
            f"{path}: no column is called {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; it has {', '.join(names)}"
        )
    return found


def _typed(row: dict[str, str]) -> dict[str, Any]:
    """A row of texts: numbers where numbers are wanted, arguments of the reward together, empty cells left out."""
    made: dict[str, Any] = {}
    for name, text in row.items():
        known = name in OVERRIDES and name != "negative_prompt"
        whole, _, argument = name.partition(".")
        if text == "" and name != "prompt":
            continue
        if whole == "reward" and argument:
            made.setdefault("reward", {})[argument] = _number(text)
        else:
            made[name] = _number(text) if known else int(text) if name == "id" and _is_number(text) else text
    return made


def _is_number(text: str) -> bool:
    """Is it a whole number as it would be written? 01 is a text."""
    return text.isascii() and text.isdigit() and len(text) < 19 and str(int(text)) == text


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DiffsteerError(f"prompts={path}: a Parquet file wants pyarrow (pip install 'diffsteer[parquet]')") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
        column = _column(path, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                told = {"prompt" if k == column else k: v for k, v in row.items() if v is not None}
                yield f"{path}, row {number}", _typed_values(told)
    except OSError as error:
        raise DiffsteerError(_unreadable(path, error)) from error
    except pyarrow.ArrowException as error:
        raise DiffsteerError(f"prompts={path}: this is no Parquet file ({str(error).splitlines()[0]})") from error


def _typed_values(row: dict[str, Any]) -> dict[str, Any]:
    """A row with types of its own; columns ``reward.NAME`` together."""
    made: dict[str, Any] = {}
    for name, value in row.items():
        whole, _, argument = name.partition(".")
        if whole == "reward" and argument:
            made.setdefault("reward", {})[argument] = value
        else:
            made[name] = value
    return made


def _tar(path: Path) -> Iterator[Row]:
    """A webdataset shard: members of one key, its name up to the first dot, are one prompt."""
    members: dict[str, dict[str, bytes]] = {}
    twice: list[str] = []
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if member.isfile() and (f".{ending}" in TEXTS or ending == "json"):
                    key = f"{folder}/{stem}".lstrip("/")
                    taken = archive.extractfile(member)
                    twice += [member.name] if ending in members.get(key, {}) else []
                    members.setdefault(key, {})[ending] = b"" if taken is None else taken.read()
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is cut off")
            while rest := archive.fileobj.read(2**20):
                if any(rest):
                    raise tarfile.ReadError("something follows its end, maybe another one: join them with tar --concatenate")
    except OSError as error:
        raise DiffsteerError(_unreadable(path, error)) from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DiffsteerError(f"prompts={path}: this is no tar file ({str(error).splitlines()[0]})") from error
    if twice:
        raise DiffsteerError(f"prompts={path}: {twice[0]} is in it twice")
    for key, parts in members.items():
        where = f"{path}, key {key}"
        try:
            told: Any = _json(parts["json"].decode()) if "json" in parts else {}
            text = next((parts[t[1:]].decode() for t in TEXTS if t[1:] in parts), None)
        except UnicodeDecodeError as error:
            yield where, DiffsteerError(f"it is not UTF-8 text ({error.reason})")
            continue
        if isinstance(told, dict):
            named = next((told[c] for c in COLUMNS if c in told), None)
            if text is not None and not (isinstance(named, str) and named.strip() == text.strip()):
                named = text.strip()
            told = {"id": key, **told, **({"prompt": named} if named else {})}
        yield where, told


def _whole(name: str, value: Any) -> Any:
    """A whole number that a table keeps as 7.0, for want of another kind that may be missing."""
    whole = name in WHOLE and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def _plain(value: Any) -> Any:
    """What JSON takes of a value: numbers that are none are null, anything else is told as a text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    return str(value).encode(errors="replace").decode()


def _item(index: int, row: Any, where: str) -> Item:
    if isinstance(row, DiffsteerError):
        raise DiffsteerError(f"{where}: {row}") from row
    row = {"prompt": row} if isinstance(row, str) and not where.rpartition(", ")[2].startswith("entry") else row
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DiffsteerError(f'{where}: wanted an object with a text "prompt", such as {{"prompt": "a red star"}}')
    id = index if row.get("id") is None else _whole("id", row["id"])
    if isinstance(id, bool) or not isinstance(id, int | str):
        raise DiffsteerError(f"{where}: the id {id!r} is neither a text nor a whole number")
    overrides = {name: _whole(name, row[name]) for name in OVERRIDES if row.get(name) is not None}
    for name, value in overrides.items():
        right, wanted = OVERRIDES[name]
        if not right(value):
            raise DiffsteerError(f"{where}: {name}={value!r}; wanted {wanted}")
    try:
        about = {str(k): _plain(v) for k, v in row.items() if k not in ("prompt", "id", *OVERRIDES)}
        json.dumps([overrides, about], allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:  # an unpaired surrogate is a ValueError, too
        raise DiffsteerError(f"{where}: it cannot be kept as JSON, in Unicode ({error})") from error
    return Item(index, id, row["prompt"], overrides, about)
