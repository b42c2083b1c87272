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
from diffsteer.selection import Selection
from diffsteer.types import UnsupportedError

if TYPE_CHECKING:
    from diffsteer.backend import DiffusersSession


def only_latents(callback: Any) -> dict[str, Any]:
    """A user's callback for a segment: the next segment would not know what it changes beside the latents."""

    def watched(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        before, scale = dict(tensors), pipe._guidance_scale
        returned = callback(pipe, index, timestep, tensors)
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


class Record:
    """The control of a scheduler that is not steered: the user's own steps, and the states that they lead to."""

    eta, start, stop, pipe, unit_noise, skipped, interrupts = None, 0, None, None, False, 0, False
    experts, native, noise_kind = (1.0,), False, "eta"

    def __init__(self, doubled: bool) -> None:
        self.doubled, self.steps, self.x = doubled, 0, torch.empty(0)

    def begin(self, scheduler: Any) -> None:
        """A call of the pipeline has set its grid."""

    def noise(self, index: int, sample: Tensor, generator: Any) -> Tensor:
        """Never asked for: without eta there is no transition of ours."""
        return torch.zeros_like(sample)

    def arrived(self, index: int, total: int, x: Tensor, x0: Tensor, generator: Any) -> Tensor:
        self.x, self.steps = x, self.steps + 1
        return x


class SegmentControl:
    """What the scheduler of a session's shadow asks: the segment in hand."""

    unit_noise = True

    def __init__(self, session: DiffusersSession, shadow: Any) -> None:
        self.session, self.pipe = session, shadow
        self.start = self.stop = 0
        self.rows: Sequence[int] = []
        self.x: Tensor = torch.empty(0)
        self.x0: Tensor = torch.empty(0)
        self.skipped = 0  # of the grid, by a pipeline that starts in its middle
        self.doubled, self.experts, self.native = session.family.doubled, session.experts, session.native
        self.noise_kind = session.noise_kind
        names = {cls.__name__ for cls in type(session.user.scheduler).__mro__}
        self.takes_eta = bool(names & {"DDIMScheduler", "TCDScheduler"})
        self.interrupts = "interrupt" in inspect.unwrap(type(shadow).__call__).__code__.co_names
        self.select: Selection | None = None

    @property
    def eta(self) -> float | None:
        return None if self.native else self.session.eta

    def begin(self, scheduler: Any) -> None:
        """A call of the pipeline has set its grid, and with it forgotten what the solver knew."""
        if self.native and self.start:
            self.session.remind(scheduler, self.rows)

    def native_options(self, index: int) -> dict[str, Any]:
        """For the solver's own step: a generator a row, keyed by the step."""
        session = self.session
        keyed = [rng.generator(session.seed, *session.key(r), index - self.skipped, "native") for r in self.rows]
        return {"generator": keyed, "eta": session.eta} if self.takes_eta else {"generator": keyed}

    def noise(self, index: int, sample: Tensor, generator: Any) -> Tensor:
        self.session.shape = tuple(sample.shape[1:])  # a session whose first states the pipeline draws learns it here
        return self.session.step_noise(self.rows, index - self.skipped)

    def arrived(self, index: int, total: int, x: Tensor, x0: Tensor, generator: Any) -> Tensor:
        self.session._outputs = self.session._watch.take()
        done = index + 1 - self.skipped
        if self.select is not None and done in self.select.events:
            x = self.select(done, x, x0)
            if self.native:
                session = self.session
                session.keep(self.pipe.scheduler, self.rows)
                session.follow(self.select.infos[-1].ancestors)
                session.remind(self.pipe.scheduler, self.rows)
        self.x, self.x0 = x, x0
        return x
