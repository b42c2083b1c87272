"""A folder of results: pictures and a manifest, begun again where it stopped, and shared by processes.

A manifest line is written after its images are on disk, so what the manifest names is there, whenever a run is stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffsteer import media
from diffsteer.files import append, as_line, cut_unfinished, finite, replacing
from diffsteer.holdout import Selected, warn_of_drift
from diffsteer.leases import Leases
from diffsteer.prompts import Item
from diffsteer.sheet import sheet
from diffsteer.sinks import SINKS
from diffsteer.traces import write_trace
from diffsteer.types import DiffsteerError

if TYPE_CHECKING:
    from diffsteer.run import SteeredOutput

SHOWN = 64  # images on the sheet, the first ones
MANIFEST, TIMINGS, ERRORS, RUN, GRID = "manifest.jsonl", "timings.jsonl", "errors.jsonl", "run.json", "grid.png"
# Those that each prompt has of its own, however many run together.
TAIL = 512  # bytes by which what was read is known again
_COUNTS = ("evaluations", "backwards", "decodes", "tiny_decodes", "reward_calls", "held_out_calls")
_RARE = ("backwards", "tiny_decodes", "held_out_calls")


@dataclass
class Folder:
    """The folder of one run: `entries` are the manifest's lines by id, those whose images are gone left out;
    `texts` are written into the metadata of an item's pictures; `video` is the format of videos; of the first `report` prompts
    the events are kept, too; `sinks` (`diffsteer.sinks`) are written at the end.

    Raises:
        DiffsteerError: it holds results of other settings or other prompts, which would be lost.
    """

    path: Path
    items: list[Item]
    settings_hash: str
    entries: dict[int | str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[int | str, dict[str, Any]] = field(default_factory=dict)
    texts: Callable[[Item], dict[str, str]] = lambda item: {}
    video: str = "gif"
    report: int = 0
    sinks: Sequence[str] = ()
    timings: list[dict[str, Any]] = field(default_factory=list)  # of this process

    def __post_init__(self) -> None:
        self.leases = Leases(self.path)
        self._prompts = {item.id: item for item in self.items}
        self._left = dict(self._prompts)  # neither done nor failed; what failed before this run comes last
        self._names = {item.name for item in self.items}
        self._marked: float | None = None  # when what came before was written
        self._read = (0, b"")  # how much of the manifest was read, and how that ended
        self._told = 0  # bytes of what failed that were read
        with self.leases.lock:
            cut_unfinished(self.path / TIMINGS)
            cut_unfinished(self.path / MANIFEST)
            self.refresh()

    def refresh(self) -> None:
        """Take in what this or another process has written since. The lock is held."""
        manifest, errors = self.path / MANIFEST, self.path / ERRORS
        if manifest.is_file():
            with manifest.open("rb") as file:
                start, ended = self._read
                file.seek(max(0, start - len(ended)))
                if file.read(len(ended)) != ended:  # it was put in order since
                    start = 0
                file.seek(start)
                whole = file.read().rpartition(b"\n")[0]
                for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
                    self._take(_entry(line, manifest, number))
                if whole:
                    self._read = start + len(whole) + 1, whole[-TAIL:] + b"\n"
        size = errors.stat().st_size if errors.is_file() else 0
        if size != self._told:
            self._told = size
            for text in errors.read_text(encoding="utf-8").split("\n") if size else ():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    told = json.loads(text)
                    if told["id"] not in self.entries:
                        self._lost(told)

    def _lost(self, told: dict[str, Any]) -> None:
        self.failed[told["id"]] = told
        self._left.pop(told["id"], None)

    def _take(self, entry: dict[str, Any]) -> None:
        manifest = self.path / MANIFEST
        if entry["settings"] != self.settings_hash:
            raise DiffsteerError(f"{manifest} was made with other settings; choose another out=")
        item, name = self._prompts.get(entry["id"]), Path(entry["image"]).stem
        told = (entry["prompt"], name, entry.get("overrides", {}))
        if item is not None and (item.prompt, item.name, dict(item.overrides)) != told:
            said = f"{entry['prompt']!r} under the id {item.id!r}"
            raise DiffsteerError(f"{manifest} has {said}, and this run something else; choose another out=")
        if item is None and name in self._names:
            raise DiffsteerError(f"{manifest} has {entry['image']} for the id {entry['id']!r}; choose another out=")
        images = [entry["image"], *(p["image"] for p in entry.get("particles", []))]
        if not was_interrupted(entry) and all((self.path / image).is_file() for image in images):
            self.entries[entry["id"]] = entry
            self.failed.pop(entry["id"], None)
            self._left.pop(entry["id"], None)

    def start(self) -> None:
        """A run begins: what failed before is tried again, after all else, unless others are at work on it here."""
        self._marked = time.perf_counter()
        with self.leases.lock:
            self._about()
            if self.missing and not self.leases.others(here=True):
                self._left |= {id: self._prompts[id] for id in self.failed if id in self._prompts}
                self.failed.clear()
                (self.path / ERRORS).unlink(missing_ok=True)
                self._told = 0

    def _about(self) -> None:
        about = json.dumps({"prompts": len(self.items), "settings": self.settings_hash})
        if not (self.path / RUN).is_file() or (self.path / RUN).read_text() != about:
            with replacing(self.path / RUN) as part:
                part.write_text(about)

    def claim(self, size: int, at: float = 0.0) -> list[Item] | None:
        """The next items to do, ours from here: up to `size`, for which the same is asked. None where others have all that is
        left; [] where nothing is.

        Args:
            at: which are the next ones: from this share of what is left on.
        """
        with self.leases.lock:
            self.refresh()
            skipped = min(int(at * len(self._left)), max(len(self._left) - 1, 0))
            for start, stop in ((skipped, None), (0, skipped)):
                for items in batches(itertools.islice(self._left.values(), start, stop), size):
                    mine = self.leases.claim(items)
                    if mine:
                        return mine
            return None if self._left else []

    @property
    def missing(self) -> list[Item]:
        """The items to do."""
        return [item for item in self.items if item.id not in self.entries]

    def fail(self, item: Item, error: Exception) -> None:
        """Note that an item could not be made."""
        said = " ".join(f"{type(error).__name__}: {error}".split()) if not isinstance(error, DiffsteerError) else str(error)
        with self.leases.lock:
            self._lost({"id": item.id, "prompt": item.prompt, "error": said[:2000]})
            append(self.path / ERRORS, [self.failed[item.id]])

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
                "seed": item.overrides.get("seed", seed),
                "image": stem + suffix,
                **facts[chosen],
            }
            entry |= {key: dict(told) for key, told in (("overrides", item.overrides), ("about", item.about)) if told}
            exponent = finite(out.trace.events[-1].exponent[p]) if out.trace.events else None
            entry |= {"log_z": finite(out.log_z[p]), "exponent": exponent}
            if out.held_out:
                entry["held_out"] = {
                    name: {"score": finite(held.scores[p, chosen]), **_facts(held.selected, p)}
                    for name, held in out.held_out.items()
                }
                if out.selected is not None:
                    entry["selected"] = _facts(out.selected, p)
            mine = counts
            if per > 1:
                entry["diversity"] = diversities[p]._asdict()
            if out.trace.searches:  # each prompt its own
                found = out.trace.searches[p]
                entry["search"] = found.facts()
                mine = counts | {"evaluations": found.spent.evals, "reward_calls": found.spent.reward_calls}
                mine |= {"backwards": found.spent.backwards} if counted["backwards"] else {}
                if out.held_out:
                    mine["held_out_calls"] = len(found.outcomes) * len(out.held_out)
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
            if item.index < self.report:
                write_trace(self.path, item.name, out, p)
            lines.append(entry)
        ledger = out.ledger
        rest = {"forwards": ledger.forwards, "padding": ledger.padding, "peak_memory": ledger.peak_memory}
        skipped = {"skipped": ledger.skipped} if ledger.skipped else {}
        since, self._marked = self._marked, time.perf_counter()
        wall = {"wall": self._marked - since} if since is not None else {}
        clocks = {"searches": [found.clock for found in out.trace.searches]} if out.trace.searches else {}
        timing = {"ids": [i.id for i in items], "seconds": ledger.seconds, **wall, **rest, **skipped, **clocks}
        self.timings.append(timing)
        with self.leases.lock:
            append(self.path / MANIFEST, lines)
            append(self.path / TIMINGS, [timing])
            for entry in lines:
                self.entries[entry["id"]] = entry
                self._left.pop(entry["id"], None)

    def finish(self) -> None:
        """Put the manifest in the order of the items, lines of prompts that are not asked for now last; draw the sheet."""
        with self.leases.lock:
            self.refresh()
            self._about()
            self._finish()

    def _finish(self) -> None:
        asked = [item.id for item in self.items if item.id in self.entries]
        entries = [self.entries[id] for id in dict.fromkeys([*asked, *self.entries])]
        text = "".join(as_line(entry) for entry in entries)
        if not (self.path / MANIFEST).is_file() or (self.path / MANIFEST).read_text(encoding="utf-8") != text:
            with replacing(self.path / MANIFEST) as part:
                part.write_text(text, encoding="utf-8")
        if not self.leases.others(here=True):  # the last one to finish on this machine: of others nobody can be sure
            for name in self.sinks:
                SINKS[name](self.path, [self.entries[id] for id in asked])
            _drift([self.entries[id] for id in asked])
        shown = [e for e in (self.entries[id] for id in asked[:SHOWN]) if not e["image"].endswith(".wav")]
        sheet([[self.path / e["image"] for e in shown]], [e["prompt"] for e in shown], self.path / GRID)


def was_interrupted(entry: Mapping[str, Any]) -> bool:
    """Is it of a search that Ctrl-C ended before its budget was spent? It is done again."""
    return bool(entry.get("search", {}).get("stopped") == "interrupted")


def paced(timings: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Prompts a second, and the share of the time outside the denoiser, over the calls that were timed; None without any.
    Time is that from one call's end to the next one's: what is done beside the denoising costs none."""
    total = sum(t.get("wall", t["seconds"].get("total", 0.0)) for t in timings)
    if total <= 0:
        return None
    inside = sum(t["seconds"].get("denoiser", 0.0) for t in timings)
    return sum(len(t["ids"]) for t in timings) / total, max(0.0, 1 - inside / total)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Up to `size` items at a time, of those that follow each other and for which the same is asked."""
    for _, alike in itertools.groupby(items, key=lambda item: item.asked):
        while group := list(itertools.islice(alike, size)):
            yield group


def _entry(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """A line of a manifest."""
    try:
        entry: dict[str, Any] = json.loads(line)
        known = {"id", "prompt", "image", "settings"} <= entry.keys()
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise DiffsteerError(f"{path}, line {number}: this is no line of a manifest; choose another out=")
    return entry


def _save(made: Any, path: Path, texts: dict[str, str]) -> None:
    with replacing(path) as part:
        media.save(made, part, texts)


def _facts(of: Selected, p: int) -> dict[str, float | None]:
    """What choosing did to a reward, for one prompt."""
    return {"gain": finite(of.gains[p]), "variance": finite(of.variances[p])}


def _drift(entries: Sequence[dict[str, Any]]) -> None:
    """Warn where, over a whole folder, choosing raised the reward and lowered one that was held out."""
    told = [e for e in entries if e.get("selected")]

    def whole(facts: Sequence[dict[str, float | None]]) -> Selected:
        rows = [[f[key] or 0.0 for key in ("gain", "variance")] for f in facts]
        return Selected(*torch.tensor(rows, dtype=torch.float64).unbind(1))

    names = {name for e in told for name in e["held_out"]}
    held = {n: whole([e["held_out"][n] for e in told if n in e["held_out"]]) for n in sorted(names)}
    if told:
        warn_of_drift(whole([e["selected"] for e in told]), held)
