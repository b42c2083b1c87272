"""Batches: where prompts come from, what one of them may ask for alone, and a run that is killed at any moment."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffsteer.batch import InARow
from diffsteer.folder import Folder, append
from diffsteer.leases import Leases
from diffsteer.prompts import OVERRIDES, Item, read_items
from diffsteer.types import DiffsteerError

THREE = ["a red star", "Two, three; circles", 'a "ring" ünder ☂']

# ------------------------------------------------------------------------------------------------------ sources


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


SOURCES = {
    "p.txt": lambda: "\r\n\n".join(THREE).encode(),
    "p.jsonl": lambda: "\n".join(json.dumps({"prompt": p}) for p in THREE).encode(),
    "p.json": lambda: json.dumps([{"prompt": p} for p in THREE], indent=1).encode(),
    "p.csv": lambda: table([["No.", "Prompts", "Category"], *([str(i), p, "Colors"] for i, p in enumerate(THREE))], ","),
    "p.tsv": lambda: table([["Prompt", "Note"], *([p, ""] for p in THREE)], "\t"),
    "p.parquet": lambda: parquet([{"caption": p} for p in THREE]),
    "p.tar": lambda: tar_of({f"a/{i}.txt": p.encode() for i, p in enumerate(THREE)} | {"a/0.png": b"no text"}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_of_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(SOURCES[name]())
    items = read_items(tmp_path / name)
    assert [i.prompt for i in items] == THREE and [i.index for i in items] == [0, 1, 2]
    assert [i.id for i in items] == (["a/0", "a/1", "a/2"] if name == "p.tar" else [0, 1, 2])
    assert all(not i.overrides for i in items)


def test_metadata_of_geneval_and_tables_keep_what_they_say(tmp_path: Path) -> None:
    line = {"tag": "counting", "include": [{"class": "star", "count": 2}], "prompt": "a photo of two stars"}
    (tmp_path / "g.jsonl").write_text(json.dumps(line))
    (item,) = read_items(tmp_path / "g.jsonl")
    assert item == Item(0, 0, "a photo of two stars", {}, {"tag": "counting", "include": line["include"]})
    (tmp_path / "d.csv").write_bytes(table([["No.", "Prompts", "Category"], ["1", "A red car.", "Colors"]], ","))
    assert read_items(tmp_path / "d.csv")[0].about == {"No.": "1", "Category": "Colors"}


def test_tabs_with_quotes_as_they_stand(tmp_path: Path) -> None:
    """As in PartiPrompts: no field is quoted, and some begin with a quote."""
    (tmp_path / "p.tsv").write_text('Prompt\tCategory\n"hi" on a sign\tText\na 5" disk\tThings\n')
    assert [i.prompt for i in read_items(tmp_path / "p.tsv")] == ['"hi" on a sign', 'a 5" disk']
    (tmp_path / "p.tsv").write_text('Prompt\tCategory\n"a\tb"\tText\n')  # quoted, since it holds a tab
    assert [i.prompt for i in read_items(tmp_path / "p.tsv")] == ["a\tb"]


OWN = {"seed": 7, "negative_prompt": "a, b", "guidance_scale": 2.5, "num_inference_steps": 3, "width": 16, "height": 8}


def test_what_is_asked_for_one_prompt_alone(tmp_path: Path) -> None:
    wanted = OWN | {"reward": {"quality": 50, "incompressible": "true"}}
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "one", "prompt": "a", **wanted}))
    flat = OWN | {"reward.quality": 50, "reward.incompressible": "true"}
    (tmp_path / "p.csv").write_bytes(
        table(
            [["id", "prompt", *flat, "more"], ["one", "a", *map(str, flat.values()), "x"], ["2", "b", *[""] * len(flat), ""]],
            ",",
        )
    )
    (tmp_path / "p.parquet").write_bytes(parquet([{"id": "one", "prompt": "a", **flat}]))
    (tmp_path / "p.tar").write_bytes(tar_of({"one.json": json.dumps({"caption": "a", **wanted}).encode()}))
    for name in ("p.jsonl", "p.csv", "p.parquet", "p.tar"):
        item = read_items(tmp_path / name)[0]
        assert (item.id, item.prompt, item.overrides) == ("one", "a", wanted), name
    plain = read_items(tmp_path / "p.csv")[1]
    assert plain == Item(1, 2, "b") and set(wanted) == set(OVERRIDES)


WRONG_FILES = {
    "none.csv": (None, "No such file"),
    "a.csv": (b"name,size\nx,1\n", "no column is called prompt, .* or text; it has name, size"),
    "b.csv": (b"prompt,seed\na,1\nb\n", "b.csv, line 3: it has not 2 fields"),
    "c.csv": (b'prompt\n"a\n', "c.csv, line 1: this is no table"),
    "d.csv": (b"prompt,seed\na,one\nb,two\n", "line 2: seed='one'; wanted a whole number .*and 1 more like it"),
    "e.csv": (b"prompt,seed\n,3\n", "its prompt is empty"),
    "f.csv": (b"", "no column is called prompt"),
    "g.csv": (b"prompt,seed\n", "there is no prompt in it"),
    "h.csv": (b"prompt\n\xff\n", "not UTF-8"),
    "a.jsonl": (b'{"prompt": "a", "width": 0}\n', "width=0; wanted a whole number, at least 1"),
    "b.jsonl": (b'{"prompt": "a", "guidance_scale": NaN}\n', "guidance_scale=nan; wanted a number"),
    "c.jsonl": (b'{"prompt": "a", "reward": 3}\n', "reward=3; wanted a mapping"),
    "d.jsonl": (b'{"prompt": "a", "seed": true}\n', "seed=True"),
    "e.jsonl": (b'{"prompt": "a"}\n{"prompt\n{}\n', "line 2: no JSON .*and 1 more like it"),
    "f.jsonl": (b"[" * 5000, "no JSON"),
    "a.json": (b'["a"]', "entry 1: wanted an object"),
    "b.json": (b'[{"prompt": "a"}', "no JSON"),
    "a.parquet": (b"nothing", "this is no Parquet file"),
    "none.parquet": (None, "No such file"),
    "a.tar": (b"nothing", "this is no tar file"),
    "none.tar": (None, "No such file"),
    "b.tar": (tar_of({"1.json": b"{", "2.txt": b"a"}), "key 1: no JSON"),
    "c.tar": (tar_of({"1.txt": b"\xff"}), "key 1: it is not UTF-8"),
    "d.tar": (tar_of({"1.png": b"x"}), "there is no prompt in it"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_are_one_line(name: str, tmp_path: Path) -> None:
    data, said = WRONG_FILES[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DiffsteerError, match=said) as error:
        read_items(tmp_path / name)
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".tar"]))
def test_any_file_is_prompts_or_one_clear_line(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    path.write_bytes(data)
    try:
        items = read_items(path)
    except DiffsteerError as error:
        assert str(error).startswith(("prompts=", str(path))) and "\n" not in str(error)
    else:
        assert items and all(isinstance(i.prompt, str) for i in items)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(min_size=1).filter(lambda t: t.strip() and "\x00" not in t and t.isprintable()), min_size=1, max_size=5)
)
def test_prompts_come_through_unchanged(tmp_path: Path, prompts: list[str]) -> None:
    (tmp_path / "p.csv").write_bytes(table([["prompt"], *([p] for p in prompts)], ","))
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    for name in ("p.csv", "p.jsonl"):
        assert [i.prompt for i in read_items(tmp_path / name)] == prompts


def test_a_hundred_thousand_lines(tmp_path: Path, generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read at once, and what is there of them found at once; nothing is asked of the model for prompts that are done."""
    count = 100_000
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": f"a star {i}", "id": f"i{i}"}) + "\n" for i in range(count))
    )
    began = time.perf_counter()
    items = read_items(tmp_path / "p.jsonl")
    assert len(items) == count and items[-1].name == "99999" and time.perf_counter() - began < 60
    from diffsteer.folder import batches

    made = [{"id": i.id, "prompt": i.prompt, "image": f"images/{i.name}.png", "settings": "s"} for i in items[:-2]]
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made))
    monkeypatch.setattr(Path, "is_file", lambda self: self.suffix == ".png" or self.exists())
    began = time.perf_counter()
    folder = Folder(tmp_path / "o", items, "s")
    assert [i.id for i in folder.missing] == ["i99998", "i99999"] and time.perf_counter() - began < 60
    assert sum(len(b) for b in batches(items, 8)) == count


