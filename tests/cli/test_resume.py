"""A run that stopped goes on where it stopped, loses nothing, and with `deterministic=true` ends in the same bytes."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffsteer import media
from diffsteer.fingerprint import fingerprint, fingerprints
from diffsteer.rewards import Compressibility

PROMPTS = "a red star\na ring, a star\n  two (circles)\n"


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "p.txt").write_text(PROMPTS)
    return "prompts=p.txt"


@pytest.fixture
def fail_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, BaseException], None]:
    """Make the reward raise for one prompt."""
    score = Compressibility.score

    def fail(prompt: str, error: BaseException) -> None:
        def raising(self: Any, samples: Any, prompts: Any, ctx: Any) -> Any:
            if prompt in prompts:
                raise error
            return score(self, samples, prompts, ctx)

        monkeypatch.setattr(Compressibility, "score", raising)

    return fail


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file that must not differ from run to run."""
    names = ["manifest.jsonl", "grid.png", *(f"images/{p.name}" for p in sorted((folder / "images").iterdir()))]
    return {name: (folder / name).read_bytes() for name in names}


def test_a_stopped_run_goes_on(
    generate: Any, manifest: Any, prompts: str, fail_on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = (prompts, "deterministic=true")
    with monkeypatch.context():
        fail_on("a ring, a star", KeyboardInterrupt())
        stopped = generate(*fixed, "out=o")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert stopped.code == 130 and stopped.err.count("\n") == 1 and "out=o" in stopped.err
    assert [e["prompt"] for e in manifest(tmp_path / "o")] == ["a red star"]
    made = (tmp_path / "o/images/000.png").stat().st_mtime_ns
    resumed = generate(*fixed, "out=o")
    assert resumed.code == 0 and resumed.out.startswith("2 prompts") and "1 of them were there already" in resumed.out
    assert (tmp_path / "o/images/000.png").stat().st_mtime_ns == made
    assert generate(*fixed, "out=whole", "batch=3").code == 0
    assert bytes_of(tmp_path / "o") == bytes_of(tmp_path / "whole")
    assert [e["prompt"] for e in manifest(tmp_path / "o")] == PROMPTS.splitlines()


def test_a_prompt_that_fails_is_noted_and_the_others_go_on(
    generate: Any, manifest: Any, prompts: str, fail_on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = (prompts, "deterministic=true")
    for batch in (1, 3):
        out = tmp_path / f"o{batch}"
        with monkeypatch.context():
            fail_on("a ring, a star", ValueError("odd"))
            failed = generate(*fixed, f"out=o{batch}", f"batch={batch}")
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        said = "1 of 3 prompts failed, see errors.jsonl; the first was 'a ring, a star': the reward compressibility raised"
        assert failed.code == 1 and failed.err.count("\n") == 1 and said in failed.err and f"out=o{batch}" in failed.err
        assert [e["prompt"] for e in manifest(out)] == ["a red star", "  two (circles)"]
        (line,) = map(json.loads, (out / "errors.jsonl").read_text().splitlines())
        assert line["id"] == 1 and line["prompt"] == "a ring, a star" and "odd" in line["error"]
        assert generate(*fixed, f"out=o{batch}").code == 0 and not (out / "errors.jsonl").exists()
    assert generate(*fixed, "out=whole").code == 0
    assert bytes_of(tmp_path / "o1") == bytes_of(tmp_path / "o3") == bytes_of(tmp_path / "whole")


def test_where_nothing_works_the_rest_is_not_tried(generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def score(self: Any, samples: Any, prompts: Any, ctx: Any) -> Any:
        calls.append(prompts)
        raise ValueError("broken")

    (tmp_path / "many.txt").write_text("".join(f"a star {i}\n" for i in range(20)))
    monkeypatch.setattr(Compressibility, "score", score)
    result = generate("prompts=many.txt", "out=o")
    assert result.code == 1 and "raised ValueError" in result.err and result.err.count("\n") == 1
    tried = list(dict.fromkeys(p for prompts in calls for p in prompts))
    assert tried == [f"a star {i}" for i in (0, 1, 2, 11, 19)]  # three, one from the middle of what was left, the last one
    assert len((tmp_path / "o/errors.jsonl").read_text().splitlines()) == 5
    calls.clear()
    assert generate("prompts=many.txt", "out=o").code == 1
    assert list(dict.fromkeys(p for prompts in calls for p in prompts))[:3] == ["a star 3", "a star 4", "a star 5"]


@pytest.mark.parametrize("batch", [1, 5, 8])
def test_a_few_wrong_prompts_in_a_row_stop_nobody(
    generate: Any, manifest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    score = Compressibility.score

    def some(self: Any, samples: Any, prompts: Any, ctx: Any) -> Any:
        if any("odd" in p for p in prompts):
            raise ValueError("broken")
        return score(self, samples, prompts, ctx)

    (tmp_path / "many.txt").write_text("".join(f"an odd star {i}\n" for i in range(7)) + "a star\na ring\na cross\n")
    monkeypatch.setattr(Compressibility, "score", some)
    result = generate("prompts=many.txt", "out=o", f"batch={batch}")
    assert result.code == 1 and "7 of 10 prompts failed" in result.err
    assert [e["prompt"] for e in manifest(tmp_path / "o")] == ["a star", "a ring", "a cross"]


def test_a_full_disk_stops_the_run_and_loses_nothing(
    generate: Any, manifest: Any, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = media.save

    def full(made: Any, path: Path, texts: Any = None) -> None:
        if path.name.startswith(".001"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(made, path, texts)

    with monkeypatch.context() as patch:
        patch.setattr("diffsteer.folder.media.save", full)
        stopped = generate(prompts, "out=o", "deterministic=true")
    assert stopped.code == 1 and "No space left on device" in stopped.err and stopped.err.count("\n") == 1
    made = [e["prompt"] for e in manifest(tmp_path / "o")]
    assert made == ["a red star", "  two (circles)"], "what was made beside it is written, if it can be"
    assert generate(prompts, "out=o", "deterministic=true").code == 0
    assert generate(prompts, "out=whole", "deterministic=true").code == 0
    assert bytes_of(tmp_path / "o") == bytes_of(tmp_path / "whole")


def test_done_prompts_are_not_done_again(generate: Any, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate(prompts, "out=o").code == 0
    before = bytes_of(tmp_path / "o")
    monkeypatch.setattr("diffsteer.job.load_pipeline", lambda *args, **options: pytest.fail("nothing is left to do"))
    again = generate(prompts, "out=o", "batch=2", "chunk=3")  # neither changes what comes out
    assert again.code == 0 and "3 of them were there already" in again.out
    assert bytes_of(tmp_path / "o") == before


@pytest.mark.parametrize("harm", ["half a line", "no image"])
def test_what_is_damaged_is_done_again(harm: str, generate: Any, prompts: str, tmp_path: Path) -> None:
    fixed = (prompts, "deterministic=true", "out=o")
    assert generate(*fixed).code == 0
    before = bytes_of(tmp_path / "o")
    if harm == "half a line":
        data = (tmp_path / "o/manifest.jsonl").read_bytes()
        (tmp_path / "o/manifest.jsonl").write_bytes(data[:-40])
    else:
        (tmp_path / "o/images/001.png").unlink()
    (tmp_path / "o/grid.png").unlink()
    again = generate(*fixed)
    assert again.code == 0 and again.out.startswith("1 prompt,")
    assert bytes_of(tmp_path / "o") == before


@pytest.mark.parametrize("other", ["seed=1", "sampler.particles=3", "negative_prompt=a,b", "deterministic=true", "output=all"])
def test_other_settings_are_refused(other: str, generate: Any, prompts: str, tmp_path: Path) -> None:
    assert generate(prompts, "out=o").code == 0
    before = bytes_of(tmp_path / "o") | {"c": (tmp_path / "o/.hydra/config.yaml").read_bytes()}
    result = generate(prompts, "out=o", other)
    assert (
        result.code == 2
        and "other settings" in result.err
        and result.err.endswith("choose another out=\n")
        and result.err.count("\n") == 1
    )
    assert bytes_of(tmp_path / "o") | {"c": (tmp_path / "o/.hydra/config.yaml").read_bytes()} == before


def test_other_weights_under_the_same_name_are_other_settings(
    command: Any, toy_folder: Path, prompts: str, tmp_path: Path
) -> None:
    shutil.copytree(toy_folder, tmp_path / "mine")
    small = ("reward=compressibility", "num_inference_steps=4", "sampler.particles=2")
    assert command("generate", prompts, "out=o", "model=./mine", *small).code == 0
    shutil.move(tmp_path / "mine", tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "mine")  # the same weights in new files
    assert command("generate", prompts, "out=o", "model=./mine", *small).code == 0
    weights = next((tmp_path / "mine/unet").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused = command("generate", prompts, "out=o", "model=./mine", *small)
    assert refused.code == 2 and "other settings" in refused.err


def test_a_folder_of_results_may_be_called_like_a_setting(command: Any, toy_folder: Path, prompts: str) -> None:
    small = (f"model={toy_folder}", "reward=compressibility", "num_inference_steps=4", "sampler.particles=2")
    for name in ("compressibility", "full"):
        assert command("generate", "prompt=a red star", f"out={name}", *small).code == 0
        assert command("generate", prompts, f"out={name}", *small).code == 0


def test_fingerprints_see_names_sizes_and_contents_of_large_files_too(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(3_000_000))
    seen = {fingerprint(file), fingerprint(tmp_path)}
    for at in (0, 2_999_999):
        data = bytearray(3_000_000)
        data[at] = 1
        file.write_bytes(data)
        seen.add(fingerprint(tmp_path))
    file.write_bytes(bytes(3_000_001))
    seen.add(fingerprint(tmp_path))
    file.rename(tmp_path / "other")
    seen.add(fingerprint(tmp_path))
    (tmp_path / ".hidden").write_text("x")
    assert fingerprint(tmp_path) in seen and len(seen) == 6
    named = {"a": {"b": f"local-dir:{tmp_path}", "c": "nowhere", "d": None}, "e": "x" * 5000, "f": "a\0b"}
    assert fingerprints(named, Path("o")) == {"a.b": fingerprint(tmp_path)}
    other = tmp_path / "other"
    within = {"holdout": [f"clip(weights='{other}') + 0.3*z(clip(weights=\"{other}\"))", "it's 'nowhere'"]}
    assert fingerprints(within, Path("o")) == {f"holdout.0 {other}": fingerprint(other)}
    assert fingerprints(named, tmp_path / "o") == {}, "a folder of results lies in it, and changes"


def test_other_prompts_are_refused_more_prompts_are_not(generate: Any, manifest: Any, prompts: str, tmp_path: Path) -> None:
    assert generate("prompt=a red star", "out=o", "deterministic=true").code == 0
    assert generate(prompts, "out=o", "deterministic=true").code == 0  # the first of them is done
    before = bytes_of(tmp_path / "o")
    refused = generate("prompt=a blue star", "out=o", "deterministic=true")
    assert refused.code == 2 and "a red star" in refused.err and refused.err.count("\n") == 1
    (tmp_path / "q.jsonl").write_text('{"prompt": "a star", "id": "other"}\n')
    assert generate("prompts=q.jsonl", "out=o", "deterministic=true").code == 2
    assert bytes_of(tmp_path / "o") == before
    assert generate("prompt=a red star", "out=o", "deterministic=true").code == 0
    assert [e["prompt"] for e in manifest(tmp_path / "o")] == PROMPTS.splitlines()


def test_a_manifest_of_someone_else(generate: Any, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o/manifest.jsonl").write_text('{"mine": 1}\n')
    result = generate("prompt=a star", "out=o")
    assert result.code == 2 and "manifest.jsonl, line 1" in result.err
    assert (tmp_path / "o/manifest.jsonl").read_text() == '{"mine": 1}\n'
    shutil.rmtree(tmp_path / "o")
    assert generate("prompt=a star", "out=o").code == 0


def test_the_batch_does_not_change_deterministic_bits(generate: Any, prompts: str, tmp_path: Path) -> None:
    for batch in (1, 2):
        assert generate(prompts, "deterministic=true", f"batch={batch}", f"out=o{batch}").code == 0
    assert bytes_of(tmp_path / "o1") == bytes_of(tmp_path / "o2")
