"""`diffsteer evaluate`: equal budgets that are counted, folders that are those of `generate`, going on, and wrong input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROMPTS = ("a red circle", "a blue ring", "a small star")
TWO = ("evaluate.samplers=[none,best_of_n]", "evaluate.budgets=[2]", "reward=brightness", "holdout=[]")
QUICK = ("num_inference_steps=2", "evaluate.seeds=2", "out=o")


@pytest.fixture
def evaluate(command: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """On the shapes world, three prompts, two steps and two seeds."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    return lambda *argv: command("evaluate", "prompts=p.txt", *QUICK, *argv)


def metrics(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return {(r["cell"], r["metric"]): r for r in csv.DictReader(file)}


def value(folder: Path, cell: str, metric: str) -> float:
    return float(metrics(folder)[cell, metric]["value"])


def test_samplers_at_equal_budgets(evaluate: Any, command: Any, manifest: Any, tmp_path: Path) -> None:
    options = ("evaluate.samplers=[none,best_of_n,fk]", "evaluate.budgets=[2,3]", "evaluate.reference=shapes")
    result = evaluate(*options)
    assert result.code == 0, result.err
    out = tmp_path / "o"
    plain = value(out, "plain", "evaluations")
    for cell, times in (("best_of_n-x2", 2), ("best_of_n-x3", 3), ("fk-x2", 2), ("fk-x3", 3)):
        assert value(out, cell, "evaluations") == times * plain
    assert {m for _, m in metrics(out)} == {
        *("reward", "checker", "clip2", "distance", "vendi", "fid", "kid", "precision", "recall", "density", "coverage"),
        *("evaluations", "decodes", "reward_calls", "seconds"),
    }
    assert "| fk-x3 |" in result.out and (out / "table.md").read_text() in result.out + "\n"
    with (out / "cases.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 * 3 * 2 and all((out / line["image"]).is_file() for line in lines)
    for name in ("scaling.png", "fronts.png", "fronts.csv"):
        assert (out / name).stat().st_size > 100
    # a cell is what `generate` makes with that sampler and seed
    same = ("sampler=fk", "sampler.particles=2", "seed=1", "holdout=[checker,clip2]", "num_inference_steps=2")
    assert command("generate", "prompts=p.txt", *same, "out=g").code == 0
    one, other = manifest(tmp_path / "g"), manifest(out / "fk-x2" / "seed-1")
    assert [e["reward"] for e in one] == [e["reward"] for e in other] and one[0]["settings"] == other[0]["settings"]
    told = command("status", "o")
    assert told.code == 0 and told.out.splitlines() == ["o: 30 of 30 prompts done, in 10 folders"]
    assert command("report", "o/fk-x2/seed-0", "o/plain/seed-0").code == 0


def test_it_goes_on_and_makes_nothing_twice(
    evaluate: Any, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TWO
    assert evaluate(*options).code == 0
    first = (tmp_path / "o/cases.csv").read_text()
    half = tmp_path / "o/best_of_n-x2/seed-1/manifest.jsonl"
    half.write_text("".join(half.read_text().splitlines(keepends=True)[:1]))
    told = command("status", "o")
    assert told.code == 1 and told.out.splitlines()[0] == "o: 10 of 12 prompts done, in 4 folders"
    assert told.out.splitlines()[1:] == ["best_of_n-x2/seed-1: 1 of 3"]
    assert evaluate(*options).code == 0

    def scores(text: str) -> list[list[str]]:
        return [line.split(",")[:6] for line in text.splitlines()]

    assert scores((tmp_path / "o/cases.csv").read_text()) == scores(first)
    monkeypatch.setattr("diffsteer.job.load_pipeline", lambda *a, **k: pytest.fail("nothing is left to do"))
    assert evaluate(*options).code == 0
    assert evaluate(*options, "evaluate.features=colours", "evaluate.axes=[reward,distance]").code == 0
    other = evaluate(*options, "guidance_scale=2")
    assert other.code == 2 and "other settings" in other.err and other.err.count("\n") == 1


def test_searches_keep_the_budget_and_settled_samplers_run_once(evaluate: Any, tmp_path: Path) -> None:
    samplers = "evaluate.samplers={search: random_search, two: {name: best_of_n, particles: 2}, as_is: none}"
    result = evaluate(samplers, "evaluate.budgets=[2,4]", "evaluate.seeds=1", "reward=brightness", "holdout=[]")
    assert result.code == 0, result.err
    out = tmp_path / "o"
    assert {c for c, _ in metrics(out)} == {"search-x2", "search-x4", "two", "as_is"}
    plain = value(out, "as_is", "evaluations")
    assert value(out, "two", "evaluations") == 2 * plain
    for times in (2, 4):
        assert plain < value(out, f"search-x{times}", "evaluations") <= times * plain
    assert ("two", "vendi") not in metrics(out)  # of one seed nothing is said of diversity
    assert json.loads((out / "cells.json").read_text())["cells"]["search 4"] == {"evals": 4 * int(plain)}


def test_a_guided_sampler_gets_the_particles_that_are_paid(evaluate: Any, tmp_path: Path) -> None:
    samplers = "evaluate.samplers=[none,mpgd]"
    result = evaluate(samplers, "evaluate.budgets=[3]", "evaluate.seeds=1", "reward=brightness", "holdout=[]")
    assert result.code == 0, result.err
    out = tmp_path / "o"
    assert value(out, "mpgd-x3", "evaluations") <= 3 * value(out, "plain", "evaluations")


def test_real_pictures_of_ones_own(evaluate: Any, tmp_path: Path) -> None:
    """Against its own pictures a sampler is perfect, and others are not."""
    options = (*TWO, "evaluate.features=colours")
    assert evaluate(*options).code == 0
    (tmp_path / "real").mkdir()
    for n, image in enumerate((tmp_path / "o/plain").rglob("images/*.png")):
        (tmp_path / "real" / f"{n}.png").write_bytes(image.read_bytes())
    result = evaluate(*options, "evaluate.reference=real", "evaluate.neighbours=1", "evaluate.axes=[reward,fid]")
    assert result.code == 0, result.err
    assert (
        value(tmp_path / "o", "plain", "fid") == pytest.approx(0, abs=1e-6) and value(tmp_path / "o", "plain", "precision") == 1
    )
    assert value(tmp_path / "o", "best_of_n-x2", "fid") > 1e-4


def test_a_prompt_that_fails_is_left_out_and_the_exit_code_tells(
    evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffsteer.rewards import Brightness

    usual = Brightness.score

    def picky(self: Brightness, samples: Any, prompts: Any, ctx: Any) -> Any:
        if "a blue ring" in prompts:
            raise RuntimeError("no rings")
        return usual(self, samples, prompts, ctx)

    monkeypatch.setattr(Brightness, "score", picky)
    result = evaluate(*TWO)
    assert result.code == 1 and "best_of_n-x2, seed 0: 1 of 3 prompts failed" in result.err and result.err.count("\n") == 1
    assert "2 prompts, 2 seeds each" in result.out and "1 prompts that some sampler failed on are left out" in result.out
    with (tmp_path / "o/cases.csv").open() as file:
        assert {line["id"] for line in csv.DictReader(file)} == {"0", "2"}


def test_one_prompt_and_seeds_of_its_own(command: Any, tmp_path: Path) -> None:
    """Its own seed is where its seeds begin; of one prompt there are no intervals, and no error."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red circle", "seed": 5}')
    result = command("evaluate", "prompts=p.jsonl", *QUICK, *TWO)
    assert result.code == 0, result.err
    with (tmp_path / "o/cases.csv").open() as file:
        rewards = [line["reward"] for line in csv.DictReader(file) if line["cell"] == "plain"]
    assert len(set(rewards)) == 2 and value(tmp_path / "o", "plain", "distance") > 0
    assert metrics(tmp_path / "o")["plain", "reward"]["low"] == ""
    assert command("generate", "prompt=a red circle", "seed=6", "sampler=none", "num_inference_steps=2", "out=g").code == 0


def test_scales_are_everyones_also_after_going_on(evaluate: Any, tmp_path: Path) -> None:
    """A z-score has one scale in all cells and seeds, whenever they were made."""
    options = (*TWO[:2], "reward=brightness + 0.5*z(sharpness)", "holdout=[]")
    assert evaluate(*options).code == 0
    first = (tmp_path / "o/cases.csv").read_text()
    (tmp_path / "o/plain/seed-1/manifest.jsonl").unlink()
    assert evaluate(*options).code == 0

    def rewards(text: str) -> list[list[str]]:
        return [line.split(",")[:6] for line in text.splitlines()]

    assert rewards((tmp_path / "o/cases.csv").read_text()) == rewards(first)
    assert (tmp_path / "o/scales.json").exists() and not list((tmp_path / "o").glob("*/*/scales.json"))


@pytest.mark.slow
def test_two_processes_compare_in_one_folder(tmp_path: Path) -> None:
    """Whichever comes first, all of it is made once, and what both write is whole."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    argv = [sys.executable, "-m", "diffsteer", "evaluate", "prompts=p.txt", *QUICK, *TWO]
    both = [subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert "| best_of_n-x2 |" in out
    for folder in ("plain/seed-0", "plain/seed-1", "best_of_n-x2/seed-0", "best_of_n-x2/seed-1"):
        timed = [i for t in (tmp_path / "o" / folder / "timings.jsonl").read_text().splitlines() for i in json.loads(t)["ids"]]
        assert sorted(timed) == [0, 1, 2]
    assert not list((tmp_path / "o").glob(".*.part"))


def test_a_cell_that_breaks_is_left_out_and_told(evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsteer.samplers import FeynmanKac

    def broken(*args: Any) -> Any:
        raise RuntimeError("no memory for that")

    monkeypatch.setattr(FeynmanKac, "init", broken)
    result = evaluate("evaluate.samplers=[none,fk]", "evaluate.budgets=[2]", "reward=brightness", "holdout=[]")
    assert result.code == 1 and "fk-x2, seed 0: RuntimeError: no memory for that" in result.err and result.err.count("\n") == 1
    assert "the same command with out=o goes on" in result.err
    assert {c for c, _ in metrics(tmp_path / "o")} == {"plain"}


def test_a_folder_of_something_else(evaluate: Any, command: Any, tmp_path: Path) -> None:
    assert command("generate", "prompt=a red circle", "num_inference_steps=2", "out=o").code == 0
    result = evaluate(*TWO)
    assert result.code == 2 and "is of diffsteer generate; choose another out=" in result.err
    assert command("evaluate", "prompts=p.txt", *QUICK[:2], *TWO, "evaluate.seeds=1", "out=c").code == 0
    told = command("report", "c")
    assert told.code == 2 and "c is a comparison: give one or two of its folders, such as c/plain/seed-0" in told.err


def test_a_search_has_one_budget_for_all_prompts(command: Any, tmp_path: Path) -> None:
    lines = [{"prompt": "a red circle"}, {"prompt": "a blue ring", "num_inference_steps": 6}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = ("evaluate", "prompts=p.jsonl", *QUICK, *TWO[1:], "evaluate.seeds=1")
    result = command(*common, "evaluate.samplers=[random_search]")
    assert result.code == 2 and "prompts have steps or guidance of their own, and the search random_search" in result.err
    assert command(*common, "evaluate.samplers=[none,best_of_n]").code == 0
    assert value(tmp_path / "o", "best_of_n-x2", "evaluations") == 2 * value(tmp_path / "o", "plain", "evaluations")


def test_a_sampler_of_an_experiment_has_no_effect_either(evaluate: Any, tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /sampler: best_of_n\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(text)
    result = evaluate("--config-dir=own", "experiment=mine", *TWO)
    assert result.code == 2 and "experiment=mine has no effect: give evaluate.samplers=" in result.err


@pytest.mark.parametrize(
    "options, said",
    [
        (["evaluate.samplers=[none,bst_of_n]"], "sampler=bst_of_n is unknown; did you mean 'best_of_n'"),
        (["evaluate.samplers=[fk,fk]"], "evaluate.samplers: two are called fk: give them labels"),
        (["evaluate.samplers=[{name: fk, particels: 3}]"], "particels"),
        (["evaluate.samplers=[{name: fk, particles: 0}]"], "particles=0"),
        (["evaluate.samplers=[3]"], "evaluate.samplers: 3 is neither a name nor a mapping"),
        (["evaluate.samplers={../up: fk}"], "the label '../up' takes letters"),
        (["evaluate.samplers={table.md: fk}"], "the label 'table.md' is like a file's name"),
        (["evaluate.samplers={fk: fk, fk-x4: {name: fk, particles: 2}}"], "two come to be called fk-x4"),
        (["evaluate.budgets=[0]"], "evaluate.budgets=[0]; wanted different numbers of plain runs"),
        (["evaluate.budgets=[2,2]"], "wanted different numbers"),
        (["evaluate.seeds=0"], "evaluate.seeds=0; at least 1 is needed"),
        (["evaluate.features=colors"], "evaluate.features=colors is unknown; did you mean 'colours'"),
        (["evaluate.features=brightness"], "brightness has no features"),
        (["evaluate.reference=gone"], "evaluate.reference=gone is no folder"),
        (["evaluate.axes=[beauty,vendi]"], "evaluate.axes: beauty is not measured; valid: reward"),
        (["evaluate.axes=[reward,vendi]"], "evaluate.axes: vendi is not measured"),  # of one seed
        (["evaluate.axes=[reward]"], "evaluate.axes=['reward']; wanted two metrics or more"),
        (["sampler=fk"], "sampler=fk has no effect: give evaluate.samplers="),
        (["sampler.particles=3"], "has no effect: give evaluate.samplers="),
        (["budget.evals=9"], "budget.evals and evaluate.budgets"),
        (["evaluate.sampler=fk"], "unknown key 'evaluate.sampler'; did you mean 'samplers'"),
    ],
)
def test_wrong_input_is_one_line_and_says_so_before_any_work(
    evaluate: Any, tmp_path: Path, options: list[str], said: str
) -> None:
    result = evaluate("reward=brightness", "holdout=[]", "evaluate.seeds=1", *options)
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1, result.err
    assert not list(tmp_path.glob("o/*/*/manifest.jsonl"))


def test_what_it_wants_is_named(evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchmetrics" else usual(name, *a))
    result = evaluate()
    assert result.code == 2 and "pip install diffsteer[evaluate]" in result.err


def test_other_models_want_prompts_and_a_checker_is_not_theirs(command: Any, toy_folder: Path) -> None:
    assert "needs prompts" in command("evaluate", f"model={toy_folder}", "out=o").err
    told = command(
        "evaluate", f"model={toy_folder}", "prompt=a star", "reward=brightness", "evaluate.reference=shapes", "out=o"
    ).err
    assert "draws the shapes world" in told
