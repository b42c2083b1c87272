"""The real ComfyUI, headless on the CPU: `make test-comfy`, with DIFFSTEER_COMFYUI naming a checkout.

Its Python (DIFFSTEER_COMFYUI_PYTHON, or a venv in or beside the checkout) must have diffsteer. Nothing is written into the
checkout: the pack, the models and the results lie in a folder of the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from server import Refused, Server

from diffsteer.comfy.examples import EXAMPLES, PROMPT
from diffsteer.comfy.graph import COMFYUI, Graph, Made, facts
from diffsteer.comfy.pack import doctor, export, python_of
from diffsteer.shapes.check import check

pytestmark = pytest.mark.comfy
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def comfyui() -> Path:
    return Path(os.environ["DIFFSTEER_COMFYUI"]).resolve()


@pytest.fixture(scope="session")
def python(comfyui: Path) -> Path:
    given = os.environ.get("DIFFSTEER_COMFYUI_PYTHON")
    return Path(given) if given else python_of(comfyui)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, comfyui: Path, python: Path) -> Path:
    """A folder with the pack, and with a small model in the layout that ComfyUI loads."""
    folder = tmp_path_factory.mktemp("comfy")
    (folder / "custom_nodes").mkdir()
    export(folder / "custom_nodes")
    subprocess.run([str(python), str(HERE / "make_checkpoint.py"), str(folder)], cwd=comfyui, check=True, capture_output=True)
    lines = ["diffsteer_tests:", f"  base_path: {folder}"]
    lines += [f"  {kind}: {kind}" for kind in ("custom_nodes", "checkpoints", "loras", "controlnet")]
    (folder / "paths.yaml").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def server(comfyui: Path, python: Path, place: Path) -> Iterator[Server]:
    running = Server(comfyui, python, place, "--extra-model-paths-config", str(place / "paths.yaml"))
    try:
        running.wait_until_up()
        yield running
    finally:
        running.stop()
        kept = os.environ.get("DIFFSTEER_COMFYUI_KEEP")  # a folder for what it printed and drew
        if kept:
            shutil.copytree(running.output, Path(kept) / "output", dirs_exist_ok=True)
            shutil.copy(running.log, kept)


def succeeded(result: dict[str, Any]) -> dict[str, Any]:
    assert result["status"]["status_str"] == "success", result["status"]["messages"]
    return result


def test_every_node_appears_as_it_is(server: Server) -> None:
    told = server.get("/object_info")
    for node in facts().values():
        assert node.id in told, node.id
        said = told[node.id]
        order = [name for group in ("required", "optional") for name in said["input_order"].get(group, [])]
        ours = [i.name for i in sorted(node.inputs, key=lambda i: i.optional)]
        known = node in COMFYUI
        assert order[: len(ours)] == ours if known else order == ours, node.id
        assert said["output"][: len(node.outputs)] == [kind for kind, _ in node.outputs]
        assert said["output_name"][: len(node.outputs)] == [name for _, name in node.outputs]
        for i in node.inputs:
            kind, *options = {**said["input"].get("required", {}), **said["input"].get("optional", {})}[i.name]
            shown = "COMBO" if isinstance(kind, list) else kind
            assert shown == i.type or i.type == "*", (node.id, i.name)
            if known and i.is_widget:
                controlled = bool(options and options[0].get("control_after_generate"))
                assert controlled == bool(i.options.get("control_after_generate")), (node.id, i.name)
        if not known:
            assert said["category"] == "diffsteer" and said["display_name"] == node.title and said["description"]
            assert said["python_module"] == "custom_nodes.diffsteer"


def test_the_doctor_agrees(place: Path) -> None:
    assert [text for well, text in doctor(place / "custom_nodes") if not well] == [
        f"{place / 'custom_nodes' / 'diffsteer'} lies in no custom_nodes folder of a ComfyUI, where it would be found"
    ]


def test_the_examples_are_offered_as_templates(server: Server) -> None:
    assert sorted(server.get("/workflow_templates")["diffsteer"]) == sorted(EXAMPLES)
    for name, make in EXAMPLES.items():
        assert server.get(f"/api/workflow_templates/diffsteer/{name}.json") == make().canvas()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_run(server: Server, name: str) -> None:
    graph = EXAMPLES[name]()
    result = succeeded(server.run(graph.api(), extra_pnginfo={"workflow": graph.canvas()}))
    files = server.files(result)
    pictures = [f for f in files if "lineage" not in f.name]
    assert len(pictures) == {"particles": 8, "score_and_sort": 8, "gradient_guidance": 4}.get(name, 1)
    for file in files:
        with Image.open(file) as image:
            said = {key: json.loads(text) for key, text in image.text.items()}  # type: ignore[attr-defined]
            assert said["prompt"] == graph.api() and said["workflow"] == graph.canvas()
            if file in pictures:
                assert image.size == (64, 64) and np.ptp(np.asarray(image.convert("RGB")), (0, 1)).max() > 100
                assert said["diffsteer"]["version"]
                if name not in ("score_and_sort", "gradient_guidance"):
                    assert said["diffsteer"]["settings"]["prompt"] == PROMPT
                    assert said["diffsteer"]["ledger"]["evaluations"] > 0


def test_a_run_of_the_command_line_is_a_graph_that_runs(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    argv = ["comfy", "graph", "prompt=a large purple square", "sampler.particles=3", "seed=1", "-o", str(file)]
    subprocess.run([sys.executable, "-m", "diffsteer", *argv], check=True, capture_output=True)
    (picture,) = server.files(succeeded(server.run(json.loads(file.read_text()))))
    with Image.open(picture) as image:
        assert check(image, "a large purple square").correct


def test_the_core_is_the_same(comfyui: Path, python: Path) -> None:
    done = subprocess.run([str(python), str(HERE / "same_core.py")], cwd=comfyui, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for told in json.loads(done.stdout.splitlines()[-1]).values():
        assert all(told["same ancestors"]) and any(told["resampled"])
        assert told["latents"] < 1e-4 and told["rewards"] < 1e-2 and told["counts"][0] == told["counts"][1]


def begin(rows: int = 4, name: str = "shapes") -> tuple[Graph, Made, dict[str, Any], Made]:
    """A graph with the embedded model, its conditions, and a reward."""
    graph = Graph()
    model = graph.add("DiffsteerShapes", model=name, batch_size=rows)
    positive = graph.add("CLIPTextEncode", text="a red circle", clip=model["clip"])
    negative = graph.add("CLIPTextEncode", clip=model["clip"])
    conditions = {"positive": positive["CONDITIONING"], "negative": negative["CONDITIONING"]}
    return graph, model, conditions, graph.add("DiffsteerReward_clip", model_name="shapes")


def steered(
    graph: Graph, model: Any, vae: Any, latent: Any, conditions: dict[str, Any], reward: Made, steps: int = 6, **more: Any
) -> dict[str, Any]:
    """The particle sampler in parts, in API form; the last node saves."""
    sampler = graph.add(
        "DiffsteerSampler_fk", reward=reward["reward"], vae=vae, prompt="a red circle", events="0.3, 0.6", **more
    )
    run = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("DiffsteerNoise", seed=1)["noise"],
        guider=graph.add("CFGGuider", model=model, **conditions, cfg=4.0)["GUIDER"],
        sampler=sampler["sampler"],
        sigmas=graph.add("BasicScheduler", model=model, steps=steps)["SIGMAS"],
        latent_image=latent,
    )
    kept = graph.add("DiffsteerSelect", latent=run["output"], steering=sampler["steering"])
    images = graph.add("VAEDecode", samples=kept["latent"], vae=vae)
    graph.add("DiffsteerSave", images=images["IMAGE"], run=kept["run"], filename_prefix="tests/x")
    return graph.api()


def latents_of(server: Server, graph: dict[str, Any]) -> list[float]:
    """The rewards of a run, from its picture."""
    (file,) = server.files(succeeded(server.run(graph)))
    with Image.open(file) as image:
        return list(json.loads(image.text["diffsteer"])["rewards"][0])  # type: ignore[attr-defined]


CHECKPOINT: dict[str, Any] = {
    "100": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "small.safetensors"}},
    "101": {
        "class_type": "LoraLoader",
        "inputs": {
            "model": ["100", 0],
            "clip": ["100", 1],
            "lora_name": "small.safetensors",
            "strength_model": 1.0,
            "strength_clip": 1.0,
        },
    },
    "102": {"class_type": "ControlNetLoader", "inputs": {"control_net_name": "small.safetensors"}},
    "103": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "104": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 4}},
    "105": {"class_type": "DiffsteerReward_compressibility", "inputs": {"quality": 90, "incompressible": False}},
}


def with_checkpoint(lora: bool = False, control: bool = False) -> dict[str, Any]:
    """The particle sampler on a model from a checkpoint file."""
    from diffsteer.comfy.graph import Link

    model = Link("101" if lora else "100", 0)
    graph = Graph()
    conditions = {}
    for which in ("positive", "negative"):
        made = graph.add("CLIPTextEncode", text="a red circle", clip=Link("100", 1))
        conditions[which] = made["CONDITIONING"]
    api = steered(
        graph, model, Link("100", 2), Link("104", 0), conditions, Made("105", facts()["DiffsteerReward_compressibility"])
    )
    if control:
        given = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "control_net": ["102", 0], "image": ["103", 0]}
        guider = next(node for node in api.values() if node["class_type"] == "CFGGuider")["inputs"]
        given |= {which: guider[which] for which in ("positive", "negative")}
        api["106"] = {"class_type": "ControlNetApplyAdvanced", "inputs": given}
        guider["positive"], guider["negative"] = ["106", 0], ["106", 1]
    return {**CHECKPOINT, **api}


def test_checkpoints_loras_and_controlnets_are_steered(server: Server) -> None:
    plain = latents_of(server, with_checkpoint())
    lora = latents_of(server, with_checkpoint(lora=True))
    control = latents_of(server, with_checkpoint(control=True))
    assert len(plain) == 4 and plain != lora and plain != control


@pytest.mark.parametrize("path", ["clean", "network"])
def test_gradients_pass_through_a_checkpoint(server: Server, path: str) -> None:
    """CLIP's gradient, with a LoRA on the model and a ControlNet on its conditions."""
    api = with_checkpoint(lora=True, control=True)
    guider = next(node for node in api.values() if node["class_type"] == "CFGGuider")
    api["107"] = {
        "class_type": "DiffsteerReward_clip",
        "inputs": {"model_name": "shapes", "pretrained": "", "resize": "squash", "device": ""},
    }
    settings: dict[str, Any] = {"normaliser": "uncertainty", "schedule": "constant", "iterations": 1}
    settings |= {"highest": 1.0, "lowest": 0.0, "every": 2, "chunk": 0, "prompt": "a red circle"}
    settings |= {"clean": 0.0, "network": 0.0, "beta1": 0.9, "beta2": 0.999, path: 0.5}
    guider["class_type"] = "DiffsteerGuider"
    guider["inputs"] |= {"reward": ["107", 0], "vae": ["100", 2], **settings}
    guided = latents_of(server, api)
    guider["inputs"][path] = 0.0
    assert guided != latents_of(server, api)


