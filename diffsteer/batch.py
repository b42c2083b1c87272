"""A folder of results: prompts in, images and a manifest out, begun again where it stopped.

A manifest line is written after its images are on disk, so what the manifest names is there, whenever a run is stopped.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsteer import media
from diffsteer.sheet import sheet
from diffsteer.types import DiffsteerError, Info

if TYPE_CHECKING:
    from diffsteer.pipeline import SteeredPipeline
    from diffsteer.run import SteeredOutput

SHOWN = 64  # images on the sheet, the first ones
MANIFEST, TIMINGS, GRID = "manifest.jsonl", "timings.jsonl", "grid.png"
# Those that each prompt has of its own, however many run together.
_COUNTS = ("evaluations", "backwards", "decodes", "tiny_decodes", "reward_calls")
_RARE = ("backwards", "tiny_decodes")


@dataclass(frozen=True)
class Item:
    """A prompt to do. `id` keys its randomness; `index`, its place in the list, names what is made of it."""

    index: int
    id: int | str
    prompt: str

    @property
    def name(self) -> str:
        """The name of its image (video, sound), without ending and folder."""
        return f"{self.index:03d}"


def as_items(prompts: Sequence[str]) -> list[Item]:
    """Items whose ids are their indices."""
    return [Item(i, i, prompt) for i, prompt in enumerate(prompts)]


def read_items(path: str | Path) -> list[Item]:
    """Prompts from a file: .jsonl or .json with an object a line (``prompt``, and ``id`` if wanted), or else a prompt a line.

    Raises:
        DiffsteerError: no such file, nothing in it, a line that is no such object, or an id twice.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        near = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DiffsteerError(f"prompts={path}: {error.strerror or error}{_did_you_mean(path.name, near)}") from error
    except UnicodeDecodeError as error:
        raise DiffsteerError(f"prompts={path}: it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    filled = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix not in (".jsonl", ".json"):
        items = as_items([line for _, line in filled])
    else:
        items = [_item(index, line, f"{path}, line {number}") for index, (number, line) in enumerate(filled)]
    if not items:
        raise DiffsteerError(f"prompts={path}: there is no prompt in it")
    first: dict[int | str, int] = {}
    for item, (number, _) in zip(items, filled, strict=True):
        if first.setdefault(item.id, number) != number:
            raise DiffsteerError(f"{path}, line {number}: the id {item.id!r} was given in line {first[item.id]} already")
    return items


def _item(index: int, line: str, where: str) -> Item:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DiffsteerError(f'{where}: no JSON ({error}); wanted {{"prompt": "..."}}') from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise DiffsteerError(f'{where}: wanted an object with a text "prompt", such as {{"prompt": "a red star"}}')
    ours = [key for key in entry if key in ("seed", "negative_prompt", "guidance_scale", "num_inference_steps")]
    if ours:
        raise DiffsteerError(
            f"{where}: {ours[0]!r} cannot be set for one prompt; give {ours[0]}= for all (valid here: prompt, id)"
        )
    id = entry.get("id", index)
    if isinstance(id, bool) or not isinstance(id, (int, str)):
        raise DiffsteerError(f"{where}: the id {id!r} is neither a text nor a whole number")
    return Item(index, id, entry["prompt"])


def _did_you_mean(name: str, valid: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, valid, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


@dataclass
class Folder:
    """The folder of one run: `entries` are the manifest's lines by id, those whose images are gone left out;
    `texts` are written into the metadata of an item's pictures; `video` is the format of videos.

    Raises:
        DiffsteerError: it holds results of other settings or other prompts, which would be lost.
    """

    path: Path
    items: list[Item]
    settings_hash: str
    entries: dict[int | str, dict[str, Any]] = field(default_factory=dict)
    texts: Callable[[Item], dict[str, str]] = lambda item: {}
    video: str = "gif"

    def __post_init__(self) -> None:
        manifest, prompts = self.path / MANIFEST, {item.id: item for item in self.items}
        cut_unfinished(self.path / TIMINGS)
        whole = _whole_lines(manifest)
        for entry in whole:
            if entry["settings"] != self.settings_hash:
                raise DiffsteerError(f"{manifest} was made with other settings; choose another out=")
            item = prompts.get(entry["id"])
            name = Path(entry["image"]).stem
            if item is not None and (item.prompt, item.name) != (entry["prompt"], name):
                said = f"{entry['prompt']!r} under the id {item.id!r}"
                raise DiffsteerError(f"{manifest} has {said}, and this run something else; choose another out=")
            if item is None and name in [i.name for i in self.items]:
                raise DiffsteerError(f"{manifest} has {entry['image']} for the id {entry['id']!r}; choose another out=")
            images = [entry["image"], *(p["image"] for p in entry.get("particles", []))]
            stopped = entry.get("search", {}).get("stopped") == "interrupted"  # before its budget was spent: it is done again
            if not stopped and all((self.path / image).is_file() for image in images):
                self.entries[entry["id"]] = entry

    @property
    def missing(self) -> list[Item]:
        """The items to do."""
        return [item for item in self.items if item.id not in self.entries]

    def add(self, items: Sequence[Item], out: SteeredOutput, seed: int, output: str) -> None:
        """Write what a call made of some items: images, then their manifest lines, then what it took."""
        per, images = out.rewards.shape[1], out.images or []
        counted = out.ledger.counts
        counts = {name: counted[name] // len(items) for name in _COUNTS if counted[name] or name not in _RARE}
        folder, suffix = media.kind(images[0], self.video)
        (self.path / folder).mkdir(parents=True, exist_ok=True)
        lines, diversities = [], out.diversity if per > 1 else []
        for p, item in enumerate(items):
            chosen, stem, texts = int(out.chosen[p]), f"{folder}/{item.name}", self.texts(item)
            pairs = zip(out.rewards[p], out.log_weights[p], strict=True)
            facts = [{"reward": finite(r), "log_weight": finite(w)} for r, w in pairs]
            entry: dict[str, Any] = {
                "id": item.id,
                "prompt": item.prompt,
                "seed": seed,
                "image": stem + suffix,
                **facts[chosen],
            }
            exponent = finite(out.trace.events[-1].exponent[p]) if out.trace.events else None
            entry |= {"log_z": finite(out.log_z[p]), "exponent": exponent}
            mine = counts
            if per > 1:
                entry["diversity"] = diversities[p]._asdict()
            if out.trace.searches:  # each prompt its own
                found = out.trace.searches[p]
                entry["search"] = found.facts()
                mine = counts | {"evaluations": found.spent.evals, "reward_calls": found.spent.reward_calls}
                if not counted["tiny_decodes"]:
                    mine["decodes"] = found.spent.decodes
            entry |= {"ledger": mine, "settings": self.settings_hash}
            if output == "all" and len(images) == len(items) * per:
                names = [f"{stem}_{k:02d}{suffix}" for k in range(per)]
                for k, name in enumerate(names):
                    _save(images[p * per + k], self.path / name, texts)
                entry["particles"] = [{"image": name, **fact} for name, fact in zip(names, facts, strict=True)]
                _save(images[p * per + chosen], self.path / entry["image"], texts)
            else:
                _save(images[p], self.path / entry["image"], texts)
            self.entries[item.id] = entry
            lines.append(entry)
        append(self.path / MANIFEST, lines)
        ledger = out.ledger
        rest = {"forwards": ledger.forwards, "padding": ledger.padding, "peak_memory": ledger.peak_memory}
        skipped = {"skipped": ledger.skipped} if ledger.skipped else {}
        append(self.path / TIMINGS, [{"ids": [i.id for i in items], "seconds": ledger.seconds, **rest, **skipped}])

    def finish(self) -> None:
        """Put the manifest in the order of the items, lines of prompts that are not asked for now last; draw the sheet."""
        asked = [item.id for item in self.items if item.id in self.entries]
        entries = [self.entries[id] for id in dict.fromkeys([*asked, *self.entries])]
        text = "".join(_line(entry) for entry in entries)
        if not (self.path / MANIFEST).is_file() or (self.path / MANIFEST).read_text(encoding="utf-8") != text:
            with replacing(self.path / MANIFEST) as part:
                part.write_text(text, encoding="utf-8")
        shown = [e for e in (self.entries[id] for id in asked[:SHOWN]) if not e["image"].endswith(".wav")]
        sheet([[self.path / e["image"] for e in shown]], [e["prompt"] for e in shown], self.path / GRID)


def generate(
    steered: SteeredPipeline,
    folder: Folder,
    *,
    seed: int,
    batch: int = 1,
    watch: Callable[[Info], None] | None = None,
    done: Callable[[int], None] | None = None,
    **call: Any,
) -> None:
    """Do what is missing in a folder, `batch` prompts at a time, and finish it.

    Args:
        watch: as in `SteeredPipeline`. done: called with the number of prompts that were just finished.
        call: the pipeline's own arguments.

    Raises:
        DiffsteerError: and everything that was finished before stays, in the folder.
    """
    from diffsteer import rng

    missing = folder.missing
    size = batch if steered.sampler is not None else 1
    for start in range(0, len(missing), size):
        items = missing[start : start + size]
        if steered.sampler is not None:
            out = steered([i.prompt for i in items], seed=seed, ids=[i.id for i in items], watch=watch, **call)
        elif items[0].id == 0:  # a single prompt is the plain pipeline with this seed, also once others have joined it
            out = steered([items[0].prompt], seed=seed, **call)
        else:
            out = steered([items[0].prompt], generator=rng.generator(seed, items[0].id), **call)
        folder.add(items, out, seed, steered.output)
        if any(found.stopped == "interrupted" for found in out.trace.searches):
            raise KeyboardInterrupt
        if done is not None:
            done(len(items))
    folder.finish()


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a manifest; a last one that a stopped run left unfinished is cut off the file."""
    if not path.is_file():
        return
    whole = cut_unfinished(path)
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            known = {"id", "prompt", "image", "settings"} <= entry.keys()
        except (ValueError, AttributeError):
            known = False
        if not known:
            raise DiffsteerError(f"{path}, line {number}: this is no line of a manifest; choose another out=")
        yield entry


def cut_unfinished(path: Path) -> bytes:
    """Cut off a last line that a stopped run left unfinished; return what stays."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with replacing(path) as part:
            part.write_bytes(whole)
    return whole


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write instead of `path`, which it replaces at once when it is whole."""
    part = path.with_name(f".{path.name}.part")
    yield part
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _save(made: Any, path: Path, texts: dict[str, str]) -> None:
    with replacing(path) as part:
        media.save(made, part, texts)


def append(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(_line(entry) for entry in entries))
        file.flush()
        os.fsync(file.fileno())


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> float | None:
    """A finite number, or None: JSON has no others."""
    value = float(value)
    return value if math.isfinite(value) else None
