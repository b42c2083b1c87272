"""The page about a folder of results: whole by itself, everything escaped, true to the manifest; and in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.charts import curves, descent, number
from diffsteer.cli import main
from diffsteer.folder import Folder
from diffsteer.prompts import Item
from diffsteer.report import write_report
from diffsteer.rewards import ClipScore, SecondClip
from diffsteer.samplers import FeynmanKac, RandomSearch
from diffsteer.traces import read_trace
from diffsteer.types import DiffsteerError

NASTY = "\"><script>alert(1)</script><img src=x onerror=alert(2)> & 'ünder' </style></title>"
CAPTIONS = ["a red circle", "a triangle and a ring", "two blue stars"]


class Page(HTMLParser):
    """What stands on a page: tags that are closed in order, attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(v in (a.get(k.rstrip("_")) or "") for k, v in attributes.items())]


def made(path: Path, sampler: Any, prompts: list[str], hidden: str | None = None, seed: int = 0, **options: Any) -> Path:
    """A folder of results of the embedded model; `hidden` takes the place of the last prompt on disk."""
    items = [Item(i, i, hidden if hidden and i == len(prompts) - 1 else p) for i, p in enumerate(prompts)]
    folder = Folder(path, items, "s", report=len(items))
    steered = SteeredPipeline(load_pipeline("shapes"), sampler, ClipScore(), holdout=SecondClip(), looks=48, **options)
    out = steered(prompts, num_inference_steps=8, seed=seed)
    folder.add(items, out, seed, "best")
    folder.finish()
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("runs") / "one & <two>", FeynmanKac(4, events=(0.3, 0.6)), CAPTIONS, NASTY)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("runs") / "other", RandomSearch(3), CAPTIONS[:2], seed=1)


def test_it_is_one_page_with_everything_in_it_and_nothing_of_a_prompt_is_markup(run: Path) -> None:
    html = write_report([run]).read_text()
    told = Page(html)
    assert not re.search(r"https?://", html) and "onerror=alert" not in html.replace("onerror=alert(2)&gt;", "")
    assert len(told.of("script")) == 1 and all((a["src"] or "").startswith("data:") for a in told.of("img"))
    assert all(not (a.get("href") or "").startswith(("http", "//", "file")) for _, a in told.tags)
    assert NASTY in "".join(told.text) and "one & <two>" in told.text
    policy = told.of("meta", content="default-src 'none'")
    assert len(policy) == 1 and len(told.of("section", class_="prompt")) == 3
    assert {a["href"] for a in told.of("a")} == {"#" + str(a["id"]) for a in told.of("section", class_="prompt")}


def test_the_tree_is_that_of_the_run(run: Path) -> None:
    trace, looks = read_trace(run, "000")
    assert trace is not None and looks is not None
    events = trace["events"]
    assert [e["done"] for e in events] == [2, 5, 8] and looks.size == (4 * 48, 3 * 48)
    told = Page(page_of(run))
    cells = told.of("figure", class_="cell")
    assert len(cells) == 3 * 3 * 4 and len(told.of("path")) == 3 * 2 * 4 and len(told.of("details")) == 3
    line = [i % 12 for i, a in enumerate(cells[:12]) if "line" in (a["class"] or "")]
    second = events[1]["ancestors"][trace["chosen"]]
    assert line == [events[0]["ancestors"][second], 4 + second, 8 + trace["chosen"]]
    words = "".join(told.text)
    for event in events:
        assert f"after step {event['done']}, ESS {number(event['ess'])} of 4" in words
        assert all(number(r) in words for r in event["rewards"])
    final = np.asarray(looks)[2 * 48 :, trace["chosen"] * 48 : (trace["chosen"] + 1) * 48]
    with Image.open(run / "images" / "000.png") as picture:
        shown = np.asarray(picture.resize((48, 48), Image.Resampling.BOX))
    assert np.abs(final.astype(int) - shown.astype(int)).mean() < 4  # what was chosen is what was seen last


def page_of(*folders: Path) -> str:
    return write_report(list(folders), folders[0].parent / "page.html").read_text()


def test_what_it_says_is_what_the_manifest_says(run: Path) -> None:
    entries = [json.loads(line) for line in (run / "manifest.jsonl").read_text().splitlines()]
    words = "".join(Page(page_of(run)).text)
    for entry in entries:
        held = entry["held_out"]["clip2"]
        assert f"{number(held['score'])}, choice gained {number(held['gain'])}" in words and number(entry["reward"]) in words
    assert f"evaluations{sum(e['ledger']['evaluations'] for e in entries)}" in words.replace(" ", "")
    assert "held out: clip2" in words and "3 of 3 prompts done" in words


