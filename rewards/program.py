"""Constraints as a reward: how far a sample is from satisfying a program. After ProgMoGen (Liu et al., 2024, CVPR)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.reward import Reward
from diffsteer.rewards.constraints import RELATIONS, Node, parse, parts_of
from diffsteer.rewards.measurements import MEASUREMENTS, PRESENT, area, measure
from diffsteer.types import Context, DiffsteerError, check_numbers

PLACED = ("x", "y", "speed", "speed_x", "speed_y")  # of what is not there they say nothing


def value(node: Node, samples: Tensor) -> Tensor:
    """What a number, a measurement or an operation is of samples, (N,)."""
    if node.kind == "number":
        return torch.full((len(samples),), node.value, device=samples.device)
    if node.kind in MEASUREMENTS:
        return measure(node.kind, samples, node.color)
    a, b = (value(p, samples) for p in node.parts)
    if node.kind == "/":
        nowhere = b == 0  # its gradient would be no number where another alternative counts, either
        return torch.where(nowhere, torch.full_like(a, float("nan")), a / torch.where(nowhere, torch.ones_like(b), b))
    return a + b if node.kind == "+" else a - b if node.kind == "-" else a * b


def error(node: Node, samples: Tensor, margin: float) -> Tensor:
    """How far samples are from satisfying a constraint, (N,), 0 where they do."""
    if node.kind == "all_of":
        return torch.stack([error(p, samples, margin) for p in node.parts]).sum(0)
    if node.kind == "any_of":
        errors = torch.stack([error(p, samples, margin) for p in node.parts])
        return torch.where(errors.isnan(), math.inf, errors).min(0).values
    if node.kind == "weighted":
        return node.parts[0].value * error(node.parts[1], samples, margin)
    if node.kind in RELATIONS:
        axis, sign = RELATIONS[node.kind]
        a, b = (str(p.color) for p in node.parts)
        apart = sign * (measure(axis, samples, b) - measure(axis, samples, a))
        return (margin - apart).clamp(min=0) + _absent(samples, a) + _absent(samples, b)
    a_, b_ = (value(p, samples) for p in node.parts)
    strict = margin if node.kind in (">", "<") else 0.0
    short = b_ - a_ if node.kind in (">", ">=") else a_ - b_
    found = short.abs() if node.kind == "==" else (short + strict).clamp(min=0)
    for color in dict.fromkeys(str(n.color) for n in parts_of(node) if n.kind in PLACED):
        found = found + _absent(samples, color)
    return found


def _absent(samples: Tensor, color: str) -> Tensor:
    """1 where there is nothing of a colour, 0 from `PRESENT` on: what is not there is nowhere."""
    images = samples if samples.ndim == 4 else samples.flatten(0, 1)
    there = area(images, color).view(len(samples), -1).mean(1)
    return (1 - there / PRESENT).clamp(min=0)


@dataclass(eq=False)
class Program(Reward):
    """Minus how far a sample is from satisfying constraints; 0 where it satisfies them all, and then a search stops.

    Constraints compare sums and products of measurements and numbers (``area(red) > 2 * area(blue)``), or say where colours are
    (``left_of(red, blue)``); ``all_of`` adds their errors, ``any_of`` takes the least, ``weighted(2, ...)`` multiplies.
    A comparison of places or speeds is not satisfied unless their colours are there: one percent of the picture each.
    ``less_than(a, b)``, ``greater_than(a, b)`` and ``equal(a, b)`` are other spellings of ``<``, ``>`` and ``==``.

    | measurement | of | range |
    |---|---|---|
    | area(C) | share of the picture of a colour | 0 to 1 |
    | x(C), y(C) | its centre of mass, from the left, from the top | 0 to 1 |
    | count(C) | its pieces, without a gradient | 0, 1, ... |
    | brightness(), edges() | mean luma, mean gradient of luma a pixel | 0 to 1 |
    | speed(C), speed_x(C), speed_y(C) | of clips, the way of its centre a frame | widths of the picture |

    Colours are named, or ``#rrggbb``. Differentiable where all its measurements are. The prompt plays no part.

    Args:
        text: the program.
        margin: by how much strict comparisons (``<``, ``>``, relations) want to be satisfied.

    Raises:
        DiffsteerError: a text that is no program, with the character where.
    """

    text: str
    margin: float = 0.02

    name: ClassVar[str] = "program"
    modality: ClassVar[str] = "any"
    range: ClassVar[tuple[float, float]] = (float("-inf"), 0.0)
    differentiable: ClassVar[bool] = True  # where all its measurements are

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise DiffsteerError(f"program: text={self.text!r}; wanted one such as 'area(red) > area(blue)'")
        check_numbers("program: ", {}, {"margin": self.margin})
        if self.margin is None or not 0 <= self.margin < math.inf:
            raise DiffsteerError(f"program: margin={self.margin}; it is at least 0, and finite")
        self.node = parse(self.text)
        used = [MEASUREMENTS[n.kind] for n in parts_of(self.node) if n.kind in MEASUREMENTS]
        clips = any(m.clips for m in used)
        self.__dict__.update(differentiable=all(m.differentiable for m in used), modality="video" if clips else "any")

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Minus the error of images (N, 3, H, W), or clips (N, F, 3, H, W), in [0, 1]: (N,). NaN where it is no number."""
        found = 0.0 - error(self.node, samples.float(), self.margin)
        return torch.where(found.isinf(), torch.full_like(found, float("nan")), found)
