"""Wrong input: one line that says what is wrong, where and what is valid, exit code 2, and no traceback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from diffsteer.cli import _overrides_first
from diffsteer.rewards import Compressibility
from diffsteer.types import DiffsteerError

WRONG = {
    "a wrong type": (["num_inference_steps=abc"], ["num_inference_steps", "abc", "Integer"]),
    "a wrong type in a group": (["sampler.particles=many"], ["sampler.particles", "many"]),
    "an unknown key": (["smapler=fk"], ["smapler", "did you mean 'sampler'?"]),
    "an unknown key of a group": (["sampler.particels=8"], ["sampler.particels", "did you mean 'particles'?"]),
    "an added key": (["+sampler.particels=8"], ["sampler.particels", "did you mean 'particles'?"]),
    "an added key at the top": (["+smapler=fk"], ["smapler", "did you mean 'sampler'?"]),
    "an unknown sampler": (["sampler=fkk"], ["sampler=fkk", "did you mean 'fk'?", "best_of_n"]),
    "an unknown reward": (["reward=clp"], ["reward=clp", "did you mean 'clip'?", "aesthetic"]),
    "an unknown model": (["model=shapse"], ["model=shapse", "did you mean 'shapes'?", "sd15"]),
    "an unknown experiment": (["experiment=fk_papr"], ["fk_papr", "did you mean 'fk_paper'?"]),
    "a sampler's value": (["sampler.eta=0"], ["eta=0", "(0, 1]"]),
    "a choice": (["sampler.potential=differences"], ["potential='differences'", "difference, max"]),
    "two sources of prompts": (["prompts=nowhere.txt"], ["prompt=", "prompts=", "not both"]),
    "an output": (["output=bset"], ["output=bset", "did you mean 'best'?"]),
    "a dtype": (["model.dtype=float23"], ["float23", "float32"]),
    "a batch": (["batch=0"], ["batch=0", "at least 1"]),
    "rows in a block": (["chunk=many"], ["chunk=many", "auto"]),
    "no rows in a block": (["chunk=0"], ["chunk=0", "at least 1"]),
    "half a row in a block": (["chunk=1.5"], ["chunk=1.5", "at least 1"]),
    "blocks that memory decides": (["chunk=auto", "deterministic=true"], ["chunk=auto", "deterministic"]),
    "a decoder": (["decoder=tiyn"], ["decoder=tiyn", "tiny:PATH"]),
    "no decoder": (["decoder=none"], ["decoder=none", "images are made"]),
    "more than a decoder": (["decoder=full:x"], ["decoder=full:x", "tiny:PATH"]),
    "a tiny decoder that there is not": (["model=shapes", "decoder=tiny"], ["shapes", "tiny:PATH"]),
    "an amount of noise that nothing asks": (
        ["transition=native", "noise=quadratic"],
        ["noise=quadratic", "transition=native"],
    ),
    "a threshold": (["sampler.threshold=nan"], ["threshold=nan", "(0, 1]"]),
    "a transition without a sampler": (["sampler=none", "transition=native"], ["transition=native", "sampler"]),
    "no folder": (["out="], ["out="]),
    "a transition": (["transition=natve"], ["transition=natve", "did you mean 'native'?"]),
    "an amount of noise": (["noise=cubic"], ["noise=cubic", "eta, quadratic"]),
    "a sweep without -m": (["sampler=fk,best_of_n"], ["sampler=fk,best_of_n", "--multirun"]),
    "a broken override": (["seed=("], ["seed", "'('", "Integer"]),
    "no sampler by null": (["sampler=null"], ["sampler=null", "best_of_n", "none"]),
    "no reward by null": (["reward=null"], ["reward=null", "clip"]),
    "no model by null": (["model="], ["model=", "shapes"]),
    "a device without memory": (["device=meta"], ["device=meta"]),
    "a guidance scale": (["guidance_scale=nan"], ["guidance_scale=nan", "finite"]),
    "an unknown flag": (["--mulitrun"], ["--mulitrun", "did you mean '--multirun'?"]),
    "a flag's value": (["--cfg", "jbo"], ["jbo", "job"]),
    "a key of the command among the call's": (["call.seed=3"], ["call.seed", "give seed="]),
    "states among the call's arguments": (["call.latents=3"], ["call.latents", "on the command line"]),
    "an argument without a name": (["=3"], ["'=3'", "key=value"]),
    "no file": (["prompt=~", "prompts="], ["prompts= names no file"]),
    "a text for a file": ([f"prompts={'a red star and ' * 40}"], ["not both"]),
    "a model's long name": ([f"model={'a' * 300}"], ["aaaa"]),
    "a folder's long name": ([f"out={'a' * 300}"], ["aaaa", "too long"]),
    "a folder where none can be": (["out=/proc/nowhere"], ["/proc/nowhere", "No such file"]),
    "a flag alone": (["--resolve"], ["--resolve", "--cfg"]),
    "a path that is missing": (["model=path"], ["model.path is missing"]),
    "a config folder": (["--config-dir", "nowhere"], ["nowhere", "not found"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line(wrong: str, command: Any, tmp_path: Path) -> None:
    argv, said = WRONG[wrong]
    result = command("generate", "prompt=a star", "out=o", *argv)
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("diffsteer: ") and result.err.count("\n") == 1 and "Traceback" not in result.err
    assert all(words in result.err for words in said), result.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", None, ["prompts=p.txt", "No such file", "did you mean 'q.txt'?"]),
        ("p (1),=.txt", None, ["p (1),=.txt", "No such file"]),
        ("p.txt", " \n\n", ["p.txt", "no prompt"]),
        ("p.jsonl", '{"prompt": "a star"}\n{"prompt": 3}\n', ["p.jsonl, line 2", '"prompt"']),
        ("p.jsonl", '{"prompt": "a star"}\n\na star\n', ["p.jsonl, line 3", "no JSON"]),
        ("p.jsonl", '["a star"]\n', ["p.jsonl, line 1", "object"]),
        ("p.jsonl", '{"prompt": "a", "id": 7}\n{"prompt": "b", "id": 7}\n', ["p.jsonl, line 2", "id 7", "line 1"]),
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b"}\n', ["p.jsonl, line 2", "id 1"]),
        ("p.jsonl", '{"prompt": "a", "id": 1.5}\n', ["p.jsonl, line 1", "1.5"]),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', ["prompt 0", "Unicode"]),
    ],
)
def test_wrong_files_of_prompts(name: str, text: str | None, said: list[str], command: Any, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("a star\n")
    if text is not None:
        (tmp_path / name).write_text(text)
    result = command("generate", f"prompts={name}", "out=o")
    assert result.code == 2 and result.err.count("\n") == 1 and all(words in result.err for words in said), result.err
    assert not (tmp_path / "o").exists()


def test_a_long_text_for_a_file(command: Any) -> None:
    result = command("generate", f"prompts={'a red star and ' * 40}", "out=o")
    assert result.code == 2 and "too long" in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("call.height=abc", "height='abc' is no number"),
        ("call.hight=64", "'hight'; did you mean 'height'?"),
        ("call.prompt=a", "give prompt="),
        ("call.output_type=np", "'output_type'"),
    ],
)
def test_arguments_of_the_call(given: str, said: str, generate: Any) -> None:
    result = generate("prompt=a star", "out=o", given)
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1, result.err


def test_mappings_and_warnings(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("call.cross_attention_kwargs={scale: 0.5}", "call={guidance_rescale: 0.1}")
    assert generate("prompt=a star", "out=o", *given).code == 0
    monkeypatch.setattr(Compressibility, "score", lambda self, samples, *_: torch.full((len(samples),), float("nan")))
    result = generate("prompt=a star", "out=p")
    lines = result.err.strip().splitlines()
    assert result.code == 0 and lines and all(line.startswith("diffsteer: warning: fk: no finite reward") for line in lines)


def test_a_folder_without_a_pipeline(command: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = command("generate", "prompt=a star", "model=empty", "reward=compressibility", "out=o")
    assert result.code == 2 and "'empty'" in result.err and result.err.count("\n") == 1


def test_the_demonstration_is_of_the_shapes_world(generate: Any) -> None:
    result = generate("out=o")
    assert result.code == 2 and "prompt=" in result.err and result.err.count("\n") == 1


def test_a_file_where_the_folder_should_be(generate: Any, tmp_path: Path) -> None:
    (tmp_path / "o").write_text("mine")
    result = generate("prompt=a star", "out=o")
    assert result.code == 2 and result.err.count("\n") == 1 and "o: File exists" in result.err
    assert (tmp_path / "o").read_text() == "mine"


def test_a_users_own_empty_folder_stays(generate: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    os.utime(tmp_path / "mine", (1e9, 1e9))
    assert generate("prompt=a star", "out=mine", "batch=0").code == 2
    assert (tmp_path / "mine").is_dir()


def test_flags_with_values(command: Any, tmp_path: Path) -> None:
    result = command("generate", "prompt=a star", f"--config-dir={tmp_path}", "--cfg=job")
    assert result.code == 0 and "sampler" in result.out, result.err


def test_a_reward_that_raises_is_a_failure(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(*args: Any) -> Any:
        raise OSError("no\nfile")

    monkeypatch.setattr(Compressibility, "score", score)
    result = generate("prompt=a star", "out=o")
    assert result.code == 1 and result.err.count("\n") == 1
    assert all(words in result.err for words in ("compressibility", "OSError", "'a star'", "after step 2 of 4"))


@pytest.mark.parametrize("argv", [["generat"], ["list"], ["list", "sampler"], []])
def test_wrong_commands(argv: list[str], command: Any) -> None:
    result = command(*argv)
    assert result.code == 2
    assert "generate" in result.out if not argv else "valid: " in result.err and result.err.count("\n") == 1
    if argv and argv != ["list"]:
        assert "did you mean" in result.err


def test_a_prompt_that_cannot_be_scored_is_refused_before_any_is_done(
    generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(self: Any, prompts: Any, ctx: Any) -> None:
        if "a dog" in prompts:
            raise DiffsteerError("'a dog' cannot be scored")

    monkeypatch.setattr(Compressibility, "prepare", prepare)
    (tmp_path / "p.txt").write_text("a star\na dog\n")
    result = generate("prompts=p.txt", "out=o")
    assert (result.code, result.err) == (2, "diffsteer: 'a dog' cannot be scored\n")
    assert not (tmp_path / "o/images").exists()


@pytest.mark.parametrize(
    "argv, ordered",
    [
        (["seed=1", "-p", "seed=1", "seed=1"], ["seed=1", "seed=1", "-p", "seed=1"]),  # a flag's value like an override
        (["--config-dir", "own", "seed=1", "-m", "out=o"], ["seed=1", "out=o", "--config-dir", "own", "-m"]),
        (["--config-d", "own", "seed=1"], ["seed=1", "--config-d", "own"]),
        (["--info", "--resolve", "seed=1"], ["seed=1", "--info", "--resolve"]),
        (["--info", "config", "seed=1"], ["seed=1", "--info", "config"]),
        (["--cfg=job", "seed=1"], ["seed=1", "--cfg=job"]),
    ],
)
def test_overrides_between_flags_are_brought_together(argv: list[str], ordered: list[str]) -> None:
    assert _overrides_first(argv) == ordered
