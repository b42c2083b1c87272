"""What is done beside the next denoising: files, and where there is room, decoding and scoring. Nothing is lost by it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_files import rows

from diffsteer import SteeredPipeline
from diffsteer.batch import Maker, generate
from diffsteer.folder import Folder, paced
from diffsteer.leases import has_spare_cores
from diffsteer.prompts import Item
from diffsteer.reward import ZScore, is_elsewhere
from diffsteer.rewards import Brightness, ClipScore, RemoteJudge
from diffsteer.rewards.open_clip_model import Texts
from diffsteer.run import SteeredOutput
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.types import FailedError, RewardError

SOON = 10.0  # seconds after which something is not beside anything


@pytest.fixture(scope="module")
def made(toy_pipeline: Any) -> SteeredOutput:
    return SteeredPipeline(toy_pipeline, BestOfN(1), Brightness())(["a"], seed=0, num_inference_steps=2)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path, rows(3), "s")


def names(folder: Folder) -> list[Any]:
    return [json.loads(line)["id"] for line in (folder.path / "manifest.jsonl").read_text().splitlines()]


def test_files_are_written_while_the_next_prompt_is_made(
    folder: Folder, made: SteeredOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first prompt is not on disk before the second has begun; it would wait in vain if it had to be."""
    begun, usual, seen = threading.Event(), Folder.add, []

    def add(self: Folder, items: Sequence[Item], *rest: Any) -> None:
        if items[0].id == 0:
            seen.append(begun.wait(SOON))
        usual(self, items, *rest)

    def begin(items: Sequence[Item]) -> Callable[[], SteeredOutput]:
        if items[0].id == 1:
            begun.set()
        return lambda: made

    monkeypatch.setattr(Folder, "add", add)
    generate(begin, folder, seed=0, output="best")
    assert seen == [True] and names(folder) == [0, 1, 2]


@pytest.mark.parametrize("ahead", [True, False])
def test_scores_are_waited_for_beside_the_next_prompt_only_where_that_is_asked(
    folder: Folder, made: SteeredOutput, ahead: bool
) -> None:
    order: list[str] = []

    def begin(items: Sequence[Item]) -> Callable[[], SteeredOutput]:
        order.append(f"begin {items[0].id}")

        def rest() -> SteeredOutput:
            for _ in range(100):
                if not ahead or items[0].id == 2 or f"begin {items[0].index + 1}" in order:
                    break
                time.sleep(SOON / 100)
            order.append(f"end {items[0].id}")
            return made

        return rest

    done: list[int] = []
    generate(begin, folder, seed=0, output="best", ahead=ahead, done=done.append)
    one_by_one = [f"{what} {n}" for n in range(3) for what in ("begin", "end")]
    assert order == (["begin 0", "begin 1", "end 0", "begin 2", "end 1", "end 2"] if ahead else one_by_one)
    assert names(folder) == [0, 1, 2] and done == [1, 1, 1]


@pytest.mark.parametrize("ahead", [True, False])
def test_a_failure_at_the_end_is_the_prompts_own(folder: Folder, made: SteeredOutput, ahead: bool) -> None:
    """One of a batch of two fails when it is scored: it is noted, its neighbour and the others are made."""

    def begin(items: Sequence[Item]) -> Callable[[], SteeredOutput]:
        asked.append([int(item.id) for item in items])

        def rest() -> SteeredOutput:
            if any(item.id == 1 for item in items):
                raise RewardError("no score")
            return made

        return rest

    asked: list[list[int]] = []
    with pytest.raises(FailedError, match="1 of 3 prompts failed"):
        generate(begin, folder, seed=0, output="best", batch=2, ahead=ahead)
    assert asked[0] == [0, 1] and [0] in asked and [1] in asked and [2] in asked and len(asked) == 4
    assert sorted(names(folder)) == [0, 2] and list(folder.failed) == [1]
    assert not list((folder.path / ".leases").glob("[0-9]*.json"))


def test_what_was_on_its_way_is_kept_when_the_next_one_is_stopped(folder: Folder, made: SteeredOutput) -> None:
    def begin(items: Sequence[Item]) -> Callable[[], SteeredOutput]:
        if items[0].id == 1:
            raise KeyboardInterrupt
        return lambda: made

    with pytest.raises(KeyboardInterrupt):
        generate(begin, folder, seed=0, output="best", ahead=True)
    assert names(folder) == [0]


