"""Schedules that a run measures before it begins, on its own model and first prompts: what the command line calls
``schedule=loss_mass`` and ``schedule=gits``. In Python `diffsteer.profiles` has the functions themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffsteer.files import replacing
from diffsteer.profiles import gits_schedule, local_deviation, loss_mass, trajectory
from diffsteer.schedules import Given, Profile, Schedule
from diffsteer.types import DiffsteerError, check_numbers, setting

__all__ = ["GITS", "LossMass"]


@dataclass(frozen=True)
class LossMass:
    """As much of the velocity's error in each step, see `diffsteer.profiles.loss_mass`. A heuristic.

    Args:
        prompts: how many of the run's are measured on. cells: of the profile. steps: of the samples that it is measured on.

    Raises:
        DiffsteerError: a value out of its range.
    """

    prompts: int = setting(8, low=1)
    cells: int = setting(32, low=2)
    steps: int = setting(50, low=1)

    name: ClassVar[str] = "loss_mass"
    source: ClassVar[str] = "after the adaptive time scheduler of PUFM++, 2025, arXiv 2512.20988; measured on the model"

    def __post_init__(self) -> None:
        _check(self.name, prompts=(self.prompts, 1), cells=(self.cells, 2), steps=(self.steps, 1))

    def measured(self, pipe: Any, prompts: Sequence[Any], steps: int | None, **call: Any) -> Schedule:
        """Cost: ``prompts (cells + steps)`` rows through the denoiser, twice as many where it is guided; once a model."""
        return loss_mass(pipe, prompts[: self.prompts], cells=self.cells, steps=self.steps, **call)


@dataclass(frozen=True)
class GITS:
    """The way of least local error along a fine teacher, see `diffsteer.profiles.gits_schedule`. Exact for its cost, which is a
    heuristic.

    Args:
        prompts: how many of the run's are measured on. teacher: steps of the fine paths.
        coefficient: the m-th hop counts ``coefficient ** m``; the paper's code takes 1.15.

    Raises:
        DiffsteerError: a value out of its range; when measured, more steps than the teacher has.
    """

    prompts: int = setting(8, low=1)
    teacher: int = setting(60, low=1)
    coefficient: float = setting(1.0, low=0)

    name: ClassVar[str] = "gits"
    source: ClassVar[str] = "Chen et al., 2024, arXiv 2405.11326; measured on the model"

    def __post_init__(self) -> None:
        _check(self.name, prompts=(self.prompts, 1), teacher=(self.teacher, 1))
        check_numbers("gits: ", real={"coefficient": self.coefficient})
        if not self.coefficient > 0:
            raise DiffsteerError(f"gits: coefficient={self.coefficient:g}; it must be positive")

    def measured(self, pipe: Any, prompts: Sequence[Any], steps: int | None, **call: Any) -> Schedule:
        """Cost: ``prompts teacher`` rows through the denoiser, twice as many where it is guided."""
        wanted = _steps(pipe, steps, call)
        if wanted > self.teacher:
            raise DiffsteerError(f"gits: {wanted} steps are more than its teacher's, schedule.teacher={self.teacher}")
        teacher = trajectory(pipe, prompts[: self.prompts], steps=self.teacher, **call)
        return gits_schedule(teacher, local_deviation(teacher), wanted, self.coefficient)


def settled(
    schedule: Any, pipe: Any, prompts: Sequence[Any], steps: int | None, path: Path, settings_hash: str, **call: Any
) -> Schedule | None:
    """A schedule as it is; one that is to be measured as it was measured, which is kept in a file for later runs with the same
    settings. (Results of others are refused elsewhere; a file that is left of such a run is written anew.)

    Raises:
        DiffsteerError: a file that holds none.
    """
    if not hasattr(schedule, "measured"):
        found: Schedule | None = schedule
        return found
    if path.exists():
        try:
            told: dict[str, Any] = dict(json.loads(path.read_text()))
            if told.pop("settings") == settings_hash:
                told = {name: tuple(values) for name, values in told.items()}
                return Given(**told) if "values" in told else Profile(**told)
        except (ValueError, TypeError, KeyError, DiffsteerError) as error:
            raise DiffsteerError(f"{path.name} holds no schedule ({error}): delete it to measure anew") from error
    distinct = list(dict.fromkeys(prompts))
    count = min(schedule.prompts, len(distinct))
    print(f"schedule {schedule.name}: measured first, on {count} prompt{'s' * (count > 1)}", flush=True)
    made: Any = schedule.measured(pipe, distinct, steps, **call)
    kept = {"values": made.values} if isinstance(made, Given) else {"times": made.times, "masses": made.masses}
    with replacing(path) as part:
        part.write_text(json.dumps({"settings": settings_hash, **kept}))
    return made  # type: ignore[no-any-return]


def _steps(pipe: Any, steps: int | None, call: dict[str, Any]) -> int:
    """As many as the run takes: its own number, or the model's."""
    from diffsteer.segments import grid_of
    from diffsteer.shapes.models import recommended

    advised = recommended(pipe).get("num_inference_steps")
    return steps or int(advised or grid_of(pipe, None, call, 1.0)[0])


def _check(name: str, **values: tuple[int, int]) -> None:
    check_numbers(f"{name}: ", whole={key: value for key, (value, _) in values.items()})
    for key, (value, least) in values.items():
        if value < least:
            raise DiffsteerError(f"{name}: {key}={value}; at least {least} {'is' if least == 1 else 'are'} needed")