# --------------------------------------------------------------------------------------------------- runs


def test_prompts_with_wishes_of_their_own(generate: Any, manifest: Any, tmp_path: Path) -> None:
    """Each is as in a run of its own in which the same is asked of all; seed, size and reward among it."""
    wishes: list[dict[str, Any]] = [
        {},
        {"seed": 5},
        {"height": 16, "width": 24},
        {"reward": {"quality": 20}},
        {"guidance_scale": 1.5},
    ]
    lines = [{"id": f"n{i}", "prompt": "a star", **wish} for i, wish in enumerate(wishes)]
    same = [[], ["seed=5"], ["call.height=16", "call.width=24"], ["reward.quality=20"], ["guidance_scale=1.5"]]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({**line, "tag": "t"}) for line in lines))
    fixed = ("deterministic=true", "batch=4")
    result = generate("prompts=p.jsonl", "out=o", *fixed)
    assert result.code == 0, result.err
    made = {e["id"]: e for e in manifest(tmp_path / "o")}
    assert [made[f"n{i}"].get("overrides", {}) for i in range(5)] == wishes and made["n0"]["about"] == {"tag": "t"}
    assert made["n1"]["seed"] == 5 and made["n0"]["seed"] == 0
    for i, options in list(enumerate(same))[1:]:
        (tmp_path / "one.jsonl").write_text(json.dumps({"id": f"n{i}", "prompt": "a star"}))
        assert generate("prompts=one.jsonl", f"out=o{i}", *fixed, *options).code == 0
        (alone,) = manifest(tmp_path / f"o{i}")
        assert alone["reward"] == made[f"n{i}"]["reward"]
        pixels = [_pixels(tmp_path / f"o{i}" / alone["image"]), _pixels(tmp_path / "o" / made[f"n{i}"]["image"])]
        assert pixels[0] == pixels[1]
    again = generate("prompts=p.jsonl", "out=o", *fixed)
    assert again.code == 0 and "5 of them were there already" in again.out
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({**line, "seed": 9}) for line in lines))
    other = generate("prompts=p.jsonl", "out=o", *fixed)
    assert other.code == 2 and "something else" in other.err


