"""Stages: search, then particles, then gradients, under one budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffsteer.judging import is_share
from diffsteer.staged import as_search, staged
from diffsteer.trial import Arena, Asking, Outcome, Search, along_ways
from diffsteer.types import DiffsteerError


@dataclass(frozen=True)
class Stages(Search):
    """Samplers one after another, each beginning with the best of what came before.

    A search hands on the first noises of its best samples; particles start from them; a gradient goes on from the best one, and
    DNO from the very noise of the best particle's chain. The best sample of all stages is the result. With one stage it is that
    search. A stage whose share ends on the way brings its best state to the end before the next one begins.

    What is handed on counts where a chain follows from its first noise. With noise on the way (`eta`, 1 by default in samplers
    of particles) it hardly does: as a later stage give such samplers a small eta.

    Any sampler may be a stage. One that weighs particles is here a search for a good sample: its weights are not handed on.

    A heuristic. Cost: that of the stages together, or the budget.

    Args:
        stages: samplers, in order; on the command line mappings with a ``name``.
        shares: of the budget, one a stage; default: all alike. What a stage leaves, the next ones have.

    Raises:
        DiffsteerError: no stage, shares that do not fit, or a sampler that is none.
    """

    stages: Sequence[Any] = field(default=(), metadata={"of": "sampler"})
    shares: Sequence[float] | None = None

    name: ClassVar[str] = "stages"
    cuts: ClassVar[bool] = True
    source: ClassVar[str] = "ours"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.stages, Sequence) or not self.stages:
            raise DiffsteerError(f"{self.name}: give one sampler or more, such as stages=[ZeroOrder(), FeynmanKac(4)]")
        parts = [as_search(stage) for stage in self.stages]
        shares = [1.0] * len(parts) if self.shares is None else list(self.shares)
        if len(shares) != len(parts) or not all(is_share(s) for s in shares):
            raise DiffsteerError(f"{self.name}: shares={shares}; wanted {len(parts)} positive numbers, one a stage")
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "_shares", [s / sum(shares) for s in shares])

    @property
    def needs_grad(self) -> bool:  # type: ignore[override]
        """Does any stage?"""
        return any(part.needs_grad for part in self._parts)  # type: ignore[attr-defined]

    @property
    def numbers(self) -> bool:  # type: ignore[override]
        """Does any stage want rewards that are numbers?"""
        return any(part.numbers for part in self._parts)  # type: ignore[attr-defined]

    @property
    def of_noise(self) -> bool:
        """Is every stage's sample a function of its noise?"""
        return all(part.of_noise for part in self._parts)  # type: ignore[attr-defined]

    def search(self, arena: Arena) -> Asking:
        return staged(self._parts, self._shares, arena)  # type: ignore[attr-defined]

    def finalists(self, drafts: Sequence[Outcome], number: int) -> list[Outcome]:
        """As of an optimisation, where a stage is one."""
        return along_ways(drafts, number) if self.needs_grad else super().finalists(drafts, number)

    def evaluations(self, steps: int) -> int:
        return sum(part.evaluations(steps) for part in self._parts)  # type: ignore[attr-defined]
