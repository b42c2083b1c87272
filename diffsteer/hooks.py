"""The denoiser seam: forward hooks that count and time evaluations, keep outputs, and tap modules.

Hooks are module hooks, never a replaced `forward` (offloading replaces that itself), and do nothing outside the `watching`
block that they were set for: a context variable says which one is active, so threads and nested runs do not meet.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.ledger import Ledger
from diffsteer.types import DiffsteerError, UnsupportedError, nearest

_active: ContextVar[Watch | None] = ContextVar("diffsteer_watch", default=None)


class Watch:
    """What the hooks of one session write to."""

    def __init__(self, ledger: Ledger, keep: bool = False) -> None:
        self.ledger, self.keep = ledger, keep
        self.outputs: list[Tensor] = []  # of the denoiser since the last step
        self.asked: Tensor | None = None  # the time of each row, (N,), in the place of the pipeline's
        self._started = 0.0

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> tuple[Any, Any] | None:
        if _active.get() is not self:  # torch hands it no kwargs where another thread is just removing it
            return None
        self._started = time.perf_counter()
        return None if self.asked is None else _with_times(module, args, kwargs, self.asked)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if _active.get() is not self:
            return
        prediction = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        if isinstance(prediction, list):  # a row each, perhaps of several sizes
            prediction = torch.stack(prediction)
        if prediction.is_cuda:
            torch.cuda.synchronize()
        self.ledger.seconds["denoiser"] = self.ledger.seconds.get("denoiser", 0.0) + time.perf_counter() - self._started
        self.ledger.forwards += 1
        self.ledger.evaluations += len(prediction)
        if self.keep:
            self.outputs.append(prediction.detach())

    def take(self) -> list[Tensor]:
        """The outputs since the last call."""
        outputs, self.outputs = self.outputs, []
        return outputs


def _with_times(module: nn.Module, args: Any, kwargs: Any, asked: Tensor) -> tuple[Any, Any]:
    """A denoiser's arguments with a time a row: the rows of both halves, where guidance doubles them, have the same."""
    given = inspect.signature(module.forward).bind(*args, **kwargs)
    if "timestep" not in given.arguments:
        raise UnsupportedError(f"{type(module).__name__} is not told its time by an argument timestep")
    rows = len(next(iter(given.arguments.values())))
    before = torch.as_tensor(given.arguments["timestep"])
    times = asked.to(before.device, torch.float32).repeat(rows // len(asked))
    given.arguments["timestep"] = (
        times if before.is_floating_point() or bool((times % 1 != 0).any()) else times.to(before.dtype)
    )
    return given.args, given.kwargs


@contextmanager
def watching(watch: Watch, *denoisers: nn.Module) -> Iterator[Watch]:
    """Hook the denoisers, and let `watch` be the active one inside the block."""
    handles = [d.register_forward_pre_hook(watch.enter, with_kwargs=True) for d in denoisers]
    handles += [d.register_forward_hook(watch.leave) for d in denoisers]
    token = _active.set(watch)
    try:
        yield watch
    finally:
        _active.reset(token)
        for handle in handles:
            handle.remove()


@contextmanager
def tapping(denoiser: nn.Module, names: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
    """Put the outputs of the named modules into `found`, their graphs included, at every forward inside the block.

    Raises:
        DiffsteerError: a module that the denoiser has not.
    """
    known = dict(denoiser.named_modules())
    for name in names:
        if name not in known:
            near = nearest(name, [n for n in known if n.count(".") <= 1 and n])
            raise DiffsteerError(f"{type(denoiser).__name__} has no module {name!r}{near}")

    def keep(name: str, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)

    hooks = [known[n].register_forward_hook(lambda module, args, output, n=n: keep(n, output)) for n in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
