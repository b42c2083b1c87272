"""``diffsteer report DIR``: one page about a folder of results, with everything in it; or about two, side by side."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from diffsteer import __version__
from diffsteer.charts import curves, descent, number
from diffsteer.files import replacing
from diffsteer.folder import MANIFEST
from diffsteer.sheet import frame_or_blank
from diffsteer.status import COMPARISON, is_inside, lines_of, status
from diffsteer.traces import read_trace
from diffsteer.types import DiffsteerError

PAGE = "report.html"
DETAILED, ON_SHEET = 64, 400  # prompts with a section of their own; on the contact sheet
LARGE, THUMB = 512, 128  # pixels a side, at most, of pictures on the page
CELLS = 256  # small pictures of a family tree, at most
NEEDED = ("id", "prompt", "image", "seed", "reward", "ledger")  # of a line
TOLD = 300  # letters of a prompt on the sheet
WHOLE = 2_000_000  # bytes up to which a clip or a sound is put in as it is
STYLE, SCRIPT = (Path(__file__).parent / "page" / name for name in ("report.css", "report.js"))


class Run:
    """What a folder of results says.

    Raises:
        DiffsteerError: it is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.lines, self.done = status(folder)
        self.by_id = {e["id"]: e for e in lines_of(self.path / MANIFEST, *NEEDED) if is_inside(self.path, e["image"])}
        self.entries = list(self.by_id.values())
        self.config = _config(self.path / ".hydra" / "config.yaml")
        self.name = self.path.resolve().name  # longer where another one is called so, too

    def facts(self) -> list[tuple[str, str]]:
        """Of the whole run, for a table."""
        told = [(key, _said(self.config.get(key))) for key in ("model", "sampler", "reward", "seed", "num_inference_steps")]
        told += [("prompts", self.lines[0].partition(": ")[2])]
        rewards = [e["reward"] for e in self.entries if e["reward"] is not None]
        told += [("reward, mean", number(sum(rewards) / len(rewards)))] if rewards else []
        for name in sorted({n for e in self.entries for n in e.get("held_out", {})}):
            each = [e["held_out"][name] for e in self.entries if name in e.get("held_out", {})]
            told.append((f"held out: {name}", f"{_mean(each, 'score')}, choice gained {_mean(each, 'gain')}"))
        for key in sorted({k for e in self.entries for k in e["ledger"]}):
            told.append((key.replace("_", " "), str(sum(e["ledger"].get(key, 0) for e in self.entries))))
        return told + [("pace", line) for line in self.lines[1:2] if not line.startswith("failed")]


def write_report(folders: Sequence[str | Path], target: Path | None = None) -> Path:
    """Write the page and return where it is: in the (first) folder, or at `target`.

    Args:
        folders: one folder of results, or two, whose prompts of the same id are put side by side.

    Raises:
        DiffsteerError: a folder without results.
    """
    runs = [Run(folder) for folder in folders]
    ways = [run.path.resolve().parts for run in runs]
    far = next((n for n in range(1, max(map(len, ways))) if len({way[-n:] for way in ways}) == len(ways)), 1)
    for run, way in zip(runs, ways, strict=True):
        run.name = "/".join(way[-far:])
    for run in runs:
        if (run.path / COMPARISON).is_file():
            raise DiffsteerError(f"{run.path} is a comparison: give one or two of its folders, such as {_first_in(run.path)}")
        if not run.entries:
            raise DiffsteerError(f"{run.path}: nothing is done yet, so there is nothing to report")
    target = runs[0].path / PAGE if target is None else target
    with replacing(target) as part:
        part.write_text(page(runs), encoding="utf-8")
    return target


def _first_in(path: Path) -> str:
    return str(path / next(iter(lines_of(path / COMPARISON, "folders")))["folders"][0])


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    title = " and ".join(run.name for run in runs)
    shown = list(dict.fromkeys(id for run in runs for id in run.by_id))
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # nothing else may run
    secure = f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{secure}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE.read_text()}</style></head><body>'
    )
    top = f"<header><h1>{escape(title)}</h1><p>{escape(' and '.join(r.lines[0] for r in runs))}</p>{_facts(runs)}</header>"
    tiles = "".join(_tile(runs, id, n) for n, id in enumerate(shown[:ON_SHEET]))
    sheet = f'<nav class="sheet" aria-label="all pictures">{tiles}</nav>'
    over = f"<p>The first {ON_SHEET} of {len(shown)}.</p>" if len(shown) > ON_SHEET else ""
    sections = "".join(_section(runs, id, n) for n, id in enumerate(shown[:DETAILED]))
    more = f"<p>Prompts from the {DETAILED + 1}th on are in the manifest alone.</p>" if len(shown) > DETAILED else ""
    failed = "".join(f"<li>{escape(line)}</li>" for run in runs for line in run.lines if line.startswith("failed"))
    wrong = f"<section><h2>Failed</h2><ul>{failed}</ul></section>" if failed else ""
    keys = "Keys: j and k, or n and p, go from prompt to prompt; t opens and closes its tree."
    foot = f"<footer>diffsteer {__version__}. {keys}</footer>"
    body = f"{top}<main>{wrong}{sheet}{over}{sections}{more}</main>{foot}"
    return f"{head}{body}<script>{script}</script></body></html>\n"


