"""A folder of results: prompts in, images and a manifest out, begun again where it stopped.

A manifest line is written after its images are on disk, so what the manifest names is there, whenever a run is stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffsteer import media
from diffsteer.holdout import DriftWarning, Selected, warn_of_drift
from diffsteer.prompts import Item
from diffsteer.sheet import sheet
from diffsteer.types import DiffsteerError, FailedError, PromptError, RewardError

if TYPE_CHECKING:
    from diffsteer.run import SteeredOutput

SHOWN = 64  # images on the sheet, the first ones
MANIFEST, TIMINGS, ERRORS, RUN, GRID = "manifest.jsonl", "timings.jsonl", "errors.jsonl", "run.json", "grid.png"
ALIKE = 3  # failures, all alike and nothing done yet, after which the rest is not tried
# Those that each prompt has of its own, however many run together.
_COUNTS = ("evaluations", "backwards", "decodes", "tiny_decodes", "reward_calls", "held_out_calls")
_RARE = ("backwards", "tiny_decodes", "held_out_calls")


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
    failed: dict[int | str, dict[str, Any]] = field(default_factory=dict)
    texts: Callable[[Item], dict[str, str]] = lambda item: {}
    video: str = "gif"
    kinds: set[str] = field(default_factory=set)  # of errors

    def __post_init__(self) -> None:
        manifest, prompts = self.path / MANIFEST, {item.id: item for item in self.items}
        names = {item.name for item in self.items}
        cut_unfinished(self.path / TIMINGS)
        whole = _whole_lines(manifest)
        for entry in whole:
            if entry["settings"] != self.settings_hash:
                raise DiffsteerError(f"{manifest} was made with other settings; choose another out=")
            item = prompts.get(entry["id"])
            name = Path(entry["image"]).stem
            same = item is not None and (item.prompt, item.name, dict(item.overrides)) == (
                entry["prompt"],
                name,
                entry.get("overrides", {}),
            )
            if item is not None and not same:
                said = f"{entry['prompt']!r} under the id {item.id!r}"
                raise DiffsteerError(f"{manifest} has {said}, and this run something else; choose another out=")
            if item is None and name in names:
                raise DiffsteerError(f"{manifest} has {entry['image']} for the id {entry['id']!r}; choose another out=")
            images = [entry["image"], *(p["image"] for p in entry.get("particles", []))]
            stopped = entry.get("search", {}).get("stopped") == "interrupted"  # before its budget was spent: it is done again
            if not stopped and all((self.path / image).is_file() for image in images):
                self.entries[entry["id"]] = entry

    def start(self) -> None:
        """A run begins: what failed before is tried again."""
        self.failed.clear()
        self.kinds.clear()
        if self.missing:
            (self.path / ERRORS).unlink(missing_ok=True)
            with replacing(self.path / RUN) as part:
                part.write_text(json.dumps({"prompts": len(self.items), "settings": self.settings_hash}))

    @property
    def missing(self) -> list[Item]:
        """The items to do."""
        return [item for item in self.items if item.id not in self.entries]

    def fail(self, item: Item, error: Exception) -> None:
        """Note that an item could not be made."""
        said = " ".join(f"{type(error).__name__}: {error}".split()) if not isinstance(error, DiffsteerError) else str(error)
        self.failed[item.id] = {"id": item.id, "prompt": item.prompt, "error": said[:2000]}
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
        _drift([self.entries[id] for id in asked])
        shown = [e for e in (self.entries[id] for id in asked[:SHOWN]) if not e["image"].endswith(".wav")]
        sheet([[self.path / e["image"] for e in shown]], [e["prompt"] for e in shown], self.path / GRID)


def generate(
    run: Callable[[Sequence[Item]], SteeredOutput],
    folder: Folder,
    *,
    seed: int,
    output: str,
    batch: int = 1,
    done: Callable[[int], None] | None = None,
) -> None:
    """Do what is missing in a folder, `batch` prompts at a time, and finish it. Prompts for which the same is asked run
    together. One that fails is noted, and the others go on; of a batch that fails, each is tried alone.

    Args:
        run: makes some items, for which the same is asked. output: as the pipeline is told.
        done: called with the number of prompts that were just finished.

    Raises:
        FailedError: some prompts failed.
        DiffsteerError: what is wrong with more than a prompt; everything that was finished before stays, in the folder.
    """
    missing = folder.missing
    folder.start()
    for items in batches(missing, batch):
        try:
            _one(run, folder, items, seed, output)
        except (DiffsteerError, OSError) as error:
            if not isinstance(error, RewardError | PromptError):
                raise  # no other prompt would fare better
            _alone(run, folder, items, seed, output, error)
        except Exception as error:
            _alone(run, folder, items, seed, output, error)
        if done is not None:
            done(len(items))
    folder.finish()
    if folder.failed:
        first = next(iter(folder.failed.values()))
        raise FailedError(
            f"{len(folder.failed)} of {len(folder.items)} prompts failed, see {ERRORS}; the first was {first['prompt']!r}: "
            f"{first['error']}"
        )


def batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Up to `size` items at a time, of those that follow each other and for which the same is asked."""
    for _, alike in itertools.groupby(items, key=lambda item: item.asked):
        group = list(alike)
        yield from (group[i : i + size] for i in range(0, len(group), size))


def _one(run: Callable[[Sequence[Item]], SteeredOutput], folder: Folder, items: list[Item], seed: int, output: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)  # the folder is looked at as a whole
        out = run(items)
    folder.add(items, out, seed, output)
    if any(found.stopped == "interrupted" for found in out.trace.searches):
        raise KeyboardInterrupt


def _alone(
    run: Callable[[Sequence[Item]], SteeredOutput],
    folder: Folder,
    items: list[Item],
    seed: int,
    output: str,
    error: Exception,
) -> None:
    """Items of a batch that failed, each by itself; those that fail again are noted.

    Raises:
        Exception: what they fail with, where nothing works at all.
    """
    for item in items:
        mine = error
        if len(items) > 1:
            try:
                _one(run, folder, [item], seed, output)
                continue
            except (DiffsteerError, OSError) as again:
                if not isinstance(again, RewardError | PromptError):
                    raise
                mine = again
            except Exception as again:
                mine = again
        folder.fail(item, mine)
        hopeless = len(folder.failed) >= min(ALIKE, len(folder.items)) and not folder.entries
        if hopeless and len({type(mine).__name__, *folder.kinds}) == 1:
            raise mine
        folder.kinds.add(type(mine).__name__)


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


def _facts(of: Selected, p: int) -> dict[str, float | None]:
    """What choosing did to a reward, for one prompt."""
    return {"gain": finite(of.gains[p]), "variance": finite(of.variances[p])}


def _drift(entries: Sequence[dict[str, Any]]) -> None:
    """Warn where, over a whole folder, choosing raised the reward and lowered one that was held out."""
    told = [e for e in entries if e.get("selected")]

    def whole(facts: Sequence[dict[str, float | None]]) -> Selected:
        rows = [[math.nan if f[key] is None else f[key] for key in ("gain", "variance")] for f in facts]
        return Selected(*torch.tensor(rows, dtype=torch.float64).unbind(1))

    names = {name for e in told for name in e["held_out"]}
    held = {n: whole([e["held_out"][n] for e in told if n in e["held_out"]]) for n in sorted(names)}
    if told:
        warn_of_drift(whole([e["selected"] for e in told]), held)


def finite(value: Any) -> float | None:
    """A finite number, or None: JSON has no others."""
    value = float(value)
    return value if math.isfinite(value) else None
