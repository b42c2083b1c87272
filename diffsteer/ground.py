"""Where trials are carried out, and what they cost: on a bare function, or, to tell what a search will ask for, nowhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsteer.algebra import Level, level
from diffsteer.budget import Cost, Purse
from diffsteer.judging import ByDuel, ByReward, Judge
from diffsteer.ledger import Ledger
from diffsteer.trial import Outcome, Trial
from diffsteer.types import DiffsteerError

Ask = tuple[int, int, Trial]  # of which prompt, under which slot, what


class Interrupted(KeyboardInterrupt):
    """Ctrl-C within a round: `done` are the outcomes that there were already, `lost` what was spent on others, by place."""

    def __init__(self, done: dict[int, Outcome], lost: dict[int, Cost]) -> None:
        super().__init__()
        self.done, self.lost = done, lost


@dataclass(frozen=True)
class Costs:
    """What a trial's cost follows from.

    Attributes:
        per_step: evaluations of a row's step. further: of a whole chain beside. begun: of what is done to a first noise.
        decoded: samples are decoded before they are scored. compared: a score alone costs nothing: judges compare, two calls a
            pair.
        tiny: samples on the way are decoded by a tiny decoder; tiny_finals: finished ones, too.
    """

    per_step: int = 1
    further: int = 0
    begun: int = 0
    decoded: bool = True
    compared: bool = False
    tiny: bool = False
    tiny_finals: bool = False

    def price(self, trial: Trial, total: int) -> Cost:
        """Of one trial on a grid of `total` steps."""
        stop = total if trial.stop is None else trial.stop
        steps = stop - trial.start + (min(trial.look, total - stop) if stop < total else 0)
        if trial.gradient is not False and trial.checkpoint:
            steps += min(trial.through or total, stop - trial.start)
        whole = trial.start == 0 and stop == total
        evals = steps * self.per_step + whole * self.further + trial.fresh * self.begun
        decodes = int(self.decoded and (trial.scored or trial.gradient is not False))
        back = 0 if trial.gradient is False else min(trial.through or total, total)
        return Cost(evals, decodes, int(trial.scored and not self.compared), back)


class Ground(ABC):
    """Carries out trials and says what they cost before.

    Attributes:
        steps, levels, shape: of the grid and of a state. prompts: how many. seed, ids: the key of all randomness.
    """

    steps: int
    levels: list[Level]
    shape: tuple[int, ...]
    ledger: Ledger
    seed: int
    ids: Sequence[Any]
    eta: float = 0.0
    noise_kind: str = "eta"

    @abstractmethod
    def price(self, trial: Trial) -> Cost:
        """What a trial will count."""

    @abstractmethod
    def carry(self, asks: Sequence[Ask]) -> list[Outcome]:
        """Carry out trials of any prompts, together where they are alike.

        Raises:
            Interrupted: by Ctrl-C, with what there is.
        """

    @abstractmethod
    def judge(self, prompt: int, purse: Purse | None = None) -> Judge:
        """Who orders the outcomes of a prompt; judges that compare pay from the purse."""

    @property
    def solved(self) -> float:
        """A reward that cannot be exceeded: there is nothing left to search for."""
        return float("inf")

    @property
    def over(self) -> bool:
        """Can nothing be carried out any more?"""
        return False

    @property
    def compared(self) -> bool:
        """Are samples compared with each other, and not scored?"""
        return False

    def alike(self, other: Ground) -> bool:
        """Does the same reward score what is made on both?"""
        return True


class DryGround(Ground):
    """No model: outcomes are made up, so that a search shows what it will ask for. What it costs where that depends on rewards
    is one example."""

    def __init__(self, steps: int, levels: Sequence[Level], costs: Costs) -> None:
        self.steps, self.costs, self.shape, self.seed, self.ids = steps, costs, (4,), 0, [0]
        known = [level(1 - k / steps, k / steps) for k in range(steps, -1, -1)]
        self.levels = list(levels) if len(levels) == steps + 1 else known
        self.ledger = Ledger()
        self._climbs = False
        self._chance = torch.Generator().manual_seed(0)

    @property
    def compared(self) -> bool:
        return self.costs.compared

    def price(self, trial: Trial) -> Cost:
        return self.costs.price(trial, self.steps)

    def judge(self, prompt: int, purse: Purse | None = None) -> Judge:
        if not self.costs.compared:
            return ByReward()
        return ByDuel(lambda them, pairs: torch.tensor([float(them[i].reward > them[j].reward) for i, j in pairs]), purse)

    def carry(self, asks: Sequence[Ask]) -> list[Outcome]:
        outcomes = []
        for _, slot, t in asks:
            stop = self.steps if t.stop is None else t.stop
            self._climbs |= t.gradient is not False
            reward = (
                float(torch.rand((), generator=self._chance, dtype=torch.float64)) + slot * self._climbs
            )  # iterates improve
            made = Outcome(t, slot, stop, t.x, t.x, t.x, stop == self.steps, reward, torch.tensor([reward]), t.x, t.x)
            made.gradient = torch.ones_like(t.x)
            made.injected_gradient = None if t.injected is None else torch.ones_like(t.injected)
            outcomes.append(made)
            cost, tiny = self.price(t), self.costs.tiny_finals or (self.costs.tiny and not made.final)
            self.ledger.decodes += 0 if tiny else cost.decodes
            self.ledger.tiny_decodes += cost.decodes if tiny else 0
            self.ledger.backwards += cost.backwards
        return outcomes


class FunctionGround(Ground):
    """A function of noise, (N, *shape) -> (N,), in a model's place: a chain of one step that changes nothing. For trying out
    searches."""

    def __init__(self, function: Callable[[Tensor], Tensor], shape: Sequence[int], seed: int = 0, ids: Sequence[Any] = (0,)):
        self.function, self.shape, self.seed, self.ids = function, tuple(shape), seed, list(ids)
        self.steps, self.levels, self.ledger = 1, [level(0.0, 1.0), level(1.0, 0.0)], Ledger().open()

    def price(self, trial: Trial) -> Cost:
        return Cost(1, 0, int(trial.scored), int(trial.gradient is not False))

    def judge(self, prompt: int, purse: Purse | None = None) -> Judge:
        return ByReward()

    def carry(self, asks: Sequence[Ask]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        try:
            for _, slot, trial in asks:
                outcomes.append(self._called(slot, trial))
        except KeyboardInterrupt as stop:
            raise Interrupted(dict(enumerate(outcomes)), {}) from stop
        return outcomes

    def _called(self, slot: int, trial: Trial) -> Outcome:
        if (trial.start, trial.stop) not in ((0, None), (0, 1)):
            raise DiffsteerError("a function has no steps on the way: this search wants a chain of several")
        with torch.enable_grad():
            x = trial.x.detach().clone().requires_grad_(trial.gradient is not False)
            value = self.function(x[None])[0]
            gradient = None
            if trial.gradient is not False:
                target = value if trial.gradient is True else (x * trial.gradient).sum()
                gradient = torch.autograd.grad(target, x)[0]
        x = x.detach()
        self.ledger.evaluations += 1
        self.ledger.reward_calls += int(trial.scored)
        return Outcome(trial, slot, 1, x, x, x, True, float(value.detach()), value.detach()[None], x, trial.x, gradient)
