"""Searches from the command line: budgets, drafts, stages and programs as overrides; records; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


BASE = ("prompt=a red star", "num_inference_steps=4", "reward=compressibility", "out=one", "model=toy")


def run(command: Any, *more: str) -> Any:
    return command("generate", *BASE, *more)


def test_a_search_keeps_its_budget_and_leaves_a_record(command: Any, toy_folder: Path, tmp_path: Path) -> None:
    result = run(command, f"model={toy_folder}", "sampler=zero_order", "budget.evals=40")
    assert result.code == 0, result.err
    (entry,) = lines(tmp_path / "one")
    assert entry["ledger"]["evaluations"] <= 40 and entry["search"]["stopped"] == "budget"
    record = entry["search"]
    assert record["spent"]["evals"] == entry["ledger"]["evaluations"] and record["history"][-1][1] == pytest.approx(
        entry["reward"]
    )
    assert set(record["prior"][0]) == {"radius", "autocorrelation", "covariance"} and record["diversity"]["vendi"] >= 1
    assert (tmp_path / "one" / entry["image"]).is_file()
    again = run(command, f"model={toy_folder}", "sampler=zero_order", "budget.evals=40")
    assert again.code == 0 and "there already" in again.out
    assert "other settings" in run(command, f"model={toy_folder}", "sampler=zero_order", "budget.evals=48").err


def test_the_same_search_is_the_same_record(command: Any, toy_folder: Path, tmp_path: Path) -> None:
    asked = ("deterministic=true", "chunk=2", "sampler=random_search", "sampler.candidates=3", "sinks=[webdataset]")
    for name in ("one", "two"):
        assert command("generate", *BASE[:-2], *asked, f"out={name}", f"model={toy_folder}").code == 0
    for file in ("manifest.jsonl", "shards/00000.tar"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    (timing,) = map(json.loads, (tmp_path / "one/timings.jsonl").read_text().splitlines())
    history = lines(tmp_path / "one")[0]["search"]["history"]
    assert [e for e, _ in timing["searches"][0]] == [e for e, _ in history] and timing["searches"][0][-1][1] > 0


def test_time_is_a_budget(command: Any, toy_folder: Path, tmp_path: Path) -> None:
    result = run(command, f"model={toy_folder}", "sampler=random_search", "sampler.candidates=2", "budget.seconds=1.5")
    assert result.code == 0 and "as many drafts and samples as 1.5 s pay for" in result.out, result.err
    assert lines(tmp_path / "one")[0]["search"]["stopped"] == "budget"


def test_drafts_and_their_gap(command: Any, toy_folder: Path, tmp_path: Path) -> None:
    result = run(
        command, f"model={toy_folder}", "sampler=random_search", "sampler.candidates=3", "draft.steps=2", "draft.finalists=2"
    )
    assert result.code == 0, result.err
    gap = lines(tmp_path / "one")[0]["search"]["gap"]
    assert len(gap["drafts"]) == len(gap["finals"]) == 2
    none = command(
        "generate",
        *BASE[:-2],
        "out=two",
        f"model={toy_folder}",
        "sampler=random_search",
        "sampler.candidates=3",
        "draft.use=false",
    )
    assert none.code == 0 and "gap" not in lines(tmp_path / "two")[0]["search"]
    fast = (f"draft.model={toy_folder}", "draft.steps=2", "draft.call.guidance_scale=1.0", "draft.finalists=1")
    few = ("sampler=random_search", "sampler.candidates=3")
    other = command("generate", *BASE[:-2], "out=three", f"model={toy_folder}", *few, *fast)
    assert other.code == 0, other.err
    assert lines(tmp_path / "three")[0]["search"]["spent"]["evals"] == 3 * 2 + 1 * 4 * 2


def test_stages_as_a_list(command: Any, toy_folder: Path, tmp_path: Path) -> None:
    stages = (
        "sampler.stages=[{name: successive_halving, candidates: 3, events: [0.5]}, {name: fk, particles: 2, events: [0.5]}]"
    )
    result = run(command, f"model={toy_folder}", "sampler=stages", stages, "budget.evals=64")
    assert result.code == 0, result.err
    assert lines(tmp_path / "one")[0]["ledger"]["evaluations"] <= 64


def test_a_program_is_a_reward_as_it_stands(command: Any, toy_folder: Path, tmp_path: Path) -> None:
    text = "reward=any_of(area(red) > 2 * area(blue), left_of(red, blue))"
    result = command(
        "generate", *BASE[:2], "out=one", f"model={toy_folder}", "sampler=random_search", "sampler.candidates=2", text
    )
    assert result.code == 0, result.err
    assert lines(tmp_path / "one")[0]["reward"] <= 0


DARK = "less_than(brightness(), 0.2)"


@pytest.mark.parametrize("more", [
    (f"reward={DARK}",),
    ("reward=all_of(greater_than(brightness(), 0.2), left_of(red, blue))",),
    ("reward=all_of(" + ", ".join(["area(red) > 2 * area(blue)"] * 60) + ")",),
    ("reward=brightness + " + " + ".join(["0.5 * sharpness"] * 60),),
    ("reward=brightness", "holdout=left_of(red, blue)"),
    ("reward=brightness", f"holdout=[sharpness, {DARK}]"),
    ("reward=brightness", "draft.steps=2", "draft.reward=area(red) > 0.1"),
    ("reward=rank_ensemble", "reward.rewards=[brightness, 'area(red) > 0.1']"),
    ("reward=brightness", "draft.steps=2", "draft.reward={name: rank_ensemble, rewards: [brightness, sharpness]}"),
], ids=lambda more: " ".join(more)[:60])  # fmt: skip
def test_programs_and_long_texts_stand_wherever_rewards_do(
    command: Any, toy_folder: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    few = ("sampler=random_search", "sampler.candidates=2")
    result = command("generate", *BASE[:2], "out=one", f"model={toy_folder}", *few, *more)
    assert result.code == 0, result.err
    assert lines(tmp_path / "one")[0]["reward"] is not None


@pytest.mark.parametrize("more, said", [
    (("reward=rank_ensemble", "reward.rewards=[clip, brightness]", "reward.shares=[a, b]"), "2 positive numbers"),
    (("reward=rank_ensemble", "reward.rewards=[clip, brightness]", "reward.shares=[1, .inf]"), "2 positive numbers"),
    (("sampler=fk", "reward=rank_ensemble", "reward.rewards=brightness"), "rewards=brightness; wanted a list"),
    (("sampler=fk", "budget.evals=10"), "budget. has no effect: sampler=fk is no search"),
    (("sampler=fk", "draft.steps=2"), "draft. has no effect"),
    (("sampler=zero_order", "budget.evals=0"), "budget: evals=0; it must be above 0"),
    (("sampler=zero_order", "budget.evals=abc"), "budget.evals"),
    (("sampler=zero_order", "sampler.proposal=additive"), "adds variance"),
    (("sampler=zero_order", "budget.evals=3"), "does not pay for one sample: that takes evals=8"),
    (("sampler=random_search", "draft.use=false", "draft.steps=2"), "draft.steps has no effect"),
    (("sampler=random_search", "draft.steps=2", "draft.share=0.5"), "two lengths"),
    (("sampler=random_search", "draft.reward=clipp"), "draft.reward=clipp is unknown; did you mean 'clip'?"),
    (("sampler=beam", "draft.steps=2"), "no function of the first noise"),
    (("sampler=stages", "sampler.stages=[{name: zero_ordr}]"), "did you mean 'zero_order'?"),
    (("sampler=stages",), "give one sampler or more"),
    (("sampler=reno",), "compressibility has none"),
    (("sampler=random_search", "reward=area(red) >"), "program: it ends where"),
    (("sampler=random_search", "guide=mpgd"), "no gradient guidance"),
    (("sampler=none", "noise_network=x"), "noise_network wants a sampler"),
    (("sampler=random_search", "noise_network=nowhere.safetensors"), "noise network nowhere.safetensors"),
    (("sampler=random_search", "noise_network=shapes-turbo"), "noise_network=shapes-turbo is one of that model, and this is"),
])  # fmt: skip
def test_what_is_refused_in_a_line(command: Any, toy_folder: Path, more: tuple[str, ...], said: str) -> None:
    result = run(command, f"model={toy_folder}", *more)
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1, result.err


@pytest.mark.parametrize("at", [1, 3])
def test_what_a_stopped_search_has_found_stays_and_is_done_again(
    command: Any, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    from diffsteer.rewards import Compressibility

    calls, score = [0], Compressibility.score

    def impatient(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return score(self, *args)

    monkeypatch.setattr(Compressibility, "score", impatient)
    stopped = run(command, f"model={toy_folder}", "sampler=zero_order", "sampler.rounds=4")
    assert stopped.code == 130 and "goes on" in stopped.err and "was stopped after" in stopped.err
    assert ("a plain chain" in stopped.err) == (at == 1)
    assert lines(tmp_path / "one")[0]["search"]["stopped"] == "interrupted"
    monkeypatch.setattr(Compressibility, "score", score)
    finished = run(command, f"model={toy_folder}", "sampler=zero_order", "sampler.rounds=4")
    (entry,) = lines(tmp_path / "one")
    assert finished.code == 0 and entry["search"]["stopped"] == "done" and entry["search"]["spent"]["evals"] == 17 * 8
