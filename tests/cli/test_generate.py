"""`diffsteer generate`: what it writes, and that it writes what the Python face makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import AutoencoderTiny
from omegaconf import OmegaConf
from PIL import Image

import diffsteer
from diffsteer import SteeredPipeline, __version__, load_pipeline
from diffsteer.cli import main
from diffsteer.config import build, register_schemas
from diffsteer.registry import registered
from diffsteer.rewards import ClipScore, Compressibility
from diffsteer.rng import generator
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.shapes import models

PROMPT = "a red circle, left of (a) 'blue' square = ${oc.env:HOME} é"


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_one_prompt_equals_the_python_face(generate: Any, manifest: Any, toy_folder: Path, tmp_path: Path) -> None:
    result = generate(f"prompt={PROMPT}", "seed=5", "out=o")
    assert (result.code, result.err) == (0, "")
    assert "1 prompt, fk with 2 particles: 16 evaluations" in result.out  # 2 particles, 4 steps, guided
    steered = SteeredPipeline(load_pipeline(toy_folder), FeynmanKac(particles=2), Compressibility())
    out = steered(PROMPT, num_inference_steps=4, seed=5)
    [entry] = manifest(tmp_path / "o")
    chosen = int(out.chosen[0])
    assert (entry["id"], entry["prompt"], entry["seed"], entry["image"]) == (0, PROMPT, 5, "images/000.png")
    assert entry["reward"] == float(out.rewards[0, chosen])
    assert entry["log_weight"] == float(out.log_weights[0, chosen])
    assert entry["log_z"] == float(out.log_z[0])
    assert entry["ledger"] == {"evaluations": 16, "decodes": 6, "reward_calls": 6}
    assert len(entry["settings"]) == 64
    assert out.images is not None and pixels(tmp_path / "o/images/000.png") == out.images[0].tobytes()
    made = [".hydra", ".leases", "grid.png", "images", "manifest.jsonl", "run.json", "timings.jsonl", "trace"]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == made
    assert '"seconds"' in (tmp_path / "o/timings.jsonl").read_text()
    assert OmegaConf.load(tmp_path / "o/.hydra/config.yaml").prompt == PROMPT
    assert sorted(p.name for p in (tmp_path / "o/.hydra").iterdir()) == ["config.yaml", "hydra.yaml", "overrides.yaml"]


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**small, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "a tiny")
    return tmp_path / "a tiny"


@pytest.mark.parametrize("option", ["transition=native", "decoder=tiny", "chunk=auto"])
def test_options_reach_the_python_face(
    option: str, generate: Any, manifest: Any, toy_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    name, _, value = option.partition("=")
    value += f":{tiny_folder}" if value == "tiny" else ""
    assert generate("prompt=a star", "out=plain").code == 0
    result = generate("prompt=a star", f"{name}={value}", "out=o")
    assert (result.code, result.err) == (0, "")
    given: dict[str, Any] = {name: value}
    steered = SteeredPipeline(load_pipeline(toy_folder), FeynmanKac(particles=2), Compressibility(), **given)
    out = steered("a star", num_inference_steps=4, seed=0)
    assert out.images is not None and pixels(tmp_path / "o/images/000.png") == out.images[0].tobytes()
    [entry], [plain] = manifest(tmp_path / "o"), manifest(tmp_path / "plain")
    assert entry["log_z"] == float(out.log_z[0])
    assert (entry["log_z"] == plain["log_z"]) == (name == "chunk")


def test_no_sampler_is_the_plain_pipeline(command: Any, toy_folder: Path, tmp_path: Path) -> None:
    def plain(given: torch.Generator) -> bytes:
        image = load_pipeline(toy_folder)("a star", num_inference_steps=4, generator=given).images[0]
        return bytes(image.tobytes())

    toy = (f"model={toy_folder}", "reward=compressibility", "num_inference_steps=4", "sampler=none", "seed=3")
    assert command("generate", *toy, "prompt=a star", "out=one").code == 0
    assert pixels(tmp_path / "one/images/000.png") == plain(torch.Generator().manual_seed(3))
    (tmp_path / "two.txt").write_text("a ring\n\na star\n")
    assert command("generate", *toy, "prompts=two.txt", "out=two").code == 0
    assert pixels(tmp_path / "two/images/001.png") == plain(generator(3, 1))


def test_prompts_of_a_jsonl_file_keep_their_ids(generate: Any, manifest: Any, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a star, a ring", "id": "x"}\n\n{"prompt": "a ring"}\n')
    assert generate("prompts=p.jsonl", "out=o", "output=all").code == 0
    first, second = manifest(tmp_path / "o")
    assert (first["id"], first["prompt"], first["image"]) == ("x", "a star, a ring", "images/000.png")
    assert (second["id"], second["image"]) == (1, "images/001.png")
    particles = [pixels(tmp_path / "o" / p["image"]) for p in first["particles"]]
    best = max(range(2), key=lambda k: first["particles"][k]["reward"])
    assert len(set(particles)) == 2 and pixels(tmp_path / "o" / first["image"]) == particles[best]


def test_a_sweep_gives_each_job_its_folder(generate: Any, manifest: Any, tmp_path: Path) -> None:
    result = generate("prompt=a star, a ring", "-m", "sampler=fk,best_of_n", "out=sweep")
    assert (result.code, result.err) == (0, "")
    entries = [manifest(tmp_path / "sweep" / job)[0] for job in ("0", "1")]
    assert [e["prompt"] for e in entries] == ["a star, a ring"] * 2
    assert [e["ledger"]["decodes"] for e in entries] == [6, 2]
    assert [OmegaConf.load(tmp_path / f"sweep/{i}/.hydra/config.yaml").sampler.name for i in (0, 1)] == ["fk", "best_of_n"]


def test_a_job_that_fails_does_not_stop_a_sweep(generate: Any, manifest: Any, tmp_path: Path) -> None:
    result = generate("prompt=a star", "sampler.eta=0,1", "-m", "out=sweep")
    assert result.code == 2 and "eta=0" in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "sweep/0").exists() and len(manifest(tmp_path / "sweep/1")) == 1


def test_the_reference_settings_of_feynman_kac(command: Any) -> None:
    result = command("generate", "experiment=fk_paper", "--cfg", "job")
    config = OmegaConf.create(result.out)
    assert config.num_inference_steps == 100 and config.sampler.name == "fk"
    wanted = FeynmanKac(4, "max", 10.0, None, "multinomial", "always", events=(0.2, 0.4, 0.6, 0.8), eta=1.0)
    assert build("sampler", config.sampler) == wanted


@pytest.mark.parametrize("kind", ["sampler", "reward"])
def test_each_option_is_its_class_with_its_own_defaults(kind: str, command: Any) -> None:
    register_schemas()
    needed: dict[str, Any] = {"stages": {"stages": ["fk"]}, "program": {"text": "area(red) > 0.1"}}
    needed["rank_ensemble"] = {"rewards": ["clip", "compressibility"]}
    for name, cls in registered(kind).items():
        config = OmegaConf.create(command("generate", f"{kind}={name}", "--cfg", "job").out)
        given = needed.get(name, {})
        config[kind].merge_with(given)
        built = build(kind, config[kind])
        both = {"rewards": [ClipScore(), Compressibility()]}
        own: dict[str, Any] = {"stages": {"stages": (FeynmanKac(),)}, "rank_ensemble": both}
        assert type(built) is cls and repr(built) == repr(cls(**own.get(name, given)))


def test_hydras_own_flags(command: Any, tmp_path: Path) -> None:
    job = command("generate", "prompt=a,b ${c}", "--cfg", "job", "sampler=best_of_n", "model=some/where")
    config = OmegaConf.create(job.out)
    assert job.code == 0 and (config.prompt, config.sampler.name, config.model.path) == ("a,b ${c}", "best_of_n", "some/where")
    info = command("generate", "--info", "defaults")
    assert info.code == 0 and "sampler/fk" in info.out
    helped = command("generate", "--help")
    assert (
        helped.code == 0
        and "sampler: beam, best_of_n, d_flow, depth_first, dno, dps" in helped.out
        and "num_inference_steps: null" in helped.out
    )
    (tmp_path / "mine/sampler").mkdir(parents=True)
    (tmp_path / "mine/sampler/wide.yaml").write_text("name: fk\nparticles: 16\n")
    mine = OmegaConf.create(command("generate", "-cd", "mine", "sampler=wide", "--cfg", "job").out)
    assert build("sampler", mine.sampler) == FeynmanKac(particles=16)
    assert not (tmp_path / "outputs").exists()


def test_without_arguments_six_captions_are_compared(
    command: Any, manifest: Any, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.MODELS, "shapes", toy_folder)
    monkeypatch.setattr(models, "_defaults", lambda: {"shapes": {"num_inference_steps": 3, "guidance_scale": 2.0}})
    result = command("generate", "reward=compressibility", "out=demo", "batch=4")
    assert (result.code, result.err) == (0, "")
    plain, steered = manifest(tmp_path / "demo/plain"), manifest(tmp_path / "demo")
    pipe = load_pipeline("shapes")
    for kept, entries in ((BestOfN(particles=1), plain), (FeynmanKac(), steered)):
        out = SteeredPipeline(pipe, kept, Compressibility())(entries[2]["prompt"], seed=0, ids=[2])
        assert entries[2]["reward"] == pytest.approx(float(out.rewards[0, out.chosen[0]]), abs=0.01)
    rows = [line for line in result.out.splitlines() if line.startswith("a ") or line.startswith("three ")]
    assert [row.split("  ")[0] for row in rows] == [e["prompt"] for e in steered] and len(rows) == 6
    assert all(row.count("wrong: ") == 2 for row in rows)  # random weights draw no star
    assert all(row.endswith(f"{p['reward']:.3f}, {s['reward']:.3f}") for row, p, s in zip(rows, plain, steered, strict=True))
    with Image.open(tmp_path / "demo/grid.png") as grid, Image.open(tmp_path / "demo/plain/grid.png") as alone:
        assert grid.width == alone.width and grid.height > alone.height + 150


def test_lists_state_facts(command: Any) -> None:
    samplers = command("list", "samplers").out
    assert "motion             freedom with strength=" in samplers
    assert "fk" in samplers and "arXiv 2501.06848" in samplers and "target_ess=0.5" in samplers and "a heuristic" in samplers
    rewards = command("list", "rewards").out
    assert all(name in rewards for name in registered("reward")) and "quality=95" in rewards and "licence" in rewards
    schedules = command("list", "schedules").out
    assert "Sabour et al." in schedules and "rho=7.0" in schedules and "loss_mass" in schedules
    shown = command("list", "models").out
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in shown and all(str(path) in shown for path in models.MODELS.values())


def python(cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    path = os.environ | {"PYTHONPATH": str(Path(diffsteer.__file__).parents[1])}
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=path, capture_output=True, text=True)


def test_a_real_process(toy_folder: Path, tmp_path: Path) -> None:
    version = python(tmp_path, "-m", "diffsteer", "--version")
    assert (version.returncode, version.stdout) == (0, f"diffsteer {__version__}\n")
    toy = (f"model={toy_folder}", "reward=compressibility", "num_inference_steps=2", "sampler.particles=2")
    made = python(tmp_path, "-m", "diffsteer", "generate", *toy, f"prompt={PROMPT}", "out=o")
    assert made.returncode == 0, made.stderr
    assert OmegaConf.load(tmp_path / "o/.hydra/config.yaml").prompt == PROMPT
    wrong = python(tmp_path, "-m", "diffsteer", "generate", *toy, "prompt=a star", "sampler=fkk")
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr.count("\n") == 1 and "'fk'" in wrong.stderr


def test_a_version_among_the_flags_is_ours_and_not_hydras(capsys: Any) -> None:
    for argv in (["generate", "prompt=a star", "-m", "--vers"], ["tune", "--version"], ["evaluate", "--version"]):
        assert main(argv) == 0 and capsys.readouterr().out == f"diffsteer {__version__}\n"


def test_the_version_does_not_import_torch(tmp_path: Path) -> None:
    code = "import sys, diffsteer.cli as c; c.main(['--version']); c.main(['--help']); print('torch' in sys.modules)"
    assert python(tmp_path, "-c", code).stdout.endswith("False\n")


def test_a_plug_in_is_an_option_like_any_other(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(eq=False)
    class Glow(Compressibility):
        weight: float = 2.0
        name: ClassVar[str] = "glow"

    class Point:
        name, value = "glow", "elsewhere:Glow"
        load = staticmethod(lambda: Glow)

    monkeypatch.setattr("diffsteer.registry.entry_points", lambda group: [Point()] if group == "diffsteer.rewards" else [])
    config = OmegaConf.create(command("generate", "reward=glow", "reward.weight=3", "--cfg", "job").out)
    built = build("reward", config.reward)
    assert type(built) is Glow and built.weight == 3.0
    assert command("generate", "reward=glow", "reward.weight=much").code == 2
    assert "glow" in command("list", "rewards").out


def test_an_option_of_ones_own_may_look_like_an_expression(generate: Any, tmp_path: Path) -> None:
    (tmp_path / "own" / "reward").mkdir(parents=True)
    (tmp_path / "own" / "reward" / "half-brightness.yaml").write_text("name: compressibility\nquality: 20\n")
    result = generate("prompt=a star", "--config-dir=own", "reward=half-brightness", "--cfg=job")
    assert result.code == 0 and "quality: 20" in result.out
    assert "half" in generate("prompt=a star", "reward=half-brightness").err  # which is no reward


def test_expressions_and_rewards_that_look_on(command: Any, manifest: Any, tmp_path: Path) -> None:
    """The scales of z-scores are measured once a folder; what looks on changes nothing, and its gains stand in the manifest."""
    (tmp_path / "p.txt").write_text("a red circle\na blue ring\n")
    fixed = ("generate", "prompts=p.txt", "num_inference_steps=4", "sampler.particles=2", "deterministic=true")
    text = "reward=clip + 0.3*z(sharpness)"
    made = command(*fixed, text, "holdout=[clip2,checker,z(brightness)]", "out=o")
    assert made.code == 0 and made.out.count("measured first, on unguided samples") == 2, made.err
    (scale,) = json.loads((tmp_path / "o/scales.json").read_text())["scales"]
    assert scale["name"] == "z(sharpness)" and scale["std"] > 0
    entries = manifest(tmp_path / "o")
    assert all(set(e["held_out"]) == {"clip2", "checker", "z(brightness)"} and "gain" in e["selected"] for e in entries)
    assert all(e["held_out"]["checker"]["score"] in (0.0, 1.0) and e["ledger"]["held_out_calls"] > 0 for e in entries)
    alone = command(*fixed, text, "out=alone")
    assert alone.code == 0 and [e["reward"] for e in manifest(tmp_path / "alone")] == [e["reward"] for e in entries]
    (tmp_path / "p.txt").write_text("a red circle\na blue ring\na star\n")
    more = command(*fixed, text, "holdout=[clip2,checker,z(brightness)]", "out=o")
    assert more.code == 0 and "measured" not in more.out and len(manifest(tmp_path / "o")) == 3
    for wrong, said in (
        (["reward=clip + 0.3*z(sharpnes)"], "did you mean 'sharpness'"),
        (["reward=clip +"], "something is missing at the end"),
        (["holdout=clpi2"], "holdout=clpi2 is unknown; did you mean 'clip2'"),
        (["holdout=[clip2,clip2]"], "two rewards are called clip2"),
        (["holdout=checker"], "'nice' is no word of the shapes world"),
    ):
        (tmp_path / "p.txt").write_text("a nice dog\n" if wrong == ["holdout=checker"] else "a star\n")
        result = command(*fixed, *wrong, "out=wrong")
        assert result.code == 2 and said in result.err and result.err.count("\n") == 1, result.err
