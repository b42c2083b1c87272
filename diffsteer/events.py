"""When rewards are wanted: a specification that does not know the number of steps, made into steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffsteer.types import DiffsteerError


def check_events(spec: Any, who: str) -> None:
    """Refuse a specification of events that is none.

    Raises:
        DiffsteerError: not "all", a positive whole number, or fractions in (0, 1).
    """
    fractions = isinstance(spec, Sequence) and not isinstance(spec, str)
    if spec == "all" or (isinstance(spec, int) and not isinstance(spec, bool) and spec > 0):
        return
    if fractions and all(isinstance(f, (int, float)) and 0 < f < 1 for f in spec):
        return
    raise DiffsteerError(
        f'{who}: events={spec!r}; valid: "all", a whole number n (every n-th step), or fractions in (0, 1) such as [0.2, 0.5]'
    )


def event_steps(spec: Any, steps: int) -> tuple[int, ...]:
    """The numbers of transitions after which an event falls, increasing, the end (`steps`) always among them."""
    if spec == "all":
        spec = 1
    inner = range(spec, steps, spec) if isinstance(spec, int) else [round(f * steps) for f in spec]
    return (*sorted({k for k in inner if 0 < k < steps}), steps)
