"""The primitive: a session holds one set of conditions over one backend and carries rows of latents from level to level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffsteer import rng
from diffsteer.algebra import Level, noise_std
from diffsteer.blocks import Blocks, Size
from diffsteer.classifier_free import PULLS
from diffsteer.control import check_noise
from diffsteer.ledger import Ledger
from diffsteer.rng import Id
from diffsteer.schedules import Schedule
from diffsteer.selection import Selection
from diffsteer.start import NoiseTransform, refuse_encoding
from diffsteer.timing import Clock, Shifted
from diffsteer.types import DiffsteerError, UnsupportedError


class Arrival(NamedTuple):
    """Where a segment ends: the states `x` there and the clean estimates `x0` of its last step, each (N, ...)."""

    x: Tensor
    x0: Tensor


class Session(ABC):
    """Conditions (prompts and call arguments) over a backend.

    Rows are numbered (prompt, particle), row = p * K + k. Each is keyed by its prompt's id and its slot k, so its noise does
    not depend on the other rows. Rows run in blocks of at most `chunk`, a segment each (and a callback of the user's is called
    once a block); with `deterministic` every block has exactly `chunk` rows (8 unless said), the last one padded, so that on
    the CPU a row's bits do not depend on how many others there are; with ``chunk="auto"`` they are halved when memory runs out.

    With several experts a prompt is a tuple of as many texts, and inside a segment every row stands for them all, (row,
    expert): each is asked for its own text, their predictions are mixed by the experts' weights, and the state they step to is
    one.

    Attributes:
        steps: T. levels: T + 1 of them, from noise to clean. shape: of one row.
        makes: "images", "video" or "sound", where that is known.
    """

    steps: int
    levels: list[Level]
    shape: tuple[int, ...]
    decoder: Callable[[Tensor], Tensor] | None
    native = False
    tiny_decoder: Callable[[Tensor], Tensor] | None = None
    embedded: bool = False
    makes: str = ""
    no_reentry: str = ""  # why its runs cannot be cut
    visit = 0  # how often the step at hand was taken before
    purpose = "start"  # what first states are drawn for
    clock: Clock | None = None  # where rows can be at levels of their own
    start: NoiseTransform | None = None  # what is done to the first noise
    remembers: bool = False  # its solver knows of each row's last steps
    size: tuple[int, int] = (0, 0)  # of what is decoded, height and width
    shifted: Shifted | None = None  # those levels, in the next segment, which is one step
    per_step, further = 1, 0  # evaluations of a row's step; and of its whole chain beside those of the steps
    pulls: Tensor | None = None  # rms of what classifier-free guidance changed in a row's last noise estimate, (P * K,)

    def __init__(
        self,
        prompts: Sequence[Any],
        particles: int,
        seed: int,
        ids: Sequence[Id] | None = None,
        eta: float = 1.0,
        chunk: Size = None,
        deterministic: bool = False,
        experts: Sequence[float] = (1.0,),
        noise: str = "eta",
        schedule: Schedule | None = None,
        own: bool = False,
        ledger: Ledger | None = None,
    ) -> None:
        check_noise(noise)
        self.noise_kind, self.schedule, self.own = noise, schedule, own
        self.prompts, self.particles, self.seed, self.eta = list(prompts), particles, seed, eta
        self.ids = tuple(range(len(self.prompts)) if ids is None else ids)
        if len(self.ids) != len(self.prompts) or len(set(self.ids)) != len(self.ids):
            raise DiffsteerError(f"{len(self.prompts)} prompts need as many distinct ids, not {list(self.ids)}")
        self.cut = Blocks(8 if deterministic and chunk is None else chunk, deterministic)
        self.experts = tuple(experts)
        if len(self.experts) > 1:
            for prompt in self.prompts:
                if isinstance(prompt, str) or len(prompt) != len(self.experts):
                    raise DiffsteerError(f"{len(self.experts)} experts want as many texts a prompt, not {prompt!r}")
        self.per_step = len(self.experts)
        self.injected: dict[int, Tensor] = {}  # by row: the noise of all its transitions, (T, *shape)
        self.ledger = ledger or Ledger().open()

    @property
    def rows(self) -> int:
        """P * K."""
        return len(self.prompts) * self.particles

    @property
    def ours(self) -> bool:
        """Is the transition diffsteer's, not the user's own solver's?"""
        return bool(self.eta) or self.schedule is not None or self.own

    @property
    def last_noise(self) -> int:
        """The index of the last transition that adds noise, -1 if none does."""
        if self.native:
            return self.steps - 2
        pairs = zip(self.levels[:-1], self.levels[1:], strict=True)
        return max((k for k, (a, b) in enumerate(pairs) if float(noise_std(a, b, self.eta, self.noise_kind)) > 0), default=-1)

    def key(self, row: int) -> tuple[Id, int]:
        """A row's prompt id and slot."""
        prompt, slot = divmod(row, self.particles)
        return self.ids[prompt], slot

    def noise(self, rows: Sequence[int] | None = None) -> Tensor:
        """Keyed first states of the given rows (default: all), (N, *shape), at the level the chain starts from."""
        keys = [self.key(r) for r in (range(self.rows) if rows is None else rows)]
        return self.scaled(self.transformed(rng.normal(self.seed, keys, 0, self.purpose, self.shape), rows))

    def transformed(self, noise: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Unit noise of rows, (N, *shape), as they are to start from."""
        rows = list(range(self.rows) if rows is None else rows)
        if self.start is None:
            return noise

        def one_block(block: list[int]) -> Tensor:
            real = len(set(block))
            assert self.start is not None
            with self.padded(len(block), real):
                return self.start(noise[block], self, [rows[i] for i in block])[:real]

        return torch.cat(self.cut.run(len(rows), one_block))

    def scaled(self, noise: Tensor) -> Tensor:
        """Unit noise (N, *shape) as first states. Differentiable."""
        return self._scale_noise(noise)

    @contextmanager
    def noisy(self, eta: float | None) -> Iterator[None]:
        """Inside, the transition adds another amount of noise; None leaves it. Where the transition is diffsteer's."""
        before = self.eta
        self.eta = before if eta is None else eta
        try:
            yield
        finally:
            self.eta = before

    def encoded(self, frames: Tensor) -> Tensor:
        """A clip (F, 3, H, W) in [0, 1] as clean latents (1, *shape).

        Raises:
            UnsupportedError: a backend or a pipeline that is not known to do so.
        """
        raise refuse_encoding(type(self).__name__)

    def measure_pulls(self) -> None:
        """Let `pulls` tell, after segments of one step.

        Raises:
            UnsupportedError: a backend without classifier-free guidance, or that mixes the two outputs out of sight.
        """
        raise UnsupportedError(PULLS)

    def tapping(self, names: Sequence[str]) -> AbstractContextManager[dict[str, Tensor]]:
        """A context that hands out the outputs of the named modules of the denoiser in the last segment, by name:
        conditional rows alone, (N, F, C, h, w).

        Raises:
            UnsupportedError: a backend or a pipeline whose features are not known to be laid out so.
        """
        raise refuse_encoding(type(self).__name__)

    def step_noise(self, rows: Sequence[int], index: int) -> Tensor:
        """The keyed noise of one transition, (N, *shape)."""
        purpose = f"step {self.visit}" if self.visit else "step"
        drawn = rng.normal(self.seed, [self.key(r) for r in rows], index, purpose, self.shape)
        if not self.injected:
            return drawn
        return torch.stack([self.injected[r][index] if r in self.injected else z for r, z in zip(rows, drawn, strict=True)])

    def segment(self, x: Tensor, start: int, stop: int, rows: Sequence[int] | None = None, graph: bool = False) -> Arrival:
        """Carry states from grid index `start` to `stop`.

        Args:
            x: (N, *shape) at level `start`.
            rows: which rows they are; default all. Any subset, in any order, may be carried.
            graph: let autograd see it all, through denoiser and guidance; parameters stay out.

        Raises:
            ValueError: indices that are no part of the grid, or a wrong number of states.
        """
        rows = list(range(self.rows) if rows is None else rows)
        if not 0 <= start < stop <= self.steps or len(x) != len(rows):
            raise ValueError(f"cannot carry {len(x)} states as {len(rows)} rows from {start} to {stop} of {self.steps} steps")

        def one_block(block: list[int]) -> Arrival:
            real = len(set(block))
            with self.padded(len(block), real), torch.set_grad_enabled(graph):
                arrival = self._segment(x[block], start, stop, [rows[i] for i in block])
            return Arrival(arrival.x[:real], arrival.x0[:real])

        arrivals = self.cut.run(len(rows), one_block)
        return Arrival(torch.cat([a.x for a in arrivals]), torch.cat([a.x0 for a in arrivals]))

    @contextmanager
    def padded(self, rows: int, real: int) -> Iterator[None]:
        """Inside, a block of `rows` is evaluated of which `real` are none that only fill it up: the ledger counts those."""
        before = self.ledger.evaluations
        try:
            yield
        finally:  # of what Ctrl-C cut short, too
            padding = (self.ledger.evaluations - before) * (rows - real) // rows
            self.ledger.evaluations -= padding
            self.ledger.padding += padding

    def texts_of(self, rows: Sequence[int]) -> list[Any]:
        """What the rows are asked for, one text a row and expert."""
        asked = [self.prompts[r // self.particles] for r in rows]
        return asked if len(self.experts) == 1 else [text for texts in asked for text in texts]

    def gradient(
        self, x: Tensor, index: int, objective: Callable[[Tensor, list[int]], Tensor], rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Arrival]:
        """The gradient of an objective of the clean estimate with respect to the state, through denoiser and guidance.

        One step is taken a block of rows at a time, so memory is that of one step of one block.

        Args:
            x: (N, *shape) at level `index`.
            objective: from clean estimates (n, *shape) and their row numbers to (n,), differentiable. The last row may come
                several times, which fills up a block.

        Returns:
            (gradient (N, *shape), where the step leads, detached).

        Raises: what `segment` refuses.
        """
        rows = list(range(self.rows) if rows is None else rows)

        def one_block(block: list[int]) -> tuple[Tensor, Arrival]:
            mine, real = [rows[i] for i in block], len(set(block))
            leaf = x[block].detach().requires_grad_(True)
            with self.padded(len(block), real), torch.enable_grad():
                arrival = self.segment(leaf, index, index + 1, mine, graph=True)
                total = objective(arrival.x0, mine)[:real].sum()
                found = torch.autograd.grad(total, leaf)[0]
            return found[:real], Arrival(arrival.x[:real].detach(), arrival.x0[:real].detach())

        parts = self.cut.run(len(rows), one_block)
        arrivals = [a for _, a in parts]
        reached = Arrival(torch.cat([a.x for a in arrivals]), torch.cat([a.x0 for a in arrivals]))
        return torch.cat([g for g, _ in parts]), reached

    def trajectory(
        self,
        x: Tensor,
        start: int = 0,
        stop: int | None = None,
        rows: Sequence[int] | None = None,
        checkpoints: bool = True,
    ) -> Tensor:
        """Carry states as `segment` does, differentiably from end to end: (N, *shape) -> (N, *shape).

        Every step is a checkpoint of its own: memory is that of one step and of all states, and every step is taken twice.
        Without `checkpoints` everything is kept, and taken once.
        """
        if not checkpoints:
            return self.segment(x, start, self.steps if stop is None else stop, rows, graph=True).x
        for k in range(start, self.steps if stop is None else stop):

            def one_step(y: Tensor, k: int = k) -> Tensor:
                return self.segment(y, k, k + 1, rows, graph=True).x

            x = checkpoint(one_step, x, use_reentrant=False, preserve_rng_state=False)
        return x

    def walk(self, select: Selection) -> Tensor:
        """Carry all rows from noise to clean, a segment from event to event, and select there. Returns the final states."""
        x, at = self.noise(), 0
        for event in select.events:
            with torch.no_grad():
                arrival = self.segment(x, at, event)
                x, at = select(event, arrival.x, arrival.x0), event
                self.follow(select.ancestors, event)
        return x

    def follow(self, ancestors: Tensor, index: int) -> None:  # noqa: B027
        """Rows have become copies of others at a level: what a session keeps of them beside their states goes with them."""

    @abstractmethod
    def _segment(self, x: Tensor, start: int, stop: int, rows: Sequence[int]) -> Arrival:
        """One block."""

    @abstractmethod
    def _scale_noise(self, noise: Tensor) -> Tensor:
        """Standard normal noise as the first state."""