def _facts(runs: Sequence[Run]) -> str:
    told = [dict(run.facts()) for run in runs]
    names = list(dict.fromkeys(name for facts in told for name in facts))
    heads = "".join(f"<th scope='col'>{escape(run.name)}</th>" for run in runs) if len(runs) > 1 else ""
    rows = ""
    for name in names:
        cells = "".join(f"<td>{escape(facts.get(name, ''))}</td>" for facts in told)
        rows += f"<tr><th scope='row'>{escape(name)}</th>{cells}</tr>"
    top = f"<tr><td></td>{heads}</tr>" if heads else ""
    return f"<table>{top}{rows}</table>"


def _tile(runs: Sequence[Run], id: Any, n: int) -> str:
    entries = [(run, run.by_id[id]) for run in runs if id in run.by_id]
    pictures = "".join(f'<img alt="" src="{_picture(run.path / e["image"], THUMB)}">' for run, e in entries)
    rewards = ", ".join(number(e["reward"]) for _, e in entries)
    prompt = escape(shorten(str(entries[0][1]["prompt"]), TOLD))
    link = f' href="#p{n}"' if n < DETAILED else ""
    return f"<a{link}>{pictures}<span>{prompt}</span><small>{rewards}</small></a>"


def _section(runs: Sequence[Run], id: Any, n: int) -> str:
    entries = [(run, run.by_id[id]) for run in runs if id in run.by_id]
    first = entries[0][1]
    halves = "".join(_half(run, e, f"s{n}x{k}", len(runs) > 1) for k, (run, e) in enumerate(entries))
    about = f"<p class='id'>{escape(str(first['id']))}</p>"
    kind = "pair" if len(runs) > 1 else "one"
    return (
        f'<section class="prompt {kind}" id="p{n}" tabindex="-1"><h2>{escape(str(first["prompt"]))}</h2>{about}'
        f'<div class="halves">{halves}</div></section>'
    )


