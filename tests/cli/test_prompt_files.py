"""Where prompts come from: every kind of file, what one prompt may ask for alone, and what is wrong with a file."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prompt_files import THREE, parquet, table, tar_of

from diffsteer.folder import Folder
from diffsteer.prompts import OVERRIDES, Item, read_items
from diffsteer.types import DiffsteerError

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


def test_whole_numbers_and_ids_as_tables_keep_them(tmp_path: Path) -> None:
    """Which have no other kind of number that may be missing."""
    (tmp_path / "p.parquet").write_bytes(parquet([{"prompt": "a", "seed": 7.0}, {"prompt": "b", "seed": None}]))
    (tmp_path / "p.csv").write_text("prompt,seed\na,7.0\nb,\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "seed": 7.0, "id": null}\n{"prompt": "b"}\n')
    for name in ("p.parquet", "p.csv", "p.jsonl"):
        assert read_items(tmp_path / name) == [Item(0, 0, "a", {"seed": 7}), Item(1, 1, "b")], name


def test_a_name_with_tar_in_it_is_read_by_its_ending_and_ids_may_be_floats(tmp_path: Path) -> None:
    (tmp_path / "p.tar.jsonl").write_text('{"prompt": "a star", "id": 7.0}')
    (item,) = read_items(tmp_path / "p.tar.jsonl")
    assert item.id == 7 and type(item.id) is int


def test_a_compressed_tar_and_a_prompt_with_blanks_come_back(tmp_path: Path) -> None:
    members = {"0.txt": b" a red star\n", "0.json": json.dumps({"prompt": " a red star\n"}).encode(), "1.txt": b"a ring\n"}
    for name in ("p.tar.gz", "p.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(tar_of(members)))
        assert [i.prompt for i in read_items(tmp_path / name)] == [" a red star\n", "a ring"]


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
    "e.tar": (tar_of({f"{i}.txt": b"a" for i in range(5)})[:1024], "it is cut off"),
    "f.tar": (tar_of({f"{i}.txt": b"a" for i in range(5)})[:1100], "it is cut off"),
    "h.tar": (tar_of({"1.txt": b"a"}) + tar_of({"2.txt": b"b"}), "something follows its end"),
    "g.tar": (tar_of({"a/1.txt": b"a", "/a/1.txt": b"b"}), "1.txt is in it twice"),
    "i.csv": (b"prompt,seed,seed\na,1,2\n", "two columns are called 'seed'"),
    "g.jsonl": (b'{"prompt": "a", "guidance_scale": 1' + b"0" * 400 + b"}", "wanted a number"),
    "h.jsonl": (b'{"prompt": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}", "cannot be kept as JSON|no JSON"),
    "i.jsonl": (b'{"prompt": "a", "seed": 1.5}', "seed=1.5; wanted a whole number"),
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
    fresh = Folder(tmp_path / "fresh", items, "s")
    fresh.start()
    began = time.perf_counter()
    for k in range(200):
        (item,) = fresh.claim(1) or []
        assert item.index == k
        fresh.fail(item, ValueError("odd"))
        fresh.leases.release([item])
    assert time.perf_counter() - began < 20  # a fifth of the time that looking through all of them would take
