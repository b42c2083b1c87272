"""What a steered scheduler asks, where the pipeline is diffusers': the segment in hand, or nothing but to be recorded."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffsteer import rng
from diffsteer.algebra import Level
from diffsteer.control import Control
from diffsteer.scheduler import install
from diffsteer.schedules import Schedule
from diffsteer.selection import Selection
from diffsteer.types import UnsupportedError

if TYPE_CHECKING:
    from diffsteer.backend import DiffusersSession


def only_latents(callback: Any, behind: int) -> dict[str, Any]:
    """A user's callback for a segment: the next segment would not know what it changes beside the latents.

    Args:
        behind: steps that the pipeline's loop does not count.
    """

    def watched(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        before, scale = dict(tensors), pipe._guidance_scale
        returned = callback(pipe, index + behind, timestep, tensors)
        changed = [name for name, v in (returned or {}).items() if name != "latents" and v is not before.get(name)]
        changed += ["guidance_scale"] if pipe._guidance_scale != scale else []
        if changed:
            raise UnsupportedError(
                f"callback_on_step_end changes {changed[0]}, which does not last in a run in blocks of rows: "
                "leave chunk and deterministic out"
            )
        return returned

    own = getattr(callback, "tensor_inputs", None)  # of diffusers' own callback classes
    return {"callback_on_step_end": watched} | ({} if own is None else {"callback_on_step_end_tensor_inputs": own})


_freezing = threading.Lock()
# by module: how many runs hold it, and which parameters wanted gradients
_frozen: dict[int, tuple[int, list[nn.Parameter]]] = {}


@contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Parameters want no gradients inside; runs in several threads, and nested ones, may hold the same modules."""
    with _freezing:
        for module in modules:
            holders, wanted = _frozen.get(id(module), (0, []))
            wanted = wanted or [p for p in module.parameters() if p.requires_grad]
            for p in wanted:
                p.requires_grad_(False)
            _frozen[id(module)] = (holders + 1, wanted)
    try:
        yield
    finally:
        with _freezing:
            for module in modules:
                holders, wanted = _frozen.pop(id(module))
                if holders > 1:
                    _frozen[id(module)] = (holders - 1, wanted)
                else:
                    for p in wanted:
                        p.requires_grad_(True)


class Record(Control):
    """Of a scheduler that is not steered: the user's own steps, and the states that they lead to."""

    def __init__(self, doubled: bool) -> None:
        self.doubled, self.steps, self.x = doubled, 0, torch.empty(0)

    def arrived(self, index: int, total: int, x: Tensor, x0: Tensor, generator: Any) -> Tensor:
        self.x, self.steps = x, self.steps + 1
        return x


class SegmentControl(Control):
    """What the scheduler of a session's shadow asks: the segment in hand."""

    def __init__(self, session: DiffusersSession, shadow: Any, guided: bool) -> None:
        self.session, self.pipe = session, shadow
        self.unit_noise, self.left = session.family.entry == "latents", session.family.left
        self.start = self.stop = 0
        self.rows: Sequence[int] = []
        self.x: Tensor = torch.empty(0)
        self.drawn: Tensor = torch.empty(0)  # by the pipeline, in the place of states that enter by a step
        self.x0: Tensor = torch.empty(0)
        self.doubled, self.experts, self.native = session.family.doubled and guided, session.experts, session.native
        self.eta, self.noise_kind = None if self.native else session.eta, session.noise_kind
        self.schedule, self.own = session.schedule, session.own
        names = {cls.__name__ for cls in type(session.user.scheduler).__mro__}
        self.takes_eta = bool(names & {"DDIMScheduler", "TCDScheduler"})
        self.interrupts = "interrupt" in inspect.unwrap(type(shadow).__call__).__code__.co_names
        self.select: Selection | None = None

    def begin(self, scheduler: Any) -> None:
        """A call of the pipeline has set its grid, and with it forgotten what the solver knew."""
        if self.start:
            self.session.history.remind(scheduler, self.rows, self.start)

    def keys(self) -> tuple[int, list[tuple[rng.Id, int]]]:
        return self.session.seed, [self.session.key(r) for r in self.rows]

    def native_options(self, index: int) -> dict[str, Any]:
        """For the solver's own step: a generator a row, keyed by the step."""
        session = self.session
        keyed = [rng.generator(session.seed, *session.key(r), index - self.skipped, "native") for r in self.rows]
        return {"generator": keyed, "eta": session.eta} if self.takes_eta else {"generator": keyed}

    def noise(self, index: int, sample: Tensor, generator: Any) -> Tensor:
        return self.session.step_noise(self.rows, index - self.skipped)

    def enter(self, sample: Tensor) -> Tensor:
        self.session._outputs = self.session._watch.take()  # of no step
        self.drawn = sample
        return self.x if len(self.x) else sample

    def arrived(self, index: int, total: int, x: Tensor, x0: Tensor, generator: Any) -> Tensor:
        self.session._outputs = self.session._watch.take()
        done = index + 1 - self.skipped
        if self.select is not None and done in self.select.events:
            x = self.select(done, x, x0)
            self.moved = self.select.moved
            history, scheduler = self.session.history, self.pipe.scheduler
            history.keep(scheduler, self.rows, done)
            history.follow(self.select.ancestors, done)
            history.remind(scheduler, self.rows, done)
        self.x, self.x0 = x, x0
        return x


def grid_of(
    pipe: Any, steps: int | None, call: dict[str, Any], eta: float | None, schedule: Schedule | None = None, own: bool = False
) -> tuple[int, list[Level]]:
    """How many transitions a call with so many steps makes (more for solvers with inner steps, fewer for a picture's strength),
    and their levels, one more; none where the pipeline's own solver steps.

    Args:
        steps: None is the default of the pipeline.
        call: the pipeline's own arguments.
        eta: of diffsteer's transition, which takes no inner steps; None or 0 for the user's own solver.
        schedule: walked in the place of the pipeline's own grid. own: our transition with eta = 0, too.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    steps = int(parameters["num_inference_steps"].default if steps is None else steps)
    control = Control()
    control.eta, control.schedule, control.own = eta, schedule, own
    scheduler = install(pipe.scheduler, control)
    custom = {k: list(call[k]) for k in ("timesteps", "sigmas") if call.get(k) is not None}
    steps = len(next(iter(custom.values()))) if custom else steps
    mu = {"mu": 1.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}  # moves levels, but makes no more
    try:
        scheduler.set_timesteps(**(custom or {"num_inference_steps": steps}), **mu)  # type: ignore[dict-item]
    except (ValueError, TypeError):
        return steps, []  # some grids are made by the pipeline, as long as asked
    length = len(scheduler.timesteps)
    levels = list(scheduler.levels)
    if "strength" not in parameters:
        return length, levels
    strength = float(call.get("strength", parameters["strength"].default))
    length -= (steps - min(int(steps * strength), steps)) * int(scheduler.order)
    return length, levels[-(length + 1) :]
