"""The pictures of docs/comfyui.md: what the example graphs look like on the canvas, and what a run of them drew.

DIFFSTEER_COMFYUI=PATH DIFFSTEER_COMFYUI_KEEP=FOLDER make test-comfy
python scripts/comfy_pictures.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from diffsteer.comfy.examples import EXAMPLES
from diffsteer.comfy.graph import HEAD, ROW

TARGET = Path(__file__).resolve().parents[1] / "docs" / "images"
ZOOM, GAP, SHRINK = 2, 4, 2
COLOURS = {"MODEL": "#8f7ee6", "CLIP": "#e6c229", "VAE": "#e65f5c", "CONDITIONING": "#f0913a", "LATENT": "#e67ad1"}
COLOURS |= {"IMAGE": "#4aa3df", "SAMPLER": "#73a857", "SIGMAS": "#9fbf7f", "NOISE": "#8d8d8d", "GUIDER": "#59b3a3"}
COLOURS |= {"DIFFSTEER_REWARD": "#d4a017", "DIFFSTEER_STEERING": "#c0392b", "DIFFSTEER_RUN": "#2c7a7b"}


def results(name: str, kept: Path) -> Image.Image | None:
    """The pictures of the first run of an example in a row, and its lineage beside them."""
    files = sorted((kept / "output" / "diffsteer").glob(f"{name}_0*.png"))
    lineage = sorted((kept / "output" / "diffsteer").glob(f"{name}_lineage_*.png"))
    if not files:
        return None
    pictures = [Image.open(file).convert("RGB") for file in files[:8]]
    pictures = [p.resize((p.width * ZOOM, p.height * ZOOM), Image.Resampling.NEAREST) for p in pictures]
    drawn = [Image.open(file).convert("RGB") for file in lineage[:1]]
    wide = max([sum(p.width + GAP for p in pictures), *(d.width for d in drawn)])
    tall = pictures[0].height + sum(d.height + GAP for d in drawn)
    canvas = Image.new("RGB", (wide, tall), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(picture, (i * (picture.width + GAP), 0))
    for picture in drawn:
        canvas.paste(picture, (0, pictures[0].height + GAP))
    return canvas


def graph(canvas: dict[str, Any]) -> Image.Image:
    """A graph as the canvas shows it."""
    nodes = {n["id"]: n for n in canvas["nodes"] if n["type"] != "MarkdownNote"}
    wide = max(n["pos"][0] + n["size"][0] for n in nodes.values()) + 20
    tall = max(n["pos"][1] + n["size"][1] for n in nodes.values()) + 60
    image = Image.new("RGB", (wide, tall), "#2a2a2e")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(17)
    for n in nodes.values():
        (x, y), (w, h) = n["pos"], n["size"]
        y += HEAD
        pen.rounded_rectangle((x + 10, y - 28, x + 10 + w, y + h - HEAD), 8, fill="#3c3c44", outline="#55555f")
        pen.text((x + 20, y - 25), n["title"], fill="white", font=font)
    for _, source, slot, target, place, kind in canvas["links"]:
        a, b = at(nodes[source], slot, True), at(nodes[target], place, False)
        pen.line(curve(a, b), fill=COLOURS.get(kind, "#bbbbbb"), width=3, joint="curve")
    for n in nodes.values():
        for out, entries in ((False, n["inputs"]), (True, n["outputs"])):
            for i, entry in enumerate(entries):
                x, y = at(n, i, out)
                pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=COLOURS.get(entry["type"], "#bbbbbb"))
                said = entry["name"]
                pen.text((x - 10 - pen.textlength(said, font) if out else x + 10, y - 10), said, fill="#dddddd", font=font)
        listed = [v for v in n["widgets_values"] if v not in ("", "fixed")]
        top = max(len(n["inputs"]), len(n["outputs"])) * ROW
        for i, value in enumerate(listed):
            at_y = n["pos"][1] + HEAD + top + i * 22
            if at_y > n["pos"][1] + n["size"][1] - 22:
                break
            pen.text((n["pos"][0] + 24, at_y), str(value)[:34], fill="#9aa0a6", font=font)
    return image.resize((image.width // SHRINK, image.height // SHRINK), Image.Resampling.LANCZOS)


def at(node: dict[str, Any], place: int, out: bool) -> tuple[int, int]:
    (x, y), (w, _) = node["pos"], node["size"]
    return x + 10 + (w if out else 0), y + HEAD + 12 + place * ROW


def curve(a: tuple[int, int], b: tuple[int, int]) -> list[tuple[float, float]]:
    bend = max(40, abs(b[0] - a[0]) / 2)
    points = []
    for i in range(25):
        t = i / 24
        p, q, r, s = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
        points.append((p * a[0] + q * (a[0] + bend) + r * (b[0] - bend) + s * b[0], p * a[1] + q * a[1] + r * b[1] + s * b[1]))
    return points


def main(kept: Path) -> None:
    for name, make in EXAMPLES.items():
        graph(make().canvas()).quantize(64).save(TARGET / f"comfy_{name}_graph.png", optimize=True)
        made = results(name, kept)
        if made is None:
            raise SystemExit(f"{kept} has no pictures of {name}")
        made.save(TARGET / f"comfy_{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