def test_two_runs_side_by_side(run: Path, other: Path) -> None:
    told = Page(page_of(run, other))
    sections = told.of("section", class_="pair")
    assert len(sections) == 3 and len(told.of("nav")) == 1
    assert len(told.of("img", class_="large")) == 5  # the third prompt is in one of them alone
    words = "".join(told.text)
    assert words.count("Search: ") == 2 and words.count("Family tree of 4 particles") == 3 and "samples scored" in words
    searched = json.loads((other / "manifest.jsonl").read_text().splitlines()[0])["search"]
    assert f"{searched['scored']} samples scored; {searched['stopped']}" in words and "Drafts and their finals" in words


def test_runs_of_one_name_are_told_apart_and_what_is_damaged_or_endless_is_no_end(tmp_path: Path, run: Path) -> None:
    folders = [tmp_path / name / "seed-0" for name in ("none-x1", "fk-x4")]
    for folder in folders:
        shutil.copytree(run, folder)
    whole = (folders[1] / "manifest.jsonl").read_text().splitlines()
    entry = json.loads(whole[0])
    (folders[1] / entry["image"]).write_bytes((folders[1] / entry["image"]).read_bytes()[:60])
    with pytest.warns(UserWarning, match=f"{entry['image']} cannot be read"):
        told = Page(page_of(*folders))
    assert "none-x1/seed-0" in told.text and "fk-x4/seed-0" in told.text and "seed-0" not in told.text
    entry["prompt"] = "long " * 20_000
    (folders[0] / "manifest.jsonl").write_text(json.dumps(entry) + "\n")
    html = write_report([folders[0]]).read_text()
    assert html.count("long " * 20_000) == 1 and html.count("long ") < 20_200  # whole as the heading of its section alone


def test_a_folder_that_somebody_else_made_runs_nothing(tmp_path: Path, run: Path) -> None:
    """Names, numbers and paths of its files are told as texts, or not at all."""
    nasty = 'x" onmouseover="alert(1).png'
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / nasty)
    entry: dict[str, Any] = {"prompt": "a", "seed": 0, "reward": 1.0, "ledger": {}, "settings": "s"}
    lines: list[dict[str, Any]] = [{"id": 0, "image": f"images/{nasty}"}, {"id": 1, "image": "../outside.png"}, {"id": 2}]
    Image.new("RGB", (8, 8)).save(tmp_path.parent / "outside.png")
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(entry | line) + "\n" for line in lines))
    (tmp_path / "trace").mkdir()
    event: dict[str, Any] = {
        "done": "<script>alert(1)</script>",
        "rewards": [1.0],
        "log_weights": [0.0],
        "ess": 1.0,
        "ancestors": [0],
    }
    told: dict[str, Any] = {"chosen": 0, "events": [event]}
    (tmp_path / "trace" / f"{Path(nasty).stem}.json").write_text(json.dumps(told))
    html = write_report([tmp_path]).read_text()
    page = Page(html)
    assert "onmouseover" not in html and "alert(1)" not in html and len(page.of("section", class_="prompt")) == 1
    (policy,) = page.of("meta", content="default-src 'none'")
    assert "script-src 'sha256-" in str(policy["content"])
    broken: list[dict[str, Any]] = [
        {"chosen": 3},
        {"events": []},
        {"events": [event | {"done": 1, "rewards": []}]},
        {"events": 3},
    ]
    for wrong in broken:
        (tmp_path / "trace" / f"{Path(nasty).stem}.json").write_text(json.dumps(told | wrong))
        assert read_trace(tmp_path, Path(nasty).stem) == (None, None)


def test_every_tile_leads_to_its_own_section(tmp_path: Path) -> None:
    entry: dict[str, Any] = {"prompt": "a", "seed": 0, "reward": 1.0, "ledger": {}, "settings": "s"}
    for name, ids in (("one", range(70)), ("other", ["x", "y"])):
        (tmp_path / name / "images").mkdir(parents=True)
        lines = [entry | {"id": i, "image": f"images/{n:03d}.png"} for n, i in enumerate(ids)]
        for n in range(len(lines)):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"images/{n:03d}.png")
        (tmp_path / name / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 2))  # twice
    told = Page(page_of(tmp_path / "other", tmp_path / "one"))
    ids = [str(a["id"]) for a in told.of("section", class_="prompt")]
    links = [a["href"] for a in told.of("a") if a.get("href")]
    assert len(ids) == len(set(ids)) == 64 and links == [f"#{i}" for i in ids] and len(told.of("a")) == 72


