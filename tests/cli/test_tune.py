"""`diffsteer tune`: it finds what is known to be best, keeps its budget, goes on where it stopped; the file is usable."""

from __future__ import annotations

import builtins
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from diffsteer import SteeredPipeline, load_pipeline
from diffsteer.media import save
from diffsteer.ranges import Range, ranges_of
from diffsteer.rewards import ClipScore
from diffsteer.samplers import MPGD, TFG, FeynmanKac
from diffsteer.shapes.clips import render_clip, sample_clip
from diffsteer.shapes.models import WEIGHTS
from diffsteer.tuned import warnings_of
from diffsteer.tuning import DONE, FAILED, PLAIN, PRUNED, Measured, Trial, best_of, search
from diffsteer.types import DiffsteerError

STRENGTH = {"strength": Range(0.01, 10.0, log=True)}
PROMPTS = ("a red circle", "a blue ring")
STEPS = 3
EACH = 2 * STEPS  # evaluations a prompt: guided, one particle
RANGE = "tune.parameters.strength=0.05..1.0"


class Hill:
    """A reward that is known: a hill over log strength, its top at 0.4, each case on a level of its own."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def measure(self, number: int, parameters: dict[str, float], case: int) -> Measured:
        self.asked.append((number, case))
        distance = 1.0 if number == PLAIN else math.log(parameters["strength"] / 0.4)
        return Measured(10.0 * case - distance**2, None, 5, 0.0)

    def cost(self, number: int, parameters: dict[str, float]) -> int:
        return 15


def test_a_known_optimum_is_found_and_what_is_worse_is_given_up() -> None:
    hill = Hill()
    plain, *trials = search(STRENGTH, 3 + 2, hill.measure, hill.cost, seed=0, trials=40)
    best = best_of([plain, *trials])
    assert best is not None and best.parameters["strength"] == pytest.approx(0.4, rel=0.15)
    assert plain.number == PLAIN and plain.reward == pytest.approx(20 - 1)
    pruned = [t for t in trials if t.state == PRUNED]
    # here a worse trial is worse in every case, and three of three are enough
    assert pruned and all(len(t.measured) == 3 for t in pruned)
    best_so_far = -math.inf
    for t in trials:
        assert (t.state == PRUNED) == (t.reward - 10 * (len(t.measured) - 1) / 2 < best_so_far), t
        best_so_far = max(best_so_far, t.reward - 10 * (len(t.measured) - 1) / 2)
    assert len(hill.asked) == sum(len(t.measured) for t in (plain, *trials))


def test_it_begins_with_what_is_configured_and_keeps_to_its_ranges() -> None:
    hill, ranges = Hill(), {**STRENGTH, "draws": Range(1, 3, whole=True)}
    trials = search(ranges, 1, hill.measure, hill.cost, seed=3, trials=12, first={"strength": 2.0, "draws": 2})[1:]
    assert trials[0].parameters == {"strength": 2.0, "draws": 2}
    assert {t.parameters["draws"] for t in trials} == {1, 2, 3} and all(type(t.parameters["draws"]) is int for t in trials)
    assert all(0.01 <= t.parameters["strength"] <= 10 for t in trials)
    outside = search(STRENGTH, 1, hill.measure, hill.cost, seed=3, trials=1, first={"strength": 20.0})[1]
    assert outside.parameters["strength"] <= 10


@pytest.mark.parametrize("before", [0, 1, 9, 14])
def test_a_search_that_goes_on_asks_what_an_undisturbed_one_asks(before: int) -> None:
    """`before`: the last trial that was begun; of it one case was measured."""
    whole = search(STRENGTH, 4, Hill().measure, Hill().cost, seed=1, trials=15)
    known = {t.number: t.parameters for t in whole[: before + 2]}
    again = search(STRENGTH, 4, Hill().measure, Hill().cost, seed=1, trials=15, known=known)
    assert [(t.number, t.parameters, t.state) for t in again] == [(t.number, t.parameters, t.state) for t in whole]
    other = search(STRENGTH, 4, Hill().measure, Hill().cost, seed=2, trials=15)
    assert [t.parameters for t in other] != [t.parameters for t in whole]


@pytest.mark.parametrize(("budget", "trials"), [(30, 1), (44, 1), (45, 2), (1000, 6)])
def test_the_budget_is_kept(budget: int, trials: int) -> None:
    hill = Hill()
    found = search(STRENGTH, 3, hill.measure, hill.cost, seed=0, trials=6, evaluations=budget)
    assert len(found) == 1 + trials and 5 * len(hill.asked) <= budget


def test_a_budget_that_holds_no_trial_is_refused_before_any_work() -> None:
    hill = Hill()
    with pytest.raises(DiffsteerError, match="tune.evaluations=29; .* at least 30"):
        search(STRENGTH, 3, hill.measure, hill.cost, seed=0, trials=6, evaluations=29)
    assert hill.asked == []


def test_parameters_that_do_not_go_together_fail_and_the_search_goes_on() -> None:
    hill = Hill()

    def cost(number: int, parameters: dict[str, float]) -> int:
        if parameters.get("strength", 0) > 1:
            raise DiffsteerError("too strong")
        return 15

    trials = search(STRENGTH, 3, hill.measure, cost, seed=0, trials=12)[1:]
    failed = [t for t in trials if t.state == FAILED]
    assert 0 < len(failed) < 12 and all(t.parameters["strength"] > 1 and t.why == "too strong" for t in failed)
    with pytest.raises(DiffsteerError, match="no trial could be done.*too strong"):
        search({"strength": Range(2, 3)}, 3, hill.measure, cost, seed=0, trials=2)


def test_a_reward_that_is_no_number_fails_its_trial() -> None:
    def measure(number: int, parameters: dict[str, float], case: int) -> Measured:
        return Measured(math.nan if number == 1 and case == 1 else 1.0, None, 1, 0.0)

    trials = search(STRENGTH, 3, measure, lambda n, p: 3, seed=0, trials=3)[1:]
    assert [t.state for t in trials] == [DONE, FAILED, DONE] and len(trials[1].measured) == 2


def test_a_gain_that_the_held_out_reward_denies_is_said() -> None:
    plain = Trial(PLAIN, {}, [Measured(1.0, 0.5, 1, 0.0)])
    gain = Trial(0, {"strength": 1.0}, [Measured(2.0, 0.4, 1, 0.0)])
    (said,) = warnings_of([plain, gain], "checker")
    assert "held-out checker fell from 0.5 to 0.4" in said
    assert warnings_of([plain, Trial(0, {}, [Measured(2.0, 0.6, 1, 0.0)])], "checker") == []
    (said,) = warnings_of([plain, Trial(0, {}, [Measured(0.5, 0.6, 1, 0.0)])], "checker")
    assert "no trial beat the plain chain" in said


def test_ranges_are_read() -> None:
    told = {"network": "0.1..2", "clean": "0.1 .. 2 linear", "smoothing": [0, 1], "draws": [1, 4], "iterations": "2..8 linear"}
    assert ranges_of(TFG, told) == {
        "network": Range(0.1, 2, log=True),
        "clean": Range(0.1, 2),
        "smoothing": Range(0, 1),
        "draws": Range(1, 4, whole=True, log=True),
        "iterations": Range(2, 8, whole=True),
    }
    assert not ranges_of(TFG, {"clean": "0.1..2"}, log=False)["clean"].log
    assert ranges_of(FeynmanKac, {"scale": "1e-1..1e1 log"})["scale"] == Range(0.1, 10, log=True)


WRONG = {
    "nothing to tune": ([], ["tune.parameters", "highest, lowest, every, beta1, beta2, strength"]),
    "no sampler": (["sampler=none", RANGE], ["sampler=none"]),
    "an unknown field": (["tune.parameters.strenght=0.1..1"], ["strenght", "did you mean 'strength'?"]),
    "a field without numbers": (["tune.parameters.normaliser=0.1..1"], ["normaliser", "takes no numbers"]),
    "a range below": (["tune.parameters.strength=-1..1"], ["strength=-1..1", "at least 0"]),
    "a range above": (["tune.parameters.highest=0.5..1.5"], ["highest=0.5..1.5", "[0, 1]"]),
    "a range that falls": (["tune.parameters={strength: [1.0, 0.1]}"], ["must rise"]),
    "half a range": (["tune.parameters.strength=0.1"], ["strength=0.1 is no range", "LOW..HIGH"]),
    "words for numbers": (["tune.parameters.strength=little..much"], ["is no range"]),
    "an endless range": (["tune.parameters.strength=0.1..inf"], ["finite"]),
    "half particles": (["tune.parameters.particles=1.5..3"], ["whole numbers"]),
    "a logarithm of nothing": (["tune.parameters.strength=0..1 log"], ["logarithmic scale begins above 0"]),
    "the same for all": (["tune.parameters.strength=0..1", "tune.log=true"], ["logarithmic scale begins above 0"]),
    "no trials": ([RANGE, "tune.trials=0"], ["tune.trials=0", "at least 1"]),
    "no seeds": ([RANGE, "tune.seeds=0"], ["tune.seeds=0", "at least 1"]),
    "trials in words": ([RANGE, "tune.trials=many"], ["tune.trials", "many"]),
    "an unknown key": ([RANGE, "tune.trails=3"], ["trails", "did you mean 'trials'?"]),
    "an unknown key of all": ([RANGE, "+smapler=3"], ["smapler", "did you mean 'sampler'?"]),
    "a judge": ([RANGE, "tune.holdout=chekcer"], ["tune.holdout=chekcer", "did you mean 'checker'?"]),
    "the same judge in other words": ([RANGE, "tune.holdout={name: clip}"], ["tune.holdout=", "steers"]),
    "a judge who takes part": ([RANGE, "tune.holdout=clip"], ["tune.holdout=clip", "steers"]),
    "a prompt that the checker cannot read": ([RANGE, "tune.holdout=checker", "prompt=red red"], ["cannot read", "red red"]),
    "a name that is taken": ([RANGE, "tune.name=mpgd"], ["tune.name=mpgd"]),
    "a name of a file that ships": ([RANGE, "tune.name=motion"], ["tune.name=motion"]),
    "a name that is a path": ([RANGE, "tune.name=../x"], ["tune.name=../x"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line(wrong: str, command: Callable[..., Any], tmp_path: Path) -> None:
    argv, said = WRONG[wrong]
    result = command("tune", "sampler=mpgd", "prompt=a red circle", "out=o", *argv)
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("diffsteer: ") and result.err.count("\n") == 1
    assert all(words in result.err for words in said), result.err
    assert not (tmp_path / "o").exists()


def test_generate_refuses_the_keys(command: Callable[..., Any]) -> None:
    for argv in ("tune.trials=3", RANGE):
        result = command("generate", "prompt=a red circle", argv)
        assert result.code == 2 and "unknown key 'tune'" in result.err and result.err.count("\n") == 1


def test_without_optuna_it_says_what_to_install(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name == "optuna":
            raise ImportError("No module named 'optuna'")
        return imported(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    result = command("tune", "sampler=mpgd", RANGE, "out=o")
    assert result.code == 2 and "pip install diffsteer[tune]" in result.err and result.err.count("\n") == 1


@pytest.fixture
def tune(command: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`diffsteer tune` of MPGD's strength on the embedded model."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    fixed = ("sampler=mpgd", "prompts=p.txt", f"num_inference_steps={STEPS}", RANGE, "tune.holdout=checker")
    return lambda *argv: command("tune", *fixed, *argv)


def lines(folder: Path) -> list[dict[str, Any]]:
    """What was measured, without the time that it took."""
    read = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read]


def test_it_measures_what_python_measures_and_the_file_is_usable(
    tune: Callable[..., Any], command: Callable[..., Any], manifest: Callable[[Path], list[dict[str, Any]]], tmp_path: Path
) -> None:
    done = tune("tune.trials=2", "tune.name=mine", "out=o")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"diffsteer generate --config-dir o sampler=mine num_inference_steps={STEPS}"
    read = lines(tmp_path / "o")
    assert [(line["trial"], line["prompt"]) for line in read] == [(n, p) for n in (PLAIN, 0, 1) for p in PROMPTS]
    assert all(line["evaluations"] == EACH and line["holdout"] in (0.0, 1.0) for line in read)
    assert read[2]["parameters"] == {"strength": MPGD().strength}
    pipe = load_pipeline("shapes")

    def alone(strength: float) -> list[float]:  # as it measures: together prompts agree to rounding, which guidance enlarges
        steered = SteeredPipeline(pipe, MPGD(strength=strength), ClipScore())
        made = [steered([p], num_inference_steps=STEPS, seed=0, ids=[i]) for i, p in enumerate(PROMPTS)]
        return [float(out.rewards[0, 0]) for out in made]

    assert [line["reward"] for line in read[4:]] == pytest.approx(alone(read[5]["parameters"]["strength"]), abs=1e-3)
    assert [line["reward"] for line in read[:2]] == pytest.approx(alone(0), abs=1e-3)

    means = {n: sum(line["reward"] for line in read if line["trial"] == n) / len(PROMPTS) for n in (0, 1)}
    best = max(means, key=lambda n: means[n])
    values = yaml.safe_load((tmp_path / "o/sampler/mine.yaml").read_text())
    parameters = next(line["parameters"] for line in read if line["trial"] == best)
    assert values["name"] == "mpgd" and values["strength"] == parameters["strength"]
    report = (tmp_path / "o/report.md").read_text()
    assert f"best (trial {best})" in report and f"{means[best]:.4g}" in report and "held out: checker" in report
    made = command("generate", "--config-dir", "o", "sampler=mine", "prompts=p.txt", f"num_inference_steps={STEPS}", "out=g")
    assert made.code == 0, made.err
    rewards = [entry["reward"] for entry in manifest(tmp_path / "g")]
    assert rewards == pytest.approx([line["reward"] for line in read if line["trial"] == best], abs=1e-3)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), "a torn line"], ids=["Ctrl-C", "killed"])
def test_a_stopped_search_goes_on(stop: Any, tune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune("tune.trials=3", "out=whole").code == 0
    whole = lines(tmp_path / "whole")
    if isinstance(stop, str):
        (tmp_path / "o").mkdir()
        data = (tmp_path / "whole/trials.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "o/trials.jsonl").write_bytes(b"".join(data[:5]) + data[5][:40])
    else:
        score, seen = ClipScore.score, [0]

        def stopping(self: Any, samples: Any, prompts: Any, ctx: Any) -> Any:
            seen[0] += ctx.done == ctx.steps
            if seen[0] == 6:
                raise stop
            return score(self, samples, prompts, ctx)

        with monkeypatch.context() as patch:
            patch.setattr(ClipScore, "score", stopping)
            stopped = tune("tune.trials=3", "out=o")
        assert stopped.code == 130 and "out=o goes on" in stopped.err
    assert 0 < len(lines_before := (tmp_path / "o/trials.jsonl").read_bytes().split(b"\n")) < len(whole) + 1
    done = tune("tune.trials=3", "out=o")
    assert done.code == 0 and lines(tmp_path / "o") == whole
    assert (tmp_path / "o/trials.jsonl").read_bytes().split(b"\n")[:4] == lines_before[:4]

    monkeypatch.setattr("diffsteer.tune.load", lambda *args: pytest.fail("nothing is left to do"))
    assert tune("tune.trials=2", "out=o").code == 0 and lines(tmp_path / "o") == whole  # what is there is never dropped
    other = tune("tune.trials=3", "seed=1", "out=o")
    assert other.code == 2 and "other settings" in other.err and lines(tmp_path / "o") == whole


def test_a_budget_is_kept_and_can_be_raised(tune: Callable[..., Any], tmp_path: Path) -> None:
    each = EACH * len(PROMPTS)
    done = tune("tune.trials=4", f"tune.evaluations={3 * each - 1}", "out=o")
    assert done.code == 0, done.err
    assert sum(line["evaluations"] for line in lines(tmp_path / "o")) == 2 * each
    assert f"budget of {3 * each - 1} evaluations" in (tmp_path / "o/report.md").read_text()
    assert tune("tune.trials=4", f"tune.evaluations={3 * each}", "out=o").code == 0
    assert sum(line["evaluations"] for line in lines(tmp_path / "o")) == 3 * each
    refused = tune("tune.trials=4", f"tune.evaluations={each}", "out=n")
    assert refused.code == 2 and f"at least {2 * each}" in refused.err


def test_it_does_not_write_into_a_folder_of_pictures(tune: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o/manifest.jsonl").write_text("")
    done = tune("out=o")
    assert (
        done.code == 2
        and "choose another out=" in done.err
        and [p.name for p in (tmp_path / "o").iterdir()] == ["manifest.jsonl"]
    )


def test_another_judge_of_the_same_name_is_other_settings(tune: Callable[..., Any], tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS / "clip2", tmp_path / "judge")
    judge = ("tune.holdout={name: clip, model_name: 'local-dir:judge'}", "tune.trials=1", "out=o")
    assert tune(*judge).code == 0
    assert tune(*judge).code == 0
    (tmp_path / "judge" / "more.txt").write_text("other weights")
    again = tune(*judge)
    assert again.code == 2 and "other settings" in again.err and again.err.count("\n") == 1


def test_a_judge_with_the_same_reference_takes_part(command: Callable[..., Any], tmp_path: Path) -> None:
    save(render_clip(sample_clip("colors", np.random.default_rng(4))), tmp_path / "clip.gif")
    asked = ("tune", "model=shapes-motion", "prompt=a ring", "reward=motion_consistency", "reference=clip.gif", "sampler=mpgd")
    judge = "tune.holdout={name: motion_consistency, reference: clip.gif}"
    refused = command(*asked, "tune.parameters.strength=0.1..1", judge, "out=o")
    assert refused.code == 2 and "is the reward that steers" in refused.err, refused.err
