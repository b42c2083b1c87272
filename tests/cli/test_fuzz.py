"""Any command line and any file of prompts end in results or in one clear line; never in a traceback."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diffsteer.cli import main
from diffsteer.types import DiffsteerError

KEYS_TEXT = r"""
prompt prompts model sampler reward guide schedule seed out output batch chunk deterministic device decoder
transition noise negative_prompt num_inference_steps guidance_scale holdout report sinks sigmas timesteps video
reference reference_share budget.evals budget.seconds budget draft.steps draft.use draft.model draft.reward
call.height call call.width noise_network sampler.particles sampler.eta sampler.events sampler.potential
sampler.name sampler.stages sampler.iterations reward.text reward.resize reward.target reward.name reward.head
reward.rewards model.path model.dtype schedule.rho guide.strength experiment hydra.run.dir hydra.job.chdir
tune.trials tune.holdout evaluate.samplers evaluate.budgets evaluate.seeds evaluate.features evaluate.reference evaluate.axes
evaluate.neighbours evaluate samplr reward.nope +new ~seed ++call.x hydra.nope
"""
KEYS = KEYS_TEXT.split()
VALUES_TEXT = r"""
null true false 0 1 -1 2.5 1e9 nan inf '' "" [] [1,2] {a:1} {} ??? ${seed} ${oc.env:HOME} ${nope} a,b 'a,b' fk
best_of_n none random_search reno stages clip clip2 aesthetic checker shapes shapes-flow shapes-turbo path best all
draw auto tiny tiny:x own native eta quadratic gif mp4 karras ays cpu cuda float16 squash webdataset [webdataset]
[clip2,checker] [none,fk] {one:fk,two:none} [{name:fk,particles:2}] [2,4] colours inception vendi
[vendi,reward] clip+clip2 0.5*clip z(clip) clip( all_of(area(red)>area(blue)) left_of(red, area(red)>0.1
program(text='x') p.txt p.jsonl p.csv nowhere.txt ../x
"""
VALUES = VALUES_TEXT.split()
FLAGS = [
    "-m",
    "--cfg",
    "--cfg=job",
    "--help",
    "--info",
    "--resolve",
    "--nope",
    "-x",
    "--config-dir=.",
    "--config-name=nope",
    "-p",
]

words = st.one_of(st.sampled_from(VALUES), st.text(max_size=12), st.integers().map(str), st.floats().map(str))
arguments = st.one_of(
    st.tuples(st.sampled_from(KEYS), words).map("=".join),
    st.tuples(st.text(max_size=6), words).map("=".join),
    st.sampled_from(FLAGS),
    st.text(max_size=10),
)
commands = st.sampled_from(
    ["generate", "generate", "generate", "tune", "evaluate", "list", "status", "report", "comfy", "generat", ""]
)
lines = st.tuples(commands, st.lists(arguments, max_size=5)).map(lambda t: [t[0], *t[1]])
cells = st.one_of(
    st.text(max_size=20),
    st.integers(),
    st.floats(),
    st.none(),
    st.booleans(),
    st.sampled_from(["a red star", "", " ", 10**400, json.loads("[" * 500 + "]" * 500)]),
)
objects = st.dictionaries(
    st.sampled_from(["prompt", "id", "seed", "reward", "width", "guidance_scale", "x"]), cells, max_size=4
)
files = st.one_of(
    st.tuples(st.just("p.jsonl"), st.lists(objects.map(lambda o: json.dumps(o).encode()), max_size=4).map(b"\n".join)),
    st.tuples(st.sampled_from(["p.jsonl", "p.csv", "p.tsv", "p.txt", "p.json", "p.tar", "p.parquet"]), st.binary(max_size=120)),
    st.tuples(
        st.sampled_from(["p.csv", "p.tsv"]), st.lists(st.text(max_size=30), max_size=5).map(lambda t: "\n".join(t).encode())
    ),
)


class Stop(DiffsteerError):
    """Where a model would be loaded."""


@pytest.fixture
def before_any_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[[list[str]], None]:
    """Run a command up to where a model would be loaded, and look at how it ended."""

    def stop(*args: Any, **options: Any) -> Any:
        raise Stop("a model would be loaded here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Hydra's handlers keep the stream of an earlier command
    for name in ("diffsteer.generate.load", "diffsteer.tune.load", "diffsteer.evaluation.bench.load"):
        monkeypatch.setattr(name, stop)
    (tmp_path / "p.txt").write_text("a red star\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red star", "seed": 3}\n')
    (tmp_path / "p.csv").write_text("prompt,seed\na red star,3\n")

    def run(argv: list[str]) -> None:
        capsys.readouterr()
        code = main(argv)
        said = capsys.readouterr()
        assert code in (0, 1, 2, 130) and "Traceback" not in said.err + said.out, (argv, said)
        wrong = [line for line in said.err.splitlines() if line.startswith("diffsteer: ") and "warning" not in line]
        if code:
            assert wrong or said.out, (argv, said)
            assert not any("HYDRA_FULL_ERROR" in line for line in wrong), (argv, said)  # a failure that nobody thought of

    return run


SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(lines)
@example(["generate", "model=[{name:fk,particles:2}]"])
@example(["generate", "prompt=a", "+sampler=shapes,[1]", "-m"])
@example(["tune", "-m", "--version"])
def test_any_command_line_ends_in_a_line(before_any_model: Any, argv: list[str]) -> None:
    before_any_model(argv)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(files, st.lists(arguments, max_size=1))
def test_any_file_of_prompts_ends_in_a_line(before_any_model: Any, file: tuple[str, bytes], more: list[str]) -> None:
    Path(file[0]).write_bytes(file[1])
    before_any_model(["generate", f"prompts={file[0]}", "out=o", *more])


@pytest.mark.slow
@settings(max_examples=4000, deadline=None, suppress_health_check=SLOW)
@given(lines)
def test_four_thousand_command_lines(before_any_model: Any, argv: list[str]) -> None:
    before_any_model(argv)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=SLOW)
@given(files, st.lists(arguments, max_size=1))
def test_a_thousand_files_of_prompts(before_any_model: Any, file: tuple[str, bytes], more: list[str]) -> None:
    Path(file[0]).write_bytes(file[1])
    before_any_model(["generate", f"prompts={file[0]}", "out=o", *more])


@pytest.mark.slow
def test_twenty_command_lines_in_processes_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red star\n")
    draws, env = random.Random(5), os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(20):
        given = [f"{draws.choice(KEYS)}={draws.choice(VALUES)}" for _ in range(draws.randint(1, 3))]
        fixed = ["generate", "num_inference_steps=2", "sampler.particles=2", "prompts=p.txt", "out=o"]
        argv = [*fixed, *(g for g in given if "\x00" not in g)]
        done = subprocess.run([sys.executable, "-m", "diffsteer", *argv], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode in (0, 1, 2) and "Traceback" not in done.stderr + done.stdout, (argv, done)