def test_clips_sounds_and_what_is_missing(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 8), (40 * i, 0, 0)) for i in range(3)]
    (tmp_path / "videos").mkdir()
    frames[0].save(tmp_path / "videos/000.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds/001.wav").write_bytes(b"RIFF0000WAVE")
    Image.new("RGB", (1200, 900)).save(tmp_path / "002.png")
    entry = {"prompt": "a", "seed": 0, "reward": None, "ledger": {"evaluations": 3}, "settings": "s"}
    lines = [entry | {"id": i, "image": f} for i, f in enumerate(["videos/000.gif", "sounds/001.wav", "002.png", "gone.png"])]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace/000.json").write_text("{")
    html = write_report([tmp_path]).read_text()
    told = Page(html)
    assert len(told.of("section", class_="prompt")) == 3 and len(told.of("audio")) == 1
    assert len(told.of("img", src="data:image/gif")) == 1 and len(html) < 200_000 and "none" in "".join(told.text)


def test_what_cannot_be_reported_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"prompts": 2}))
    for argv, said in (
        (["nowhere"], "nowhere is no folder of results"),
        ([str(tmp_path)], "nothing is done yet"),
        ([str(run)] * 3, "3 folders; one, or two side by side"),
        ([], "the following arguments are required: DIR"),
        ([str(run), "--wide"], "unrecognized arguments: --wide"),
    ):
        assert main(["report", *argv]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert main(["report", str(run), "-o", str(tmp_path / "p.html")]) == 0 and (tmp_path / "p.html").is_file()
    with pytest.raises(DiffsteerError, match="nothing is done yet"):
        write_report([run, tmp_path])


def test_charts_and_numbers() -> None:
    drawn = curves("A <title>", "steps", [("x & y", [(1, 2.0), (2, None), (3, 4.0)]), ("z", [(1, float("nan"))])])
    told = Page(drawn)
    assert len(told.of("circle")) == 2 and "A <title>" in told.text and "x & y: 4 at 3 steps" in told.text
    assert curves("t", "x", [("a", [(1, None)])]) == "" and "nan" not in curves("t", "x", [("a", [(1, 1.0)])])
    assert Page(descent([0, 0, 2])).of("svg", viewbox="0 0 3 1")
    assert [number(v) for v in (None, 3.0, 0.12345678, float("inf"), 1e9)] == ["none", "3", "0.1235", "none", "1e+09"]


def test_looks_are_small_pictures_of_what_the_reward_was_shown() -> None:
    pipe = load_pipeline("shapes")
    out = SteeredPipeline(pipe, FeynmanKac(2, events=(0.5,)), ClipScore(), looks=16)(
        CAPTIONS[:2], num_inference_steps=4, seed=0
    )
    assert [tuple(seen.shape) for seen in out.trace.looks] == [(2, 2, 3, 16, 16)] * 2
    last = torch.nn.functional.avg_pool2d(out.samples.flatten(0, 1), 4).view(2, 2, 3, 16, 16)
    assert (out.trace.looks[-1].float() / 255 - last).abs().max() < 1 / 200
    bare = SteeredPipeline(pipe, FeynmanKac(2, events=(0.5,)), ClipScore())(CAPTIONS[:2], num_inference_steps=4, seed=0)
    assert bare.trace.looks == () and torch.equal(bare.samples, out.samples)


# ------------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api")
    found = subprocess.run(["which", "chromium"], capture_output=True, text=True).stdout.strip()
    with sync.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=found or None, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 390], ids=["desk", "phone"])
def test_in_a_browser(browser: Any, run: Path, other: Path, tmp_path: Path, width: int) -> None:
    """No error, no request, nothing beyond the side of the screen, everything drawn, and the keys work."""
    target = write_report([run, other], tmp_path / "page.html")
    view = browser.new_page(viewport={"width": width, "height": 800})
    said, asked = [], []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(target.as_uri())
    assert said == [] and [u for u in asked if not u.startswith("data:")] == [target.as_uri()]
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    first = view.locator(".cell.line i").first
    assert first.bounding_box()["width"] > 30 and "data:image/png" in first.evaluate("e => getComputedStyle(e).backgroundImage")
    focused = "document.activeElement.id"
    view.keyboard.press("j")
    view.keyboard.press("j")
    assert view.evaluate(focused) == "p1"
    view.keyboard.press("k")
    assert view.evaluate(focused) == "p0"
    opened = view.locator("#p0 details[open]").count()
    view.keyboard.press("t")
    assert opened > 0 and view.locator("#p0 details[open]").count() == 0
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.tagName") == "SUMMARY"
    view.locator(".sheet a").nth(2).click()
    assert view.evaluate("location.hash") == "#p2"
    picture = view.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    colours = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    assert len(picture) > 20_000 and len(np.unique(colours[::17], axis=0)) > 50
    assert said == []
    view.close()


def test_the_command_prints_where_the_page_is(run: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "diffsteer", "report", str(run)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and Path(done.stdout.strip()).name == "report.html", done.stderr
