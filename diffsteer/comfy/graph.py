"""Graphs of nodes, in the form that ComfyUI's server is posted and in the form that people drag onto its canvas."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diffsteer.comfy.catalogue import nodes
from diffsteer.comfy.node import MOST, Input, Node
from diffsteer.types import DiffsteerError

COLUMN, ROW, HEAD, GAP = 380, 26, 40, 40  # of the canvas, in pixels


class Link(NamedTuple):
    """An output of a node, by its place."""

    id: str
    slot: int


@dataclass
class Made:
    """A node that was added; its outputs by name."""

    id: str
    facts: Node

    def __getitem__(self, name: str) -> Link:
        names = [n for _, n in self.facts.outputs]
        return Link(self.id, names.index(name))


@dataclass
class Graph:
    """A graph that grows: nodes by id, with values and links as their inputs."""

    note: str = ""
    placed: dict[str, tuple[Node, str, dict[str, Any]]] = field(default_factory=dict)
    known: dict[str, Node] = field(default_factory=lambda: facts())

    def add(self, kind: str, title: str = "", **inputs: Any) -> Made:
        """Add a node; widgets that are not given keep their defaults.

        Raises:
            DiffsteerError: an unknown node or input, a socket left open, or a value that its widget does not take.
        """
        if kind not in self.known:
            raise DiffsteerError(f"there is no node {kind}")
        node = self.known[kind]
        names = {i.name for i in node.inputs}
        strange = sorted(set(inputs) - names)
        missing = [i.name for i in node.inputs if not (i.is_widget or i.optional or i.name in inputs)]
        if strange or missing:
            raise DiffsteerError(f"{kind}: unknown inputs {strange}, missing inputs {missing}")
        said = node.complaint({name: value for name, value in inputs.items() if not isinstance(value, Link)})
        if said is not True:
            raise DiffsteerError(f"{node.title}: {said}")
        id = str(len(self.placed) + 1)
        values = {i.name: inputs.get(i.name, i.default) for i in node.inputs if i.is_widget or i.name in inputs}
        self.placed[id] = (node, title or node.title, values)
        return Made(id, node)

    def api(self) -> dict[str, Any]:
        """In API form: what is posted to /prompt."""
        return {
            id: {
                "class_type": node.id,
                "inputs": {name: list(v) if isinstance(v, Link) else v for name, v in values.items()},
                "_meta": {"title": title},
            }
            for id, (node, title, values) in self.placed.items()
        }

    def canvas(self) -> dict[str, Any]:
        """In the form of the canvas (workflow version 0.4), laid out from left to right."""
        links: list[list[Any]] = []
        leaving: dict[Link, list[int]] = defaultdict(list)
        arriving: dict[tuple[str, str], int] = {}
        for id, (node, _, values) in self.placed.items():
            for i, entry in enumerate(_sockets(node, values)):
                value = values.get(entry.name)
                if isinstance(value, Link):
                    number = len(links) + 1
                    links.append(
                        [number, int(value.id), value.slot, int(id), i, self.placed[value.id][0].outputs[value.slot][0]]
                    )
                    leaving[value].append(number)
                    arriving[id, entry.name] = number
        drawn: list[dict[str, Any]] = []
        bottoms: dict[int, int] = defaultdict(int)
        for order, (id, (node, title, values)) in enumerate(self.placed.items()):
            column, tall = self._depth(id), _height(node)
            drawn.append(
                {
                    "id": int(id),
                    "type": node.id,
                    "pos": [column * COLUMN, bottoms[column]],
                    "size": [COLUMN - 60, tall],
                    "flags": {},
                    "order": order,
                    "mode": 0,
                    "title": title,
                    "inputs": [_drawn_input(e, arriving.get((id, e.name))) for e in _sockets(node, values)],
                    "outputs": [
                        {"name": name, "type": kind, "links": leaving.get(Link(id, slot)) or None, "slot_index": slot}
                        for slot, (kind, name) in enumerate(node.outputs)
                    ],
                    "properties": {"Node name for S&R": node.id},
                    "widgets_values": _widget_values(node, values),
                }
            )
            bottoms[column] += tall + HEAD + GAP
        if self.note:
            drawn.append(_note(len(self.placed) + 1, self.note))
        ends = {"last_node_id": len(drawn), "last_link_id": len(links)}
        return {**ends, "nodes": drawn, "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4}

    def _depth(self, id: str) -> int:
        sources = [v.id for v in self.placed[id][2].values() if isinstance(v, Link)]
        return 1 + max(map(self._depth, sources)) if sources else 0


def facts() -> dict[str, Node]:
    """Our nodes, and those of ComfyUI that graphs of ours use."""
    return {node.id: node for node in [*nodes(), *COMFYUI]}


def _node(kind: str, inputs: tuple[Input, ...], *outputs: tuple[str, str]) -> Node:
    title = {"CLIPTextEncode": "CLIP Text Encode (Prompt)"}.get(kind, kind)
    return Node(kind, title, "", inputs, outputs, run=lambda **_: None)


_STEPS = Input("steps", "INT", "", 20, {"min": 1, "max": 10000})
_CFG = Input("cfg", "FLOAT", "", 8.0, {"min": 0.0, "max": 100.0})
_DENOISE = Input("denoise", "FLOAT", "", 1.0, {"min": 0.0, "max": 1.0})
_SIDE = {"min": 16, "max": 16384}
_MODEL = Input("model", "MODEL")
_LATENT = Input("latent_image", "LATENT")
_CONDITIONS = (Input("positive", "CONDITIONING"), Input("negative", "CONDITIONING"))
_SCHEDULER = Input("scheduler", "COMBO", "", "simple")
_SEEDED = {"min": 0, "max": MOST, "control_after_generate": True}
# Inputs and outputs in their order; make test-comfy compares them with what a server says of itself.
COMFYUI = (
    _node("PrimitiveStringMultiline", (Input("value", "STRING", "", ""),), ("STRING", "STRING")),
    _node(
        "CheckpointLoaderSimple",
        (Input("ckpt_name", "COMBO", "", ""),),
        ("MODEL", "MODEL"),
        ("CLIP", "CLIP"),
        ("VAE", "VAE"),
    ),
    _node("CLIPTextEncode", (Input("text", "STRING", "", ""), Input("clip", "CLIP")), ("CONDITIONING", "CONDITIONING")),
    _node(
        "EmptyLatentImage",
        (
            Input("width", "INT", "", 512, _SIDE),
            Input("height", "INT", "", 512, _SIDE),
            Input("batch_size", "INT", "", 1, {"min": 1, "max": 4096}),
        ),
        ("LATENT", "LATENT"),
    ),
    _node(
        "KSampler",
        (
            _MODEL,
            Input("seed", "INT", "", 0, _SEEDED),
            _STEPS,
            _CFG,
            Input("sampler_name", "COMBO", "", "euler"),
            _SCHEDULER,
            *_CONDITIONS,
            _LATENT,
            _DENOISE,
        ),
        ("LATENT", "LATENT"),
    ),
    _node("KSamplerSelect", (Input("sampler_name", "COMBO", "", "euler"),), ("SAMPLER", "SAMPLER")),
    _node("BasicScheduler", (_MODEL, _SCHEDULER, _STEPS, _DENOISE), ("SIGMAS", "SIGMAS")),
    _node("CFGGuider", (_MODEL, *_CONDITIONS, _CFG), ("GUIDER", "GUIDER")),
    _node("RandomNoise", (Input("noise_seed", "INT", "", 0, _SEEDED),), ("NOISE", "NOISE")),
    _node(
        "SamplerCustomAdvanced",
        (
            Input("noise", "NOISE"),
            Input("guider", "GUIDER"),
            Input("sampler", "SAMPLER"),
            Input("sigmas", "SIGMAS"),
            _LATENT,
        ),
        ("LATENT", "output"),
        ("LATENT", "denoised_output"),
    ),
    _node("VAEDecode", (Input("samples", "LATENT"), Input("vae", "VAE")), ("IMAGE", "IMAGE")),
    _node("SaveImage", (Input("images", "IMAGE"), Input("filename_prefix", "STRING", "", "ComfyUI"))),
    _node("PreviewAny", (Input("source", "*"),)),
)


def _sockets(node: Node, values: dict[str, Any]) -> list[Input]:
    """What is drawn as a socket: the inputs that are no widgets, and the widgets that a link feeds."""
    return [i for i in node.inputs if not i.is_widget or isinstance(values.get(i.name), Link)]


def _drawn_input(entry: Input, link: int | None) -> dict[str, Any]:
    drawn: dict[str, Any] = {"name": entry.name, "type": entry.type, "link": link}
    return drawn | ({"widget": {"name": entry.name}} if entry.is_widget else {})


def _widget_values(node: Node, values: dict[str, Any]) -> list[Any]:
    """By place; a seed has a further widget that says what becomes of it after a run."""
    listed: list[Any] = []
    for widget in node.widgets:
        value = values.get(widget.name)
        listed.append(widget.default if isinstance(value, Link) else value)
        listed += ["fixed"] if widget.options.get("control_after_generate") else []
    return listed


def _height(node: Node) -> int:
    tall = sum(3 * ROW if w.options.get("multiline") else ROW for w in node.widgets)
    return HEAD + tall + ROW * max(len(node.inputs) - len(node.widgets), len(node.outputs))


def _note(id: int, text: str) -> dict[str, Any]:
    return {
        "id": id,
        "type": "MarkdownNote",
        "pos": [0, -220],
        "size": [COLUMN * 2 - 60, 160],
        "flags": {},
        "order": id - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
    }