def _half(run: Run, entry: dict[str, Any], sprite: str, named: bool) -> str:
    facts = [("reward", number(entry["reward"])), ("seed", str(entry["seed"]))]
    facts += [
        (f"held out: {name}", f"{number(held['score'])}, choice gained {number(held['gain'])}")
        for name, held in entry.get("held_out", {}).items()
    ]
    facts += [(key, _said(entry[key])) for key in ("overrides", "about") if key in entry]
    facts += [(key.replace("_", " "), str(value)) for key, value in entry["ledger"].items() if value]
    rows = "".join(f"<tr><th scope='row'>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts)
    head = f"<h3>{escape(run.name)}</h3>" if named else ""
    shown = f'<div class="shown">{_media(run.path / entry["image"], str(entry["prompt"]))}<table>{rows}</table></div>'
    trace, looks = read_trace(run.path, Path(entry["image"]).stem)
    if trace is not None and len(trace["events"]) * len(trace["events"][0]["rewards"]) > CELLS:
        looks = None  # or the page would be too large
    tree = _tree(trace, looks, sprite) if trace is not None else ""
    search = _history(entry["search"]) if "search" in entry else ""
    return f"<div>{head}{shown}{tree}{search}</div>"


def _tree(trace: dict[str, Any], looks: Any, sprite: str) -> str:
    """Events from above to below: what each particle was becoming, and who descends from whom."""
    events, k = trace["events"], len(trace["events"][0]["rewards"])
    style = f"<style>.{sprite}{{background-image:url({_data(looks, 'PNG')})}}</style>" if looks is not None else ""
    alive = _alive(events, trace["chosen"])
    rows = []
    for n, event in enumerate(events):
        weights = [math.exp(w) if w is not None else 0.0 for w in event["log_weights"]]
        cells = "".join(
            _cell(event["rewards"][c], weights[c], sprite if looks is not None else "", (c, k, n, len(events)), c in alive[n])
            for c in range(k)
        )
        ess = f"ESS {number(event['ess'])} of {k}"
        rows.append(
            f'<div class="event"><p>after step {number(event["done"])}, {ess}</p><div class="cells">{cells}</div></div>'
        )
        if n + 1 < len(events):
            rows.append(descent(event["ancestors"]))
    done = [e["done"] for e in events]
    known = [[r for r in e["rewards"] if r is not None] for e in events]
    best = [(d, max(r) if r else None) for d, r in zip(done, known, strict=True)]
    mean = [(d, sum(r) / len(r) if r else None) for d, r in zip(done, known, strict=True)]
    drawn = curves("Reward", "steps", [("best", best), ("mean", mean)]) if len(events) > 1 else ""
    drawn += (
        curves("Effective sample size", "steps", [("ESS", [(e["done"], e["ess"]) for e in events])], (1, k))
        if k > 1 < len(events)
        else ""
    )
    words = f"Family tree of {k} particles" if k > 1 else "What it was becoming"
    wide, tall = trace.get("look", (1, 1))
    tree = f'<div class="tree" style="--k:{k};--shape:{int(wide)}/{int(tall)}">{"".join(rows)}</div>'
    return f"{style}<details open><summary>{words}</summary>{tree}<div class='charts'>{drawn}</div></details>"


def _alive(events: Sequence[dict[str, Any]], chosen: int) -> list[set[int]]:
    """At each event, who the chosen particle descends from."""
    line = [chosen]
    for event in reversed(events[:-1]):
        line.append(event["ancestors"][line[-1]])
    return [{c} for c in reversed(line)]


def _cell(reward: float | None, weight: float, sprite: str, place: tuple[int, int, int, int], alive: bool) -> str:
    c, k, n, rows = place
    at = f"{100 * c / max(1, k - 1):.4g}% {100 * n / max(1, rows - 1):.4g}%"
    picture = (
        f'<i class="{sprite}" style="background-size:{100 * k}% {100 * rows}%;background-position:{at}"></i>' if sprite else ""
    )
    told = f"particle {c + 1}: reward {number(reward)}, weight {number(weight)}"
    mark = " line" if alive else ""
    share = f"<small>{min(1.0, weight):.0%}</small>" if k > 1 else ""
    return (
        f'<figure class="cell{mark}" role="img" aria-label="{escape(told)}" title="{escape(told)}">{picture}'
        f'<b style="width:{100 * min(1.0, weight):.3g}%"></b><figcaption>{number(reward)}{share}</figcaption></figure>'
    )


def _history(search: dict[str, Any]) -> str:
    told = [(float(point[0]), point[-1]) for point in search.get("history", [])]
    drawn = curves("Best reward so far", "evaluations", [("best", told)]) if len(told) > 1 else ""
    gap = search.get("gap")
    finals = (
        curves("Drafts and their finals", "best draft first", [(n, list(enumerate(gap[n], 1))) for n in ("drafts", "finals")])
        if gap and len(gap["drafts"]) > 1
        else ""
    )
    said = f"{search.get('scored', 0)} samples scored; {search.get('stopped', '')}"
    return f"<details open><summary>Search: {escape(said)}</summary><div class='charts'>{drawn}{finals}</div></details>"


def _media(path: Path, alt: str) -> str:
    if path.suffix == ".wav":
        if path.stat().st_size > WHOLE:
            return f"<p>{escape(path.name)}</p>"
        return f'<audio controls src="data:audio/wav;base64,{base64.b64encode(path.read_bytes()).decode()}"></audio>'
    if path.suffix == ".gif" and path.stat().st_size <= WHOLE:
        source = f"data:image/gif;base64,{base64.b64encode(path.read_bytes()).decode()}"
    else:
        source = _picture(path, LARGE)
    return f'<img class="large" alt="{escape(shorten(alt, TOLD))}" src="{source}">'


def _picture(path: Path, side: int) -> str:
    """A picture, or the first frame of a clip, as a data URI no larger than it will be shown."""
    if path.suffix == ".wav":
        return "data:,"
    picture = frame_or_blank(path)
    small = max(picture.size) <= side
    if not small:
        picture.thumbnail((side, side))
    return _data(picture, "PNG" if small else "JPEG")


def _data(picture: Any, format: str) -> str:
    file = io.BytesIO()
    picture.save(file, format=format, **({"quality": 85} if format == "JPEG" else {"optimize": True}))
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def shorten(text: str, most: int) -> str:
    """No more than so many letters."""
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def _config(path: Path) -> dict[str, Any]:
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return told if isinstance(told, dict) else {}


def _said(value: Any) -> str:
    """A value of a configuration in a few words: a group by its name, and what is set in it."""
    if isinstance(value, dict):
        rest = {k: v for k, v in value.items() if k != "name" and v not in (None, {}, [])}
        inner = ", ".join(f"{k}={_said(v)}" for k, v in rest.items())
        return f"{value['name']} ({inner})" if "name" in value and inner else str(value.get("name", inner))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else "" if value is None else str(value)


def _mean(facts: Sequence[dict[str, Any]], key: str) -> str:
    known = [f[key] for f in facts if f[key] is not None]
    return number(sum(known) / len(known)) if known else "none"
