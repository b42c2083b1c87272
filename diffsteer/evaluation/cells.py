"""What `diffsteer evaluate` runs: samplers at budgets, each a cell with a configuration of its own."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from diffsteer.config import DraftConfig, build
from diffsteer.files import replacing
from diffsteer.trial import Search
from diffsteer.types import DiffsteerError

PLAIN, NONE = "plain", "none"
DEFAULT = (NONE, "best_of_n", "fk")
KEPT = "cells.json"  # what the budgets came to


class Costs(Protocol):
    """What tells what samplers cost."""

    def cost(self, sampler: DictConfig) -> int:
        """Evaluations of all prompts under a sampler's configuration."""

    def alike(self) -> bool:
        """Does every prompt cost the plain pipeline the same?"""


@dataclass(frozen=True)
class Entry:
    """A sampler that is compared: its label, and its configuration. `settled`: it says itself what it costs, whatever the
    budget."""

    label: str
    sampler: DictConfig
    settled: bool


@dataclass(frozen=True)
class Cell:
    """An entry at a budget, in plain runs, None where it runs as it stands; `changes` are keys that make it cost so much."""

    entry: Entry
    budget: int | None
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        return self.entry.label if self.budget is None else f"{self.entry.label}-x{self.budget}"

    def config(self, base: DictConfig, seed: int, first: bool) -> DictConfig:
        """The configuration of a run with a seed; what becomes of particles on their way is kept of the first one alone."""
        config = base.copy()
        config.sampler = OmegaConf.merge(self.entry.sampler, self.changes.get("sampler", {}))
        if "evals" in self.changes:
            config.budget.evals = self.changes["evals"]
        if not isinstance(build("sampler", config.sampler), Search):  # which alone have them
            for key in config.budget:
                config.budget[key] = None
            config.draft = DraftConfig()
        if config.sampler.name == NONE:
            config.guide = {"name": NONE}
        config.seed, config.report = seed, config.report if first else 0
        return config


def entries_of(told: Any) -> list[Entry]:
    """The samplers that are compared, from a list of names or mappings, or a mapping of labels to them.

    Raises:
        DiffsteerError: no name, an unknown one, a wrong value, two of one label.
    """
    told = OmegaConf.to_container(told, resolve=True) if OmegaConf.is_config(told) else told
    told = list(DEFAULT) if told is None else [told] if isinstance(told, str) else told
    if not isinstance(told, list | dict) or not told:
        raise DiffsteerError(f"evaluate.samplers={told}; wanted names, such as [none,best_of_n,fk], or {{LABEL: NAME}}")
    pairs = list(told.items()) if isinstance(told, dict) else [(None, value) for value in told]
    found: dict[str, Entry] = {}
    for label, value in pairs:
        entry = _entry(label, value)
        if entry.label in found:
            raise DiffsteerError(f"evaluate.samplers: two are called {entry.label}: give them labels, {{one: ..., other: ...}}")
        found[entry.label] = entry
    return list(found.values())


def _entry(label: Any, value: Any) -> Entry:
    given = {"name": value} if isinstance(value, str) else value
    name = given.get("name") if isinstance(given, dict) else None
    if not isinstance(name, str):
        raise DiffsteerError(f"evaluate.samplers: {value!r} is neither a name nor a mapping such as {{name: fk, particles: 4}}")
    label = str(label) if label is not None else PLAIN if name == NONE else name
    if not re.fullmatch(r"[A-Za-z0-9][\w.+ -]*", label):
        raise DiffsteerError(f"evaluate.samplers: the label {label!r} takes letters, digits, _, -, . and +")
    if label.endswith((".csv", ".json", ".md", ".png")):
        raise DiffsteerError(f"evaluate.samplers: the label {label!r} is like a file's name, and labels name folders")
    if not re.fullmatch(r"[\w-]+", name):
        raise DiffsteerError(f"evaluate.samplers: {name!r} is no name of a sampler")
    option: DictConfig = compose("config", overrides=[f"sampler={name}"]).sampler
    rest = {key: v for key, v in given.items() if key != "name"}
    sampler = OmegaConf.create(OmegaConf.to_container(option, resolve=True))
    sampler = OmegaConf.merge(sampler, rest)
    assert isinstance(sampler, DictConfig)
    made = build("sampler", sampler)
    return Entry(label, sampler, made is None or "particles" in rest or not (isinstance(made, Search) or _has_particles(made)))


def _has_particles(sampler: Any) -> bool:
    return any(f.name == "particles" for f in dataclasses.fields(sampler))


def cells_of(
    entries: Sequence[Entry],
    budgets: Sequence[int] | None,
    bench: Costs,
    prompts: int,
    kept: Path,
    settings_hash: str,
) -> list[Cell]:
    """Every entry at every budget; one that says itself what it costs, once.

    A budget is a multiple of what the plain pipeline evaluates. A search is told so many evaluations a prompt; any other
    sampler gets as many particles as it pays for.

    Args:
        bench: tells costs. prompts: how many there are.
        kept: a file that keeps what came of it, so that going on loads nothing.

    Raises:
        DiffsteerError: a sampler that costs more with a single particle, a search where prompts do not cost the same, two
            cells of one name.
    """
    cells = _cells(entries, budgets, bench, prompts, kept, settings_hash)
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise DiffsteerError(f"evaluate.samplers: two come to be called {name}: give them other labels")
    return cells


def _cells(
    entries: Sequence[Entry], budgets: Sequence[int] | None, bench: Costs, prompts: int, kept: Path, settings_hash: str
) -> list[Cell]:
    if budgets is None or all(e.settled for e in entries):
        return [Cell(entry, None, {}) for entry in entries]
    found = _read(kept, settings_hash)
    cells = []
    plain = None
    for entry in entries:
        for budget in [None] if entry.settled else budgets:
            key = f"{entry.label} {budget}"
            if budget is None:
                found[key] = {}
            elif key not in found:
                plain = plain or bench.cost(OmegaConf.create({"name": NONE}))
                found[key] = _changes(entry, budget, plain, bench, prompts)
            cells.append(Cell(entry, budget, found[key]))
    with replacing(kept) as part:
        part.write_text(json.dumps({"settings": settings_hash, "cells": found}, indent=1))
    return cells


def _changes(entry: Entry, budget: int, plain: int, bench: Costs, prompts: int) -> dict[str, Any]:
    if isinstance(build("sampler", entry.sampler), Search):
        if not bench.alike():
            raise DiffsteerError(
                f"evaluate.budgets: prompts have steps or guidance of their own, and the search {entry.label} one budget "
                "for all: leave them out, or set evaluate.budgets=null"
            )
        return {"evals": budget * plain // prompts}

    def costs(particles: int) -> int:
        sampler = OmegaConf.merge(entry.sampler, {"particles": particles})
        assert isinstance(sampler, DictConfig)
        return bench.cost(sampler)

    one = costs(1)
    particles = budget * plain // one
    while particles > 0 and costs(particles) > budget * plain:
        particles -= 1
    if particles < 1:
        raise DiffsteerError(
            f"evaluate.budgets={budget}: {entry.label} with one particle costs {one / plain:.2g} plain runs; give a larger one"
        )
    return {"sampler": {"particles": particles}}


def _read(kept: Path, settings_hash: str) -> dict[str, Any]:
    try:
        told = json.loads(kept.read_text())
        return dict(told["cells"]) if told["settings"] == settings_hash else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
