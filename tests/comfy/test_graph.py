"""Graphs in both of their forms, runs as graphs, and the metadata of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsteer.comfy import examples, fields
from diffsteer.comfy.command import main
from diffsteer.comfy.examples import EXAMPLES
from diffsteer.comfy.graph import Graph, facts
from diffsteer.samplers import FeynmanKac
from diffsteer.types import DiffsteerError

KNOWN = facts()


def api_of(canvas: dict[str, Any]) -> dict[str, Any]:
    """What the canvas queues: the widgets by place (a seed has a second one that is not sent), then what links bring."""
    sources = {link[0]: [str(link[1]), link[2]] for link in canvas["links"]}
    graph = {}
    for node in canvas["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for widget in KNOWN[node["type"]].widgets:
            inputs[widget.name] = next(values)
            if widget.options.get("control_after_generate"):
                assert next(values) == "fixed"  # the examples are to draw what the page shows
        assert next(values, None) is None
        inputs |= {i["name"]: sources[i["link"]] for i in node["inputs"] if i["link"] is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": node["title"]}}
    return graph


@pytest.mark.parametrize("name", EXAMPLES)
def test_both_forms_are_the_same_graph(name: str) -> None:
    graph = EXAMPLES[name]()
    api, canvas = graph.api(), graph.canvas()
    assert api_of(json.loads(json.dumps(canvas))) == api
    for number, source, slot, target, place, kind in canvas["links"]:
        nodes = {node["id"]: node for node in canvas["nodes"]}
        entry, out = nodes[target]["inputs"][place], nodes[source]["outputs"][slot]
        assert entry["link"] == number and number in out["links"] and out["type"] == kind
        assert entry["type"] in (kind, "*")
    ids = [node["id"] for node in canvas["nodes"]]
    assert len(ids) == len(set(ids)) == canvas["last_node_id"] and len(canvas["links"]) == canvas["last_link_id"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_nothing_lies_upon_anything_on_the_canvas(name: str) -> None:
    boxes = [(*n["pos"], *n["size"]) for n in EXAMPLES[name]().canvas()["nodes"]]
    for i, (x, y, wide, tall) in enumerate(boxes):
        for u, v, w, t in boxes[:i]:
            assert x + wide <= u or u + w <= x or y + tall <= v or v + t <= y


def test_a_graph_refuses_what_is_no_graph() -> None:
    graph = Graph()
    with pytest.raises(DiffsteerError, match="there is no node KSampeler"):
        graph.add("KSampeler")
    with pytest.raises(DiffsteerError, match=r"unknown inputs \['sampels'\], missing inputs \['samples', 'vae'\]"):
        graph.add("VAEDecode", sampels=1)


def composed(tmp_path: Path, *argv: str) -> dict[str, Any]:
    file = tmp_path / "graph.json"
    assert main(["graph", *argv, "-o", str(file)]) == 0
    made: dict[str, Any] = json.loads(file.read_text())
    return made


def kinds(graph: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {node["class_type"]: node["inputs"] for node in graph.values()}


def test_a_run_is_a_graph(tmp_path: Path) -> None:
    text = "a red circle, ${x} 'left' of\\ a blue square"
    argv = ["sampler.particles=6", "sampler.events=[0.5]", "seed=9", "output=all", "chunk=3", "guidance_scale=2.5"]
    graph = kinds(composed(tmp_path, f"prompt={text}", "negative_prompt=a star", "noise=quadratic", *argv))
    assert graph["PrimitiveStringMultiline"]["value"] == text
    assert graph["DiffsteerShapes"] == {"model": "shapes", "batch_size": 6}
    method = graph["DiffsteerSampler_fk"]
    assert (method["events"], method["noise"], method["chunk"], method["particles"]) == ("[0.5]", "quadratic", 3, 0)
    assert FeynmanKac(**fields.values(FeynmanKac, {**method, "particles": 6})) == FeynmanKac(6, events=(0.5,))
    assert graph["DiffsteerNoise"]["seed"] == 9 and graph["CFGGuider"]["cfg"] == 2.5
    assert graph["BasicScheduler"]["steps"] == 30 and graph["DiffsteerSelect"]["output"] == "all"
    assert graph["DiffsteerReward_clip"]["model_name"] == ""


def test_other_models_load_checkpoints(tmp_path: Path) -> None:
    graph = kinds(composed(tmp_path, "prompt=x", "model=sdxl", "call.height=768"))
    assert graph["CheckpointLoaderSimple"]["ckpt_name"] == "sd_xl_base_1.0.safetensors" and graph["CFGGuider"]["cfg"] == 5.0
    assert graph["EmptyLatentImage"] == {"width": 1024, "height": 768, "batch_size": 4}
    for argv in (["model=some/folder", "--checkpoint", "mine.safetensors"], ["model=checkpoints/mine.safetensors"]):
        graph = kinds(composed(tmp_path, "prompt=x", *argv))
        assert graph["CheckpointLoaderSimple"]["ckpt_name"] == "mine.safetensors"
    for scale, cfg in (
        (0, 1.0),
        (0.5, 1.0),
        (1.5, 1.5),
    ):  # diffusers guides from 1 on; ComfyUI mixes
        assert kinds(composed(tmp_path, "prompt=x", "model=sdxl", f"guidance_scale={scale}"))["CFGGuider"]["cfg"] == cfg
    plain = kinds(composed(tmp_path, "prompt=x", "sampler=none", "seed=3"))
    assert plain["KSampler"]["seed"] == 3 and not any(k.startswith("DiffsteerSampler") for k in plain)


def test_the_canvas_form_and_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canvas = composed(tmp_path, "prompt=x", "--canvas")
    assert main(["graph", "prompt=x"]) == 0
    assert api_of(canvas) == json.loads(capsys.readouterr().out.partition("graph.json\n")[2])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "give prompt=TEXT"),
        (["prompts=some.txt"], "give prompt=TEXT"),
        (["prompt=x", "transition=native"], "always diffsteer's own"),
        (["prompt=x", "decoder=tiny:here"], "connect a tiny one"),
        (["prompt=x", "deterministic=true"], "as it comes"),
        (["prompt=x", "model.dtype=float16"], "number formats"),
        (["prompt=x", "chunk=auto"], "chunk=auto"),
        (["prompt=x", "model=some/folder"], "--checkpoint NAME"),
        (["prompt=x", "model=sd15", "call.num_frames=3"], "call.num_frames has no place"),
        (["prompt=x", "call.height=64"], "one size"),
        (["prompt=x", "--colour"], "unknown option '--colour'"),
        (["prompt=x", "-o"], "expected one argument"),
        (["prompt=x", "sampler.eta=0"], "eta"),
        (["prompt=x", "sampler=mpgd"], "no node by itself"),
        (["prompt=x", "num_inference_steps=20000"], r"steps=20000; it lies in \[1, 10000\]"),
        (["prompt=x", "sampler.particles=5000"], r"batch_size=5000; it lies in"),
        (["prompt=x", "model=sd15", "call.height=abc"], "height='abc' is no whole number"),
    ],
)
def test_what_a_graph_cannot_say_is_refused(argv: list[str], said: str) -> None:
    with pytest.raises(DiffsteerError, match=said):
        main(["graph", *argv])


@given(st.text(max_size=60))
def test_any_prompt_comes_through(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    graph = Graph()
    words = graph.add("PrimitiveStringMultiline", value=text)
    graph.add("PreviewAny", source=words["STRING"])
    assert api_of(json.loads(json.dumps(graph.canvas()))) == json.loads(json.dumps(graph.api()))


def test_examples_say_what_they_are() -> None:
    assert all(make.__doc__ for make in EXAMPLES.values())
    assert all(make().note for make in EXAMPLES.values()) and examples.PROMPT in json.dumps(EXAMPLES["flow"]().api())
