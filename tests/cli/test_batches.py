"""Runs over many prompts: wishes of single ones, results in other forms, what is torn or broken, and how far a folder is."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from prompt_files import THREE, parquet, rows

from diffsteer.batch import InARow
from diffsteer.files import append
from diffsteer.folder import Folder
from diffsteer.prompts import read_items
from diffsteer.status import status
from diffsteer.types import DiffsteerError


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

    def hopeless(row: InARow, error: Exception) -> bool:
        row.failed(error)
        return row.hopeless(100)

    errors = [hopeless(row, RuntimeError("device-side assert")) for _ in range(30)]
    assert errors.index(True) == 26 and not hopeless(InARow(), ValueError())  # 25, one from the middle, the last one
    mixed = InARow()
    assert not any(hopeless(mixed, kind("x")) for kind in (ValueError, RuntimeError) * 20) and folder.missing
    assert any(hopeless(mixed, RuntimeError("x")) for _ in range(5)), "what failed otherwise before excuses nobody"


def test_what_failed_is_tried_again_though_another_machine_died_at_it(tmp_path: Path) -> None:
    first = Folder(tmp_path, rows(3), "s")
    first.fail(rows(3)[0], ValueError("odd"))
    (tmp_path / ".leases/at-dead.json").write_text(json.dumps(first.leases.me | {"host": "elsewhere"}))
    again = Folder(tmp_path, rows(3), "s")
    again.start()
    assert not again.failed and again.claim(3) == [*rows(3)[1:], rows(3)[0]]


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
    stopped = json.loads(manifest[0]) | {"search": {"stopped": "interrupted"}}
    (tmp_path / "o/manifest.jsonl").write_text(json.dumps(stopped) + "\n")
    assert command("status", "o").out.splitlines()[0] == "o: 0 of 3 prompts done, 1 failed, 2 to do"
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


def test_a_manifest_that_was_put_in_order_is_read_anew(tmp_path: Path) -> None:
    """Whatever stood in it before, and though it is the same file by its number."""
    folder = Folder(tmp_path, rows(3), "s")
    (tmp_path / "images").mkdir()
    lines = []
    for item in rows(3):
        (tmp_path / "images" / f"{item.name}.png").write_bytes(b"")
        lines.append({"id": item.id, "prompt": item.prompt, "image": f"images/{item.name}.png", "settings": "s"})
    manifest = tmp_path / "manifest.jsonl"
    append(manifest, [lines[2] | {"more": "x" * 40}, lines[0]])
    folder.refresh()
    assert list(folder.entries) == [2, 0]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in (lines[0], lines[1], lines[2])))
    folder.refresh()
    assert sorted(folder.entries) == [0, 1, 2] and "more" not in folder.entries[2]
    append(manifest, [lines[1] | {"more": "y"}])
    folder.refresh()
    assert folder.entries[1]["more"] == "y"


def test_what_is_left_at_the_end_is_left_by_the_last_process(tmp_path: Path) -> None:
    one, other = (Folder(tmp_path, [], "s", sinks=["webdataset"]) for _ in range(2))
    with other.leases.renewing():
        one.finish()
        assert not (tmp_path / "shards").exists()
    other.finish()
    assert (tmp_path / "shards").exists()


def test_one_that_died_on_another_machine_keeps_nothing_from_being_left(tmp_path: Path) -> None:
    """For two minutes nobody can know that it is gone."""
    folder = Folder(tmp_path, [], "s", sinks=["webdataset"])
    (tmp_path / ".leases" / "at-x.json").write_text(json.dumps(folder.leases.me | {"host": "node17", "pid": 5}))
    folder.start()
    folder.finish()
    assert folder.leases.others() and (tmp_path / "run.json").exists() and (tmp_path / "shards").exists()


def test_processes_that_start_together_all_say_what_the_run_is(tmp_path: Path) -> None:
    one, other = (Folder(tmp_path, rows(3), "s") for _ in range(2))
    with one.leases.renewing(), other.leases.renewing():
        one.start()
        assert json.loads((tmp_path / "run.json").read_text())["prompts"] == 3
        other.start()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/000.png").touch()
    append(tmp_path / "manifest.jsonl", [{"id": 0, "prompt": "a star 0", "image": "images/000.png", "settings": "s"}])
    assert status(tmp_path) == ([f"{tmp_path}: 1 of 3 prompts done, 2 to do"], False)
    (tmp_path / "run.json").unlink()
    assert not status(tmp_path)[1] and "run.json is lost" in status(tmp_path)[0][0]


def test_what_another_process_could_not_do_is_not_tried_again_at_once(tmp_path: Path) -> None:
    one, other = (Folder(tmp_path, rows(2), "s") for _ in range(2))
    with one.leases.renewing(), other.leases.renewing():
        one.start()
        other.start()
        items = one.claim(1)
        assert items is not None
        one.fail(items[0], ValueError("odd"))  # before anything is done
        one.leases.release(items)
        assert [i.index for i in other.claim(2) or []] == [1]