# A white picture of the embedded model, whose left half may be changed.
WHITE: dict[str, Any] = {
    "200": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0xF0F0F0}},
    "201": {"class_type": "VAEEncode", "inputs": {"pixels": ["200", 0], "vae": ["1", 2]}},
    "202": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 32, "height": 64}},
    "203": {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}},
    "204": {
        "class_type": "MaskComposite",
        "inputs": {"destination": ["203", 0], "source": ["202", 0], "x": 0, "y": 0, "operation": "add"},
    },
    "205": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["201", 0], "mask": ["204", 0]}},
}


def sides(image: Image.Image) -> tuple[int, int]:
    """How white the left and the right half of a picture are: the darkest of their mean channels."""
    means = [np.asarray(image.crop((x, 8, x + 20, 56))).mean((0, 1)).min() for x in (4, 40)]
    return int(means[0]), int(means[1])


def test_pictures_are_changed_where_the_mask_says_so(server: Server) -> None:
    graph, model, conditions, reward = begin()
    api = steered(graph, model["model"], model["vae"], model["latent"], conditions, reward, steps=10)
    run = next(node["inputs"] for node in api.values() if node["class_type"] == "SamplerCustomAdvanced")
    api |= WHITE
    api["206"] = {"class_type": "RepeatLatentBatch", "inputs": {"samples": ["205", 0], "amount": 4}}
    run["latent_image"] = ["206", 0]
    (file,) = server.files(succeeded(server.run(api)))
    with Image.open(file) as image:
        left, right = sides(image.convert("RGB"))
    assert right > 215 > left


