"""A run that is killed at any moment, and several that share a folder."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psutil
import pytest
from prompt_files import rows

from diffsteer.leases import Leases, _born

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


def asked(toy_folder: Path, tmp_path: Path, prompts: int, *sampler: str) -> list[str]:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"a star {i}", "id": i}) + "\n" for i in range(prompts)))
    common = ["generate", f"model={toy_folder}", "reward=compressibility", "num_inference_steps=4"]
    common += sampler or ["sampler.particles=2"]
    return [*common, f"prompts={tmp_path / 'p.jsonl'}", "deterministic=true", "output=all"]


def same_but_for_times(folder: Path, whole: Path) -> None:
    names = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    left = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} - set(names)
    assert all(p.name.endswith(".part") or p.parts[0] == ".leases" for p in left), left
    for name in names:
        if ".hydra" not in name.parts and name.name != "timings.jsonl" and name.parts[0] != ".leases":
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def killed_and_again(zygote: Any, toy_folder: Path, tmp_path: Path, kills: int, seed: int, *sampler: str) -> None:
    common = [*asked(toy_folder, tmp_path, 8, *sampler), "batch=2"]
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
    killed_and_again(zygote, toy_folder, tmp_path, kills=3, seed=1)


SEARCH = ("sampler=random_search", "sampler.candidates=3", "draft.finalists=2", "sinks=[webdataset]")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [(), SEARCH], ids=["particles", "search"])
def test_killed_at_twenty_random_moments_nothing_is_lost_or_done_twice(
    zygote: Any, toy_folder: Path, tmp_path: Path, sampler: tuple[str, ...]
) -> None:
    killed_and_again(zygote, toy_folder, tmp_path, 20, 2, *sampler)


# --------------------------------------------------------------------------------------------- several processes


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
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    elsewhere = one.me | {"host": "elsewhere", "pid": 1}  # nobody can tell: it runs out with time
    for holder, taken in (
        (one.me | {"pid": dead.pid}, False),
        (one.me | {"pid": zombie.pid, "born": _born(zombie.pid)}, False),  # whose parent has not asked after it
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


def test_a_clock_that_is_put_right_takes_nothing_from_the_living(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, items = Leases(tmp_path), rows(2)
    assert one.claim(items) == items
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 3)
    assert Leases(tmp_path).claim(items) == []
    for file in (tmp_path / ".leases").glob("*.json"):  # of another machine, whose files are dated by a clock that is ahead
        file.write_text(json.dumps(one.me | {"host": "elsewhere"}))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert Leases(tmp_path).claim(items) == []


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
    lost = set(range(12)) - set(timed)  # one, where the kill fell between a line of the manifest and what it took
    assert len(timed) == len(set(timed)) and len(lost) <= 1, "each once"
    left = [p.name for p in (out / ".leases").iterdir() if p.suffix == ".json"]
    assert sum(name.startswith("at-") for name in left) <= 1 and len(left) <= 2  # of the one that was killed


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers(launcher: str, toy_folder: Path, tmp_path: Path) -> None:
    """Two processes as `torchrun` and `accelerate launch` start them: each prompt once, the sinks written, one of them
    talks."""
    (tmp_path / "ranks.py").write_text("from diffsteer.leases import _born, rank\nprint('/'.join(map(str, rank())))\n")
    how = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "-m"],
        "accelerate": [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes=2",
            "--num_machines=1",
            "--mixed_precision=no",
            "--dynamo_backend=no",
            "--num_cpu_threads_per_process=1",
            "-m",
        ],
    }[launcher]
    told = subprocess.run([sys.executable, "-m", *how[:-1], str(tmp_path / "ranks.py")], capture_output=True, text=True)
    assert sorted(told.stdout.split()) == ["0/2", "1/2"], told.stderr
    command = [*asked(toy_folder, tmp_path, 6), "sinks=[webdataset]"]
    whole = subprocess.run(
        [sys.executable, "-m", "diffsteer", *command, f"out={tmp_path / 'whole'}"], capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    argv = [sys.executable, "-m", *how, "diffsteer", *command, f"out={tmp_path / 'o'}"]
    told = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("6 images") == 1
    same_but_for_times(tmp_path / "o", tmp_path / "whole")
    timed = [i for t in map(json.loads, (tmp_path / "o/timings.jsonl").read_text().splitlines()) for i in t["ids"]]
    assert sorted(timed) == list(range(6))


def done_in(folder: Path) -> list[dict[str, Any]]:
    path = folder / "manifest.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


def test_several_processes_want_a_folder(generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = generate("prompt=a star")
    assert result.code == 2 and result.err == "diffsteer: 2 processes work on one folder: give out=DIR\n"


@pytest.mark.slow
def test_a_sweep_of_hydra_in_processes(command: Any, toy_folder: Path, tmp_path: Path, manifest: Any) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (tmp_path / "p.txt").write_text("a star\n")
    small = [f"model={toy_folder}", "reward=compressibility", "num_inference_steps=4", "sampler.particles=2", "prompts=p.txt"]
    argv = [*small, "sampler=fk,best_of_n", "out=m", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = subprocess.run([sys.executable, "-m", "diffsteer", "generate", *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [len(manifest(tmp_path / "m" / str(job))) for job in (0, 1)] == [1, 1]
