"""What a search may spend, what it has spent, and what it must keep for the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

from diffsteer.types import DiffsteerError, check_numbers

BACK = 2  # evaluations that a pass back takes the time of


class Cost(NamedTuple):
    """Counts, as in the ledger: rows through the denoiser, samples decoded (by any decoder), samples scored, rows that go back
    for a gradient, which no budget limits, but which take time."""

    evals: int = 0
    decodes: int = 0
    reward_calls: int = 0
    backwards: int = 0

    @property
    def work(self) -> int:
        """What takes the time, in evaluations: about two a row that goes back."""
        return self.evals + BACK * self.backwards

    def plus(self, other: Cost, times: int = 1) -> Cost:
        return Cost(*(a + times * b for a, b in zip(self, other, strict=True)))


NOTHING = Cost()


@dataclass(frozen=True)
class Budget:
    """What a search may spend; None leaves a currency free.

    The counts are those of one prompt, so that no prompt's result depends on the others; the seconds are those of the whole
    call. Without a budget a search spends what its own parameters say; with one it goes on until the budget is spent.

    A `choice=` reward, which looks at what is kept, comes on top.

    Args:
        evals: rows through the denoiser (with classifier-free guidance a step is two), rows that are computed again for a
            gradient included. The pass back is not in it: the ledger tells `backwards`, each about two evaluations' worth.
        seconds: wall time. It is kept by predicting what is asked for next from what was measured. One sample a prompt is made
            in any case and, where any time is left then, one that tells what a sample takes when everything is loaded.
        reward_calls, decodes: samples scored and decoded.

    Raises:
        DiffsteerError: a number that is not above 0.
    """

    evals: int | None = None
    seconds: float | None = None
    reward_calls: int | None = None
    decodes: int | None = None

    def __post_init__(self) -> None:
        whole = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seconds"}
        check_numbers("budget: ", {n: v for n, v in whole.items() if v is not None}, {"seconds": self.seconds})
        for name, value in {**whole, "seconds": self.seconds}.items():
            if value is not None and not value > 0:
                raise DiffsteerError(f"budget: {name}={value}; it must be above 0")

    def limits(self) -> dict[str, int]:
        """The counts that are limited."""
        counts = {name: getattr(self, name, None) for name in Cost._fields}
        return {name: limit for name, limit in counts.items() if limit is not None}

    def __bool__(self) -> bool:
        """Is anything limited?"""
        return any(getattr(self, f.name) is not None for f in fields(self))


class Stopwatch:
    """The seconds of a call, and what the next ones will take, from what rounds took so far.

    Attributes:
        limit: seconds, None for no limit. prompts: which share the time.
        reserved: seconds that are kept for the finals. final: what one of them took, once it is known.
        pending: work that was granted since the last round.
    """

    def __init__(self, limit: float | None, now: Callable[[], float] = time.perf_counter) -> None:
        self.limit, self.now, self.began = limit, now, now()
        self.prompts, self.pending, self.reserved = 1, 0, 0.0
        self.final: float | None = None
        self._begun = False  # what the first round loads and warms up is in its time
        self._later: tuple[int, float] = (0, 0.0)

    @property
    def elapsed(self) -> float:
        return self.now() - self.began

    @property
    def measured(self) -> bool:
        """Is it known what a round takes?"""
        return self._later[0] > 0

    def note(self, work: int, seconds: float) -> None:
        """A round took so long."""
        self.pending = 0
        if self._begun:
            self._later = (self._later[0] + work, self._later[1] + seconds)
        self._begun = True

    def seconds(self, work: int) -> float:
        """What so much work (`Cost.work`) will take: by the rounds after the first."""
        count, took = self._later
        return took / count * work if count else 0.0

    def fits(self, cost: Cost, further: Cost, until: float = 1.0) -> int:
        """How many of a cost still fit, one after another, with `further` and what is reserved, within a share of the time;
        one at a time, until a round that loaded nothing is measured."""
        if self.limit is None:
            return 2**31
        left = until * (self.limit - self.reserved) - self.elapsed
        if not self._later[0]:
            return int(left > 0 and not self.pending)
        left -= self.prompts * self.seconds(further.work) + self.seconds(self.pending)
        each = self.seconds(cost.work)
        return max(0, int(left / each)) if each > 0 else int(left > 0) * 2**31


class Purse:
    """The budget of one prompt.

    Attributes:
        spent: so far. reserve: what is kept back for the end of the search, beside what the caller asks to keep.
    """

    def __init__(self, budget: Budget, watch: Stopwatch) -> None:
        self.budget, self.watch = budget, watch
        self.spent, self.reserve = Cost(), Cost()
        self.slots = 0  # trials so far, each of which has randomness of its own
        self.until = 1.0  # the share of the budget that may be spent for now

    @property
    def limited(self) -> bool:
        return bool(self.budget)

    def affords(self, cost: Cost, further: Cost = NOTHING, late: bool = False) -> int:
        """How many of a cost can be paid, with `further` and the reserve still paid afterwards; `late` asks no clock."""
        counts = [2**31 if late else self.watch.fits(cost, further, self.until)]
        for name, limit in self.budget.limits().items():
            each, spent, after, kept = (getattr(c, name) for c in (cost, self.spent, further, self.reserve))
            left = int((limit - kept) * self.until) - spent - after
            counts.append(2**31 if not each and left >= 0 else max(0, left // each) if each else 0)
        return min(counts)

    def pay(self, cost: Cost, count: int = 1) -> None:
        self.spent = self.spent.plus(cost, count)
        self.watch.pending += count * cost.work

    def share(self) -> float:
        """How much of the budget is gone, in [0, 1]; 0 without one."""
        gone = [getattr(self.spent, name) / limit for name, limit in self.budget.limits().items()]
        if self.budget.seconds is not None:
            gone.append(self.watch.elapsed / self.budget.seconds)
        return min(1.0, max(gone, default=0.0))