def test_the_steered_ksampler_keeps_what_its_mask_keeps(server: Server) -> None:
    """At half the noise, from a white picture, changed in its left half alone."""
    graph, model, conditions, reward = begin(rows=1)
    run = graph.add(
        "DiffsteerKSampler",
        model=model["model"],
        **conditions,
        latent_image=model["latent"],
        vae=model["vae"],
        reward=reward["reward"],
        prompt="a red circle",
        seed=1,
        steps=10,
        cfg=4.0,
        denoise=0.9,
        particles=3,
    )
    graph.add("DiffsteerSave", images=run["images"], run=run["run"], filename_prefix="tests/x")
    api = {**graph.api(), **WHITE}
    api[run.id]["inputs"]["latent_image"] = ["205", 0]
    (file,) = server.files(succeeded(server.run(api)))
    with Image.open(file) as image:
        whole = image.convert("RGB")
        steps = json.loads(image.text["diffsteer"])["settings"]["steps"]  # type: ignore[attr-defined]
    assert steps == 10 and sides(whole)[1] > 215 > sides(whole)[0]


@pytest.mark.parametrize("name", ["shapes", "shapes-flow"])
def test_a_run_in_two_stages(server: Server, name: str) -> None:
    """Particles over the first part of the grid, and what is selected there goes on with a plain sampler."""
    graph, model, conditions, reward = begin(name=name)
    api = steered(graph, model["model"], model["vae"], model["latent"], conditions, reward, steps=20)
    run = next(node["inputs"] for node in api.values() if node["class_type"] == "SamplerCustomAdvanced")
    select = next(k for k, node in api.items() if node["class_type"] == "DiffsteerSelect")
    api["206"] = {"class_type": "SplitSigmas", "inputs": {"sigmas": run["sigmas"], "step": 14}}
    api["207"] = {"class_type": "DisableNoise", "inputs": {}}
    api["208"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    rest = {"noise": ["207", 0], "guider": run["guider"], "sampler": ["208", 0], "sigmas": ["206", 1]}
    api["209"] = {"class_type": "SamplerCustomAdvanced", "inputs": {**rest, "latent_image": [select, 0]}}
    run["sigmas"] = ["206", 0]
    decode = next(node for node in api.values() if node["class_type"] == "VAEDecode")
    decode["inputs"]["samples"] = ["209", 0]
    (file,) = server.files(succeeded(server.run(api)))
    with Image.open(file) as image:
        assert check(image, "a red circle").correct


def test_progress_and_previews_come_with_every_step(server: Server, python: Path) -> None:
    graph, model, conditions, reward = begin()
    api = steered(graph, model["model"], model["vae"], model["latent"], conditions, reward, steps=17)
    address = f"127.0.0.1:{server.port}"
    listening = subprocess.Popen(
        [str(python), str(HERE / "listen.py"), address, "listener"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert listening.stdout is not None
    assert json.loads(listening.stdout.readline())["type"] == "listening"
    succeeded(server.result(server.queue(api, client="listener")))
    told = [json.loads(line) for line in listening.communicate(timeout=60)[0].splitlines()]
    steps = [t["data"]["value"] for t in told if t["type"] == "progress" and t["data"]["max"] == 17]
    assert steps == list(range(1, 18))
    assert sum(t["type"] == "picture" and t["bytes"] > 200 for t in told) >= 10


def memory(server: Server) -> int:
    """Of the server's process, after it has let go of what it can, in MB."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    return int(psutil.Process(server.process.pid).memory_info().rss / 1e6)


def test_an_interrupt_ends_a_run_and_frees_what_it_held(server: Server) -> None:
    graph, model, conditions, reward = begin(rows=2000)
    api = steered(graph, model["model"], model["vae"], model["latent"], conditions, reward, steps=400, chunk=100)
    grown = []
    for seed in range(4):
        noise = next(node for node in api.values() if node["class_type"] == "DiffsteerNoise")
        noise["inputs"]["seed"] = seed
        id = server.queue(api)
        time.sleep(6)
        started = time.monotonic()
        server.post("/interrupt", {})
        result = server.result(id, 60)
        assert time.monotonic() - started < 20
        assert [m[0] for m in result["status"]["messages"]][-1] == "execution_interrupted" and not result["outputs"]
        grown.append(memory(server))
    assert grown[-1] - grown[0] < 60, grown
    graph, model, conditions, reward = begin()
    assert latents_of(server, steered(graph, model["model"], model["vae"], model["latent"], conditions, reward))


def complaints(server: Server, api: dict[str, Any]) -> list[tuple[str, str]]:
    """What the server says of a graph that it does not take: (kind, details)."""
    with pytest.raises(Refused) as refused:
        server.queue(api)
    errors = refused.value.said["node_errors"].values()
    return [(e["type"], e["details"]) for node in errors for e in node["errors"]]


def changed(kind: str, **inputs: Any) -> dict[str, Any]:
    graph, model, conditions, reward = begin()
    api = steered(graph, model["model"], model["vae"], model["latent"], conditions, reward)
    node = next(node for node in api.values() if node["class_type"] == kind)
    for name, value in inputs.items():
        node["inputs"].pop(name)
        if value is not None:
            node["inputs"][name] = value
    return api


@pytest.mark.parametrize(
    ("kind", "inputs", "said"),
    [
        ("DiffsteerSampler_fk", {"threshold": 0.4}, "must exceed target_ess"),
        ("DiffsteerSampler_fk", {"potential": "min"}, "valid: difference, max"),
        ("DiffsteerSampler_fk", {"events": "0.5, two"}, "events="),
        ("DiffsteerSampler_fk", {"reward": None}, "reward"),
        ("DiffsteerSampler_fk", {"reward": ["1", 0]}, "received_type(MODEL) mismatch input_type(DIFFSTEER_REWARD)"),
        ("DiffsteerSampler_fk", {"particles": -2}, "lies in [0, 4096]"),
        ("DiffsteerSelect", {"steering": ["4", 0]}, "mismatch input_type(DIFFSTEER_STEERING)"),
        ("DiffsteerSelect", {"output": "worst"}, "valid: best, draw, all"),
        ("DiffsteerReward_clip", {"pretrained": "x", "model_name": ""}, "needs a model_name"),
        ("DiffsteerNoise", {"seed": -1}, "lies in [0,"),
    ],
)
def test_bad_input_is_a_validation_error(server: Server, kind: str, inputs: dict[str, Any], said: str) -> None:
    found = complaints(server, changed(kind, **inputs))
    assert any(said in details for _, details in found), found


def test_what_only_a_run_can_tell_is_one_clear_line(server: Server) -> None:
    def message(api: dict[str, Any]) -> str:
        status = server.run(api)["status"]
        assert status["status_str"] == "error"
        return next(str(m[1]["exception_message"]).strip() for m in status["messages"] if m[0] == "execution_error")

    no_vae = changed("DiffsteerSampler_fk", vae=None)
    assert message(no_vae) == "the reward clip looks at pixels: connect a VAE"
    odd = changed("DiffsteerSampler_fk", particles=3)
    assert message(odd).startswith("a latent batch of 4 is no number of images with 3 particles each")
    strange = changed("DiffsteerSelect", latent=["1", 3])
    assert message(strange).startswith("these latents are not what this steering's sampler made")


def test_without_the_v3_interface_the_older_one_serves(comfyui: Path, python: Path, place: Path, tmp_path: Path) -> None:
    pack = tmp_path / "custom_nodes" / "diffsteer_v1"
    pack.mkdir(parents=True)
    inside = (place / "custom_nodes" / "diffsteer" / "__init__.py").read_text()
    (pack / "__init__.py").write_text(f"import sys\nsys.modules['comfy_api.v0_0_2'] = None\n{inside}")
    (tmp_path / "paths.yaml").write_text(f"v1:\n  base_path: {tmp_path}\n  custom_nodes: custom_nodes\n")
    older = Server(comfyui, python, tmp_path, "--extra-model-paths-config", str(tmp_path / "paths.yaml"))
    try:
        older.wait_until_up()
        told = older.get("/object_info")
        assert told["DiffsteerKSampler"]["display_name"] == "Steered KSampler"
        (picture,) = older.files(succeeded(older.run(EXAMPLES["steered_ksampler"]().api())))
        assert picture.is_file()
        found = complaints(older, changed("DiffsteerSampler_fk", threshold=0.4))
        assert any("must exceed target_ess" in details for _, details in found)
    finally:
        older.stop()
