"""What ``diffsteer tune`` leaves: a record of what was measured, a report, and the best trial as a file for
``sampler=``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffsteer.files import append, finite, replacing, whole_lines
from diffsteer.prompts import Item
from diffsteer.tuning import FAILED, PLAIN, Measured, Trial, best_of
from diffsteer.types import DiffsteerError


@dataclass
class Record:
    """The file of everything that was measured, a line a case: `measured` by (trial, prompt's id, seed), `parameters` by trial.

    Raises:
        DiffsteerError: it was made with other settings, or holds lines of something else.
    """

    path: Path
    settings_hash: str
    measured: dict[tuple[int, int | str, int], Measured] = field(default_factory=dict)
    parameters: dict[int, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, text in enumerate(whole_lines(self.path), 1):
            try:
                line = json.loads(text)
                reward = math.nan if line["reward"] is None else line["reward"]
                measured = Measured(reward, line["holdout"], line["evaluations"], line["seconds"])
                key, parameters, made_with = (line["trial"], line["id"], line["seed"]), line["parameters"], line["settings"]
            except (ValueError, TypeError, KeyError) as error:
                raise DiffsteerError(f"{self.path}, line {number}: this is no line of a search; choose another out=") from error
            if made_with != self.settings_hash:
                raise DiffsteerError(f"{self.path} was made with other settings; choose another out=")
            self.measured[key], self.parameters[key[0]] = measured, parameters

    def add(self, trial: int, parameters: dict[str, float], item: Item, seed: int, measured: Measured) -> None:
        """Keep it, on disk first."""
        entry: dict[str, Any] = {"trial": trial, "parameters": parameters, "id": item.id, "prompt": item.prompt, "seed": seed}
        entry |= {"reward": finite(measured.reward), "holdout": measured.holdout, "evaluations": measured.evaluations}
        append(self.path, [entry | {"seconds": round(measured.seconds, 3), "settings": self.settings_hash}])
        self.measured[trial, item.id, seed], self.parameters[trial] = measured, parameters


def warnings_of(trials: Sequence[Trial], holdout: str | None) -> list[str]:
    """What a person should know before the best trial is used: that it wins nothing, or that it wins by what the held-out
    reward does not like.

    Args:
        trials: the plain chain, then the others. holdout: the name of the held-out reward.
    """
    plain, best, said = trials[0], best_of(trials), []
    if best is None:
        said.append("no trial was done to its end: nothing is written")
    elif not best.reward > plain.reward:
        said.append(f"no trial beat the plain chain ({_number(best.reward)} against {_number(plain.reward)})")
    elif holdout is not None and best.holdout < plain.holdout:
        fell = f"from {_number(plain.holdout)} to {_number(best.holdout)}"
        said.append(f"the steered reward rose, but the held-out {holdout} fell {fell}: gain that the pictures may not show")
    if holdout is None:
        said.append("no held-out reward looked at the results; tune.holdout= names one")
    return said


def table(trials: Sequence[Trial], reward: str, holdout: str | None) -> list[list[str]]:
    """A head, the plain chain, the best trial, in cells of text."""
    best, names = best_of(trials), _names(trials)
    shown = [("plain", trials[0])] + ([] if best is None else [(f"best (trial {best.number})", best)])
    return [_head(names, reward, holdout), *(_row(label, t, names, holdout) for label, t in shown)]


def report(trials: Sequence[Trial], title: str, facts: Sequence[str], reward: str, holdout: str | None) -> str:
    """The report, Markdown: plain and best, warnings, all trials.

    Args:
        facts: a paragraph each, below the title.
    """
    names = _names(trials)
    every = [_head(names, reward, holdout), *(_row(str(t.number), t, names, holdout) for t in trials[1:])]
    parts = [f"# {title}", *facts, _markdown(table(trials, reward, holdout))]
    parts += [f"**{text[0].upper()}{text[1:]}.**" for text in warnings_of(trials, holdout)]
    parts += ["## All trials", _markdown(every)]
    parts += [f"Trial {t.number} failed: {t.why}" for t in trials if t.state == FAILED]
    return "\n\n".join(parts) + "\n"


def write_sampler(path: Path, method: str, values: dict[str, Any], comments: Sequence[str]) -> None:
    """A file of the group ``sampler``: the method's own schema below, all its values above."""
    text = "".join(f"# {line}\n" for line in comments)
    text += f"defaults:\n  - /schema/sampler/{method}@_here_\n  - _self_\n\n"
    write(path, text + yaml.safe_dump({**values, "name": method}, sort_keys=False, allow_unicode=True))


def write(path: Path, text: str) -> None:
    """A file, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, set in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _names(trials: Sequence[Trial]) -> list[str]:
    return list(next((t.parameters for t in trials if t.number != PLAIN), {}))


def _head(names: Sequence[str], reward: str, holdout: str | None) -> list[str]:
    held = [] if holdout is None else [f"held out: {holdout}"]
    return ["trial", *names, reward, *held, "evaluations", "seconds", "prompts", "state"]


def _row(label: str, trial: Trial, names: Sequence[str], holdout: str | None) -> list[str]:
    held = [] if holdout is None else [_number(trial.holdout)]
    cost = [str(trial.evaluations), f"{trial.seconds:.1f}", str(len(trial.measured))]
    parameters = [_number(trial.parameters[name]) if name in trial.parameters else "" for name in names]
    return [label, *parameters, _number(trial.reward), *held, *cost, trial.state]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "none"