def test_what_was_made_is_kept_when_waiting_for_the_writer_is_stopped(
    folder: Folder, made: SteeredOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the first prompt is written and the second one is ready: both are on disk afterwards."""
    usual, settle = Folder.add, Maker.settle
    stopped: list[bool] = []

    def slow(self: Folder, *rest: Any) -> None:
        time.sleep(0.2)
        usual(self, *rest)

    def interrupted(self: Maker) -> bool:
        if self.before is not None and not stopped:
            stopped.append(True)
            self.before = None
            raise KeyboardInterrupt
        return settle(self)

    monkeypatch.setattr(Folder, "add", slow)
    monkeypatch.setattr(Maker, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(lambda items: lambda: made, folder, seed=0, output="best")
    assert names(folder) == [0, 1]


ONCE = [("best_of_n", True), ("none", True), ("fk", False), ("mpgd", False), ("beam", False)]


@pytest.mark.parametrize("sampler, once", ONCE)
def test_only_what_looks_once_runs_ahead(
    command: Any, toy_folder: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, once: bool
) -> None:
    """With cores to spare; the pictures, and but for a search's seconds the manifest, are those of a run that did not."""
    seen: list[bool] = []
    usual = generate

    def noted(*args: Any, ahead: bool, **more: Any) -> None:
        seen.append(ahead)
        usual(*args, ahead=ahead, **more)

    monkeypatch.setattr("diffsteer.job.generate", noted)
    options = ["prompts=p.txt", f"sampler={sampler}", "deterministic=true", "reward=brightness", f"model={toy_folder}"]
    Path("p.txt").write_text("a star\na ring\na cross\n")
    for spare, out in ((True, "a"), (False, "b")):
        monkeypatch.setattr("diffsteer.job.has_spare_cores", lambda spare=spare: spare)
        result = command("generate", *options, "num_inference_steps=4", f"out={out}")
        assert result.code == 0, result.err
    assert seen == [once, False]
    for name in ("images/000.png", "images/002.png", *(["manifest.jsonl"] if sampler != "beam" else [])):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes(), name


def test_texts_may_be_forgotten_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the next batch's `prepare`, between two of a batch that is scored in another thread."""
    monkeypatch.setattr("diffsteer.rewards.open_clip_model.MANY_TEXTS", 1)

    def encode(prompt: str) -> torch.Tensor:
        texts.forget_all_but([])
        return torch.tensor([float(len(prompt))])

    texts = Texts(encode)
    assert texts(["a", "bb", "ccc", "a"]).flatten().tolist() == [1, 2, 3, 1]


def test_a_full_disk_stops_it(folder: Folder, made: SteeredOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def add(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "add", add)
    with pytest.raises(OSError, match="No space left"):
        generate(lambda items: asked.append(items[0].id) or (lambda: made), folder, seed=0, output="best")  # type: ignore[func-returns-value]
    assert asked in ([0], [0, 1]) and folder.failed == {}


@pytest.mark.parametrize("sampler", [None, BestOfN(2), FeynmanKac(3)], ids=str)
def test_the_end_can_be_done_in_another_thread(toy_pipeline: Any, sampler: Any) -> None:
    """The last states are not scored before; then all is as in one call, bit by bit."""
    looked: list[str] = []

    def reward(x: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        looked.append(threading.current_thread().name)
        return x.flatten(1).mean(1)

    steered = SteeredPipeline(toy_pipeline, sampler, reward)
    whole = steered(["a", "b"], seed=3, num_inference_steps=6)
    on_the_way = len(looked) - 1
    looked.clear()
    rest = steered.begin(["a", "b"], seed=3, num_inference_steps=6)
    assert looked == ["MainThread"] * on_the_way
    found: list[SteeredOutput] = []
    thread = threading.Thread(target=lambda: found.append(rest()), name="other")
    thread.start()
    thread.join()
    (parts,) = found
    assert looked[on_the_way:] == ["other"]
    for name in ("samples", "latents", "rewards", "log_weights", "log_z", "chosen"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    assert whole.ledger.counts == parts.ledger.counts and len(whole.trace.events) == len(parts.trace.events)


def test_rewards_that_are_elsewhere() -> None:
    cpu = torch.device("cpu")
    judge = RemoteJudge(url="http://127.0.0.1:9", model="m")
    assert is_elsewhere(cpu, judge) and is_elsewhere(cpu, Brightness() + 0.5 * ZScore(judge, 0.0, 1.0))
    assert not is_elsewhere(cpu, Brightness(), None) and not is_elsewhere(cpu, ClipScore(device="cpu"))
    assert is_elsewhere(torch.device("cuda", 0), ClipScore(device="cpu"))
    assert is_elsewhere(torch.device("cuda", 0), ClipScore(device="cuda:1"))
    assert not is_elsewhere(torch.device("cuda", 0), ClipScore(device="cuda"))


def test_cores_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight with two processes here, each may use four."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for threads, spare in ((1, True), (3, True), (4, False)):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        assert has_spare_cores() is spare


def test_the_pace_counts_what_was_waited_for() -> None:
    """Two calls of 3 s each, half of it in the denoiser, that overlapped: 4 s passed."""
    seconds = {"total": 3.0, "denoiser": 1.5}
    assert paced([{"ids": [1], "seconds": seconds, "wall": w} for w in (3.0, 1.0)]) == pytest.approx((0.5, 0.25))
    assert paced([{"ids": [1], "seconds": seconds}]) == pytest.approx((1 / 3, 0.5))