def _pixels(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.tobytes()


def test_wishes_that_cannot_be_granted_are_said_before_any_work(generate: Any, tmp_path: Path) -> None:
    for wish, said in (({"reward": {"size": 3}}, "unknown key 'reward.size'"), ({"reward": {"quality": 300}}, "quality=300")):
        (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b", **wish}))
        result = generate("prompts=p.jsonl", "out=o")
        assert result.code == 2 and said in result.err and result.err.count("\n") == 1
        assert not (tmp_path / "o" / "manifest.jsonl").exists()


def test_results_as_shards_and_as_a_table(generate: Any, manifest: Any, tmp_path: Path) -> None:
    """Each shard is what `prompts=` reads, the table is the manifest, and both are written anew when prompts are added."""
    files, parts = pytest.importorskip("pyarrow.parquet"), ("deterministic=true", "sinks=[webdataset,parquet]")
    (tmp_path / "p.txt").write_text("\n".join(THREE[:2]))
    assert generate("prompts=p.txt", "out=o", *parts).code == 0
    first = (tmp_path / "o/shards/00000.tar").read_bytes()
    (tmp_path / "p.txt").write_text("\n".join(THREE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffsteer.sinks.SAMPLES", 2)
        assert generate("prompts=p.txt", "out=o", *parts).code == 0
    shards = sorted((tmp_path / "o/shards").iterdir())
    assert [s.name for s in shards] == ["00000.tar", "00001.tar"] and shards[0].read_bytes() == first
    back = [item for shard in shards for item in read_items(shard)]
    assert [(i.prompt, i.id, i.overrides) for i in back] == [(p, n, {"seed": 0}) for n, p in enumerate(THREE)]
    assert back[0].about["made"] == manifest(tmp_path / "o")[0]
    with tarfile.open(shards[0]) as archive:
        assert archive.getnames() == ["000.png", "000.txt", "000.json", "001.png", "001.txt", "001.json"]
        taken = archive.extractfile("000.png")
        assert taken is not None and taken.read() == (tmp_path / "o/images/000.png").read_bytes()
    rows = files.read_table(tmp_path / "o/manifest.parquet").to_pylist()
    entries = manifest(tmp_path / "o")
    assert [r["prompt"] for r in rows] == THREE and [r["id"] for r in rows] == ["0", "1", "2"]
    assert [r["reward"] for r in rows] == [e["reward"] for e in entries]
    assert [r["ledger.evaluations"] for r in rows] == [e["ledger"]["evaluations"] for e in entries]
    assert all(json.loads(r["rest"])["settings"] == e["settings"] for r, e in zip(rows, entries, strict=True))
    wrong = generate("prompts=p.txt", "out=o", "sinks=[tar]")
    assert wrong.code == 2 and "sinks: 'tar' is unknown" in wrong.err and wrong.err.count("\n") == 1


def test_what_json_cannot_keep_is_kept_as_text_or_refused(generate: Any, manifest: Any, tmp_path: Path) -> None:
    import datetime

    day = datetime.datetime(2024, 1, 2)
    (tmp_path / "p.parquet").write_bytes(parquet([{"prompt": "a star", "x": float("nan"), "day": day, "raw": b"\x00\xff"}]))
    assert generate("prompts=p.parquet", "out=o").code == 0
    assert manifest(tmp_path / "o")[0]["about"] == {"x": None, "day": "2024-01-02 00:00:00", "raw": "b'\\x00\\xff'"}
    for line in ('{"prompt": "a", "negative_prompt": "\\ud800"}', '{"prompt": "a", "reward": {"quality": NaN}}'):
        (tmp_path / "p.jsonl").write_text(line)
        with pytest.raises(DiffsteerError, match="cannot be kept as JSON, in Unicode"):
            read_items(tmp_path / "p.jsonl")


def test_a_torn_line_between_two_processes_harms_nobody(tmp_path: Path) -> None:
    """One dies, or finds the disk full, within a line; the other goes on, and so does whoever comes later."""
    line = {"id": 0, "prompt": "a star 0", "image": "images/000.png", "settings": "s"}
    (tmp_path / "images").mkdir()
    for n in range(2):
        (tmp_path / f"images/00{n}.png").touch()
    one = Folder(tmp_path, rows(2), "s")
    append(tmp_path / "manifest.jsonl", [line])
    with (tmp_path / "manifest.jsonl").open("a") as file:
        file.write('{"id": 1, "prom')
    one.refresh()
    assert set(one.entries) == {0}
    append(tmp_path / "manifest.jsonl", [line | {"id": 1, "prompt": "a star 1", "image": "images/001.png"}])
    one.refresh()
    assert set(one.entries) == {0, 1} and Folder(tmp_path, rows(2), "s").missing == []


def test_what_another_process_did_after_all_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/000.png").touch()
    one = Folder(tmp_path, rows(1), "s")
    one.start()
    one.fail(rows(1)[0], ValueError("odd"))
    assert list(one.failed) == [0]
    append(tmp_path / "manifest.jsonl", [{"id": 0, "prompt": "a star 0", "image": "images/000.png", "settings": "s"}])
    one.refresh()
    assert one.failed == {} and one.missing == []


def test_a_process_that_is_broken_leaves_the_rest_to_others(tmp_path: Path) -> None:
    """It had done something before; now whatever it tries fails alike, and it stops before it has failed everything."""
    folder = Folder(tmp_path, rows(100), "s")
    row = InARow()
    row.done()
    errors = [row.hopeless(RuntimeError("device-side assert"), 100) for _ in range(30)]
    assert errors.index(True) == 24 and not InARow().hopeless(ValueError(), 100)
    mixed = InARow()
    assert not any(mixed.hopeless(kind("x"), 100) for kind in (ValueError, RuntimeError) * 20) and folder.missing


def test_status(generate: Any, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("a star\na ring\na cross\n")
    assert generate("prompts=p.txt", "out=o").code == 0
    assert command("status", "o").out.splitlines()[0] == "o: 3 of 3 prompts done"
    manifest = (tmp_path / "o/manifest.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "o/manifest.jsonl").write_text("".join(manifest[:1]) + manifest[1][:20])
    (tmp_path / "o/errors.jsonl").write_text(json.dumps({"id": 1, "prompt": "a ring", "error": "ValueError: odd"}) + "\n")
    said = command("status", "o")
    assert said.code == 1 and said.out.splitlines()[0] == "o: 1 of 3 prompts done, 1 failed, 1 to do"
    assert "a ring" in said.out and "ValueError: odd" in said.out
    other = json.loads(manifest[0]) | {"id": "other", "prompt": "a\u2028b", "image": "images/907.png"}
    (tmp_path / "o/images/907.png").touch()
    with (tmp_path / "o/manifest.jsonl").open("w", encoding="utf-8") as file:  # of prompts that are not asked for now
        file.write(manifest[0] + json.dumps(other, ensure_ascii=False) + "\n")
    assert command("status", "o").out.splitlines()[0] == "o: 1 of 3 prompts done, 1 failed, 1 to do"
    before = {f: f.read_bytes() for f in (tmp_path / "o").iterdir() if f.is_file()}
    command("status", "o")
    assert {f: f.read_bytes() for f in (tmp_path / "o").iterdir() if f.is_file()} == before  # it only looks
    for wrong, words in (("nowhere", "no folder of results"), ("p.txt", "no folder of results")):
        result = command("status", wrong)
        assert result.code == 2 and words in result.err and result.err.count("\n") == 1
    assert command("status").code == 2 and command("status", "o", "o").code == 2


# ---------------------------------------------------------------------------------------------- killed, and again

ZYGOTE = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)
import diffsteer.generate, diffsteer.samplers, diffsteer.rewards, diffusers, hydra
from diffsteer.cli import main
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for n in (0, 1, 2): os.dup2(null, n)
        os._exit(main(job["argv"]))
    began = time.monotonic()
    if job["kill"] is not None:
        time.sleep(job["kill"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(json.dumps({"killed": os.WIFSIGNALED(status), "code": None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status),
                      "seconds": time.monotonic() - began}), flush=True)
"""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Any]:
    """A process that has imported everything and forks one that runs a command, which it may kill."""
    process = subprocess.Popen([sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None

    def run(argv: list[str], kill: float | None = None) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"argv": argv, "kill": kill}) + "\n")
        process.stdin.flush()
        told: dict[str, Any] = json.loads(process.stdout.readline())
        return told

    yield run
    process.stdin.close()
    process.wait()


def asked(toy_folder: Path, tmp_path: Path, prompts: int) -> list[str]:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"a star {i}", "id": i}) + "\n" for i in range(prompts)))
    common = ["generate", f"model={toy_folder}", "reward=compressibility", "num_inference_steps=4", "sampler.particles=2"]
    return [*common, f"prompts={tmp_path / 'p.jsonl'}", "deterministic=true", "output=all"]


def same_but_for_times(folder: Path, whole: Path) -> None:
    names = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    left = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} - set(names)
    assert all(p.name.endswith(".part") or p.parts[0] == ".leases" for p in left), left
    for name in names:
        if ".hydra" not in name.parts and name.name != "timings.jsonl" and name.parts[0] != ".leases":
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def killed_and_again(zygote: Any, toy_folder: Path, tmp_path: Path, kills: int, seed: int) -> None:
    common = [*asked(toy_folder, tmp_path, 8), "batch=2"]
    whole = zygote([*common, f"out={tmp_path / 'whole'}"])
    assert whole["code"] == 0
    draws, survived, again = random.Random(seed), 0, [*common, f"out={tmp_path / 'o'}"]
    for n in range(kills):
        told = zygote(again, kill=draws.uniform(0.02, 1.0) * whole["seconds"] * (0.3 if n % 2 else 1.0))
        survived += not told["killed"]
    assert survived < kills
    assert zygote(again)["code"] == 0
    same_but_for_times(tmp_path / "o", tmp_path / "whole")
    done = [line["id"] for line in map(json.loads, (tmp_path / "o/manifest.jsonl").read_text().splitlines())]
    assert done == list(range(8))


def test_killed_at_random_moments_nothing_is_lost(zygote: Any, toy_folder: Path, tmp_path: Path) -> None:
    killed_and_again(zygote, toy_folder, tmp_path, kills=5, seed=1)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_nothing_is_lost_or_done_twice(zygote: Any, toy_folder: Path, tmp_path: Path) -> None:
    killed_and_again(zygote, toy_folder, tmp_path, kills=20, seed=2)


# --------------------------------------------------------------------------------------------- several processes


def rows(n: int) -> list[Item]:
    return [Item(i, i, f"a star {i}") for i in range(n)]


def test_leases_are_anybodys_once_their_holder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Leases(tmp_path), Leases(tmp_path)
    items = rows(4)
    assert one.claim(items[:2]) == items[:2] and other.claim(items) == items[2:]  # of one process, which lives
    assert not one.others()
    with other.renewing():
        assert one.others() and not other.others()
    assert not one.others() and one.claim(items[2:]) == items[2:]  # which gave all back
    lease = tmp_path / ".leases" / "0.json"
    dead, zombie = (subprocess.Popen([sys.executable, "-c", ""]) for _ in range(2))
    dead.wait()
    born = psutil.Process(zombie.pid).create_time()
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    elsewhere = one.me | {"host": "elsewhere", "pid": 1}  # nobody can tell: it runs out with time
    for holder, taken in (
        (one.me | {"pid": dead.pid}, False),
        (one.me | {"pid": zombie.pid, "born": born}, False),  # whose parent has not asked after it
        (one.me | {"born": 0.0}, False),  # another process has its number by now
        (elsewhere, True),
        ({"host": one.me["host"]}, False),
        ([], False),
    ):
        lease.write_text(json.dumps(holder))
        assert (Leases(tmp_path).claim(items[:1]) == []) == taken, holder
    zombie.wait()
    lease.write_text("")  # killed while it was written
    assert Leases(tmp_path).claim(items[:1]) == items[:1]
    lease.write_text(json.dumps(elsewhere))
    one.release(items[:1])
    assert lease.exists()  # it is not ours any more
    os.utime(lease, (time.time() - 1000, time.time() - 1000))
    assert Leases(tmp_path).claim(items[:1]) == items[:1]
    os.utime(lease, (time.time() - 1000, time.time() - 1000))
    assert Leases(tmp_path).claim(items[:1]) == []  # slow, and here, and alive


def test_leases_are_renewed_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsteer.leases.BEAT", 0.05)
    leases = Leases(tmp_path)
    lease = tmp_path / ".leases" / "0.json"
    with leases.renewing():
        leases.claim(rows(1))
        os.utime(lease, (0, 0))
        waited = time.monotonic()
        while lease.stat().st_mtime < 10 and time.monotonic() - waited < 20:
            time.sleep(0.02)
        assert lease.stat().st_mtime > 10
    assert not lease.exists()


def test_two_processes_share_a_folder_and_one_of_them_is_killed(toy_folder: Path, tmp_path: Path) -> None:
    """Nothing is done twice, and what the dead one had is done by the other, which did not wait for it before."""
    command = [sys.executable, "-m", "diffsteer", *asked(toy_folder, tmp_path, 12)]
    once = subprocess.run([*command, f"out={tmp_path / 'whole'}"], capture_output=True, text=True)
    assert once.returncode == 0, once.stderr
    out = tmp_path / "o"
    env = os.environ | {"WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [*command, f"out={out}"], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=PIPE, stderr=PIPE, text=True
        )
        for r in range(2)
    ]
    began = time.monotonic()
    while len(done_in(out)) < 3 and time.monotonic() - began < 300:
        time.sleep(0.02)
    ranks[1].kill()
    told, wrong = ranks[0].communicate()
    silent, _ = ranks[1].communicate()
    assert ranks[0].returncode == 0, wrong
    assert silent == "" and "12 images" in told  # one of them talks
    same_but_for_times(out, tmp_path / "whole")
    timed = [i for t in map(json.loads, (out / "timings.jsonl").read_text().splitlines()) for i in t["ids"]]
    assert sorted(timed) == list(range(12))  # each once
    left = [p.name for p in (out / ".leases").iterdir() if p.suffix == ".json"]
    assert sum(name.startswith("at-") for name in left) <= 1 and len(left) <= 2  # of the one that was killed


def done_in(folder: Path) -> list[dict[str, Any]]:
    path = folder / "manifest.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


def test_several_processes_want_a_folder(generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = generate("prompt=a star")
    assert result.code == 2 and result.err == "diffsteer: 2 processes work on one folder: give out=DIR\n"


def test_a_sweep_of_hydra_in_processes(command: Any, toy_folder: Path, tmp_path: Path, manifest: Any) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "p.txt").write_text("a star\n")
    small = [f"model={toy_folder}", "reward=compressibility", "num_inference_steps=4", "sampler.particles=2", "prompts=p.txt"]
    argv = [*small, "sampler=fk,best_of_n", "out=m", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = subprocess.run([sys.executable, "-m", "diffsteer", "generate", *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [len(manifest(tmp_path / "m" / str(job))) for job in (0, 1)] == [1, 1]
