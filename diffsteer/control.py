"""What a steered scheduler asks of whoever steers it, with the answers of one that nobody steers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffsteer import rng
from diffsteer.algebra import NOISES, Level
from diffsteer.particles import reindex
from diffsteer.schedules import Schedule
from diffsteer.types import DiffsteerError, UnsupportedError


def check_noise(noise: str) -> None:
    """Refuse an unknown amount of noise.

    Raises:
        DiffsteerError: with those that are valid.
    """
    if noise not in NOISES:
        raise DiffsteerError(f"noise={noise!r} is unknown; valid: {', '.join(NOISES)}")


class Control:
    """A scheduler's control.

    Attributes:
        eta: the amount of noise of the transition; 0 or None is the user's own `step`.
        noise_kind: what `eta` is a share of.
        native: the user's own `step`, with noise keyed by `native_options`.
        schedule: walked in the place of the user's own grid. own: the transition is diffsteer's with eta = 0, too.
        start, stop: the part of the grid that is walked; `pipe`, where there is one, is told of it by its `_interrupt`, if its
            loop looks at that (`interrupts`). skipped: of the grid, by a pipeline that starts in its middle.
        unit_noise: the first states are scaled already.
        entering: the next step takes no step, but lets the states in (`enter`).
        left: a call is left when its part of the grid is walked, by `Left`.
        doubled: `step` is handed every row twice. experts: the weights of the rows that share a state.
        shifted: the level of each row, where that is not the grid's. at: the index of the last step. moved: (P, K), whose
            copies its particles have become; None if they stayed.
    """

    eta: float | None = None
    noise_kind: str = "eta"
    native: bool = False
    schedule: Schedule | None = None
    own: bool = False
    start: int = 0
    stop: int | None = None
    pipe: Any = None
    interrupts: bool = False
    skipped: int = 0
    unit_noise: bool = False
    entering: bool = False
    left: bool = False
    doubled: bool = False
    experts: tuple[float, ...] = (1.0,)
    shifted: Level | None = None
    at: int = -1
    moved: Tensor | None = None

    @property
    def ours(self) -> bool:
        """Is the transition diffsteer's? On a schedule always: the user's solver infers from its own grid where it is."""
        return bool(self.eta) or self.schedule is not None or self.own

    def begin(self, scheduler: Any) -> None:
        """A call of the pipeline has set its grid."""

    def keys(self) -> tuple[int, list[tuple[rng.Id, int]]]:
        """The seed, and the key (prompt id, slot) of every row of the last step."""
        raise NotImplementedError

    def noise(self, index: int, sample: Tensor, generator: Any) -> Tensor:
        """The keyed noise of one transition, (N, ...)."""
        raise NotImplementedError

    def native_options(self, index: int) -> dict[str, Any]:
        """Arguments of the user's own step."""
        return {}

    def enter(self, sample: Tensor) -> Tensor:
        """The states (N, ...) to go on from, where the pipeline has drawn others."""
        return sample

    def arrived(self, index: int, total: int, x: Tensor, x0: Tensor, generator: Any) -> Tensor:
        """A step was made, of `total`: the states (N, ...) that live on."""
        return x


class Left(Exception):
    """A call of a pipeline was left before its end."""


class Follower(Control):
    """Of a deep copy of a scheduler, with which a pipeline steps a second stream of the same particles (LTX-2: sound beside
    video): noise of its own, the first stream's ancestors."""

    def __init__(self, leader: Control) -> None:
        if leader.native:
            raise UnsupportedError("a pipeline that steps a second stream with a copy of its scheduler wants transition=own")
        self.leader = leader
        for name in ("eta", "noise_kind", "schedule", "start", "stop", "unit_noise", "doubled", "experts"):
            setattr(self, name, getattr(leader, name))

    def noise(self, index: int, sample: Tensor, generator: Any) -> Tensor:
        self._follow(index)
        seed, keys = self.leader.keys()
        return rng.normal(seed, keys, index, "second stream", sample.shape[1:])

    def arrived(self, index: int, total: int, x: Tensor, x0: Tensor, generator: Any) -> Tensor:
        self._follow(index)
        moved = self.leader.moved
        return x if moved is None else reindex(x.view(*moved.shape, *x.shape[1:]), moved).flatten(0, 1)

    def _follow(self, index: int) -> None:
        if self.leader.at != index:
            raise UnsupportedError(
                "a deep copy of a steered scheduler follows it step by step, as a second stream; "
                "for another pipeline call steered() again"
            )
