"""Ask and tell: what a search asks for (`Trial`), what it is told (`Outcome`), and the place it plays in (`Arena`).

A search is a generator: it yields lists of trials and is sent the outcomes, as many as the budget paid for, in their order. It
knows no model: trials are carried out by a `diffsteer.ground.Ground`, which may be a pipeline or a bare function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffsteer import rng
from diffsteer.algebra import Level, transition
from diffsteer.budget import Cost, Purse
from diffsteer.judging import Judge
from diffsteer.prior import Diagnosis, diagnose
from diffsteer.rng import Id
from diffsteer.types import DiffsteerError

SLOTS = 2**20  # a prompt's trials at most, each a row of its own
Path = tuple[tuple[int, int, int], ...]  # (slot, start, stop): by whose noise a state came about


@dataclass(frozen=True, eq=False)
class Trial:
    """One row of work: carry a state from level `start` to `stop`, and score it there.

    Attributes:
        x: the state, (*shape); where `fresh`, unit noise that the session has yet to scale.
        start, stop: grid indices; stop None is the end, where the sample itself is scored, else its clean estimate is.
        look: deterministic steps from `stop` on, for the score alone.
        eta: amount of noise in the transition; None is the session's.
        scored: wants a reward.
        gradient: of the reward with respect to `x` (and `injected`), or, given a tensor, of its inner product with the sample.
        through: only the last so many steps get a gradient; before, clean estimates count as constants.
        checkpoint: steps are computed again for the gradient, in the place of being kept in memory.
        injected: (T, *shape), the noise of every transition, in the place of keyed noise.
        root, path: the unit noise that the state descends from, and how it got where it is. given: that noise as the model saw
            it, where a transform changed it.
    """

    x: Tensor
    start: int = 0
    stop: int | None = None
    fresh: bool = False
    look: int = 0
    eta: float | None = None
    scored: bool = True
    gradient: bool | Tensor = False
    through: int | None = None
    checkpoint: bool = True
    injected: Tensor | None = None
    root: Tensor | None = None
    path: Path = ()
    given: Tensor | None = None


@dataclass(eq=False)
class Outcome:
    """What became of a trial.

    Attributes:
        begun: the state at `start`. x, x0: the state at `stop`, and the clean estimate of the last step before.
        reward: the score, where it is a number by itself, else NaN: ensembles and duels are ordered by `Arena.order`.
        scores: one a term of the reward, (R,).
        sample: what was scored, decoded; only of finished ones.
        noise: of a fresh trial, its unit noise as the model was given it.
        gradient, injected_gradient: where asked for.
        slot: its number. path: of the state at `stop`.
    """

    trial: Trial
    slot: int
    stop: int
    begun: Tensor
    x: Tensor
    x0: Tensor
    final: bool
    reward: float = float("nan")
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    sample: Tensor | None = None
    noise: Tensor | None = None
    gradient: Tensor | None = None
    injected_gradient: Tensor | None = None
    drafted: Outcome | None = None  # which draft this one was rendered from

    @property
    def root(self) -> Tensor | None:
        """The unit noise that it descends from, before any transform."""
        return self.trial.x if self.trial.fresh else self.trial.root

    @property
    def path(self) -> Path:
        return (*self.trial.path, (self.slot, self.trial.start, self.stop))

    def diagnosis(self) -> Diagnosis | None:
        """Of the noise it came from, or of that on its way where it was chosen, too, and is farther off."""
        known = (self.noise, self.trial.given, self.root)
        first = next((diagnose(z) for z in known if z is not None), None)
        if self.trial.injected is None:
            return first
        further = diagnose(self.trial.injected.flatten(0, 1) if self.x.ndim > 1 else self.trial.injected.flatten())
        return further if first is None or further.worst > first.worst else first

    @property
    def line(self) -> dict[str, Any]:
        """Where it comes from, for a trial that descends from it."""
        return {"root": self.root, "path": self.path, "given": self.trial.given if self.noise is None else self.noise}

    def onward(self, stop: int | None, **more: Any) -> Trial:
        """A trial that goes on from here."""
        return Trial(self.x, self.stop, stop, **self.line, **more)

    def light(self, known: bool = False) -> Outcome:
        """Without what is large; `known`: what it takes to begin from it stays."""
        none = torch.empty(0)
        if known:
            return replace(self, begun=none, x=none, x0=none, sample=None, gradient=None, injected_gradient=None)
        keep = self.trial.gradient is not False  # iterates are few, and may be rendered
        bare = replace(self.trial, x=self.trial.x if keep else none, injected=None, root=None, given=None, path=())
        none_: dict[str, Any] = {"begun": none, "x": none, "x0": none, "sample": None, "noise": None}
        return replace(self, trial=bare, gradient=None, injected_gradient=None, **none_)


Asking = Generator[list[Trial], list[Outcome], None]


class Arena:
    """What a search knows of its prompt, and what it may draw.

    Attributes:
        steps, levels, shape: of the grid and of a state.
        starts: noises to begin with, the best first, from a stage before; may be empty.
        purse: the budget; `judge`: who tells better from worse.
    """

    def __init__(
        self,
        steps: int,
        levels: Sequence[Level],
        shape: Sequence[int],
        seed: int,
        id: Id,
        purse: Purse,
        judge: Judge,
        price: Any,
        starts: Sequence[Outcome] = (),
        eta: float = 0.0,
        noise_kind: str = "eta",
        drawn: int = 0,
    ) -> None:
        self.steps, self.levels, self.shape = steps, list(levels), tuple(shape)
        self.seed, self.id, self.purse, self.judge, self.price = seed, id, purse, judge, price
        self.starts, self.eta, self.noise_kind = list(starts), eta, noise_kind
        self._drawn = drawn
        self.chance = rng.generator(seed, id, "search")  # for choices, not for noise

    def draw(self, number: int) -> list[Tensor]:
        """Fresh unit noises, keyed by their number."""
        keys = [(self.id, self._drawn + i) for i in range(number)]
        self._drawn += number
        return list(rng.normal(self.seed, keys, 0, "start", self.shape)) if number else []

    def begin(self, number: int) -> list[Tensor]:
        """That many noises to begin with: those of the stage before, each once, as far as they go, then fresh ones."""
        old: list[Tensor] = []
        for start in self.starts:
            if start.root is not None and not any(start.root is z for z in old):
                old.append(start.root)
        return [*old[:number], *self.draw(max(0, number - len(old)))]

    def fresh(self, noises: Sequence[Tensor], **more: Any) -> list[Trial]:
        """Trials of whole chains, one a noise."""
        return [Trial(z, fresh=True, **more) for z in noises]

    def rounds(self, number: int) -> Iterator[int]:
        """So many rounds; with a budget as many as it pays for."""
        return islice(count(), None if self.purse.limited else number)

    def order(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The best first; of equals, and of what cannot be told apart, the earlier one."""
        ranks = self.judge.order(outcomes)
        return [outcomes[i] for i in ranks]

    def best(self, outcomes: Sequence[Outcome]) -> Outcome:
        return self.order(outcomes)[0]

    def pays(self, *plan: tuple[Trial, int]) -> bool:
        """Does what is left pay for so many of these trials together?"""
        total = Cost()
        for trial, number in plan:
            total = total.plus(self.price(trial), number)
        return self.purse.affords(total) > 0

    def events(self, shares: Sequence[float]) -> list[int]:
        """Shares of the chain as distinct grid indices inside it."""
        return sorted({min(self.steps - 1, max(1, round(s * self.steps))) for s in shares} - {0, self.steps})

    def noised(self, x: Tensor, at: int, to: int, z: Tensor) -> Tensor:
        """A state at grid index `at` taken back to `to`, at a higher noise level, by noise z."""
        low, high = self.levels[at], self.levels[to]
        ratio = high.alpha / low.alpha
        spread = (high.sigma**2 - ratio**2 * low.sigma**2).clamp(min=0).sqrt()
        return (ratio.to(x.device) * x.double() + spread.to(x.device) * z.to(x.device).double()).to(x.dtype)

    def stepped(self, x: Tensor, x0: Tensor, at: int, eta: float, z: Tensor) -> Tensor:
        """One transition from index `at` to the next, whose clean estimate is known: no evaluation."""
        here = self.levels[at]
        eps = (x - here.alpha.to(x) * x0) / here.sigma.to(x)
        return transition(x0, eps, here, self.levels[at + 1], eta, z.to(x), self.noise_kind)

    def injected(self, outcome: Outcome) -> Tensor:
        """The noise of every transition along an outcome's path, (T, *shape); fresh noise where the path is not known."""
        if outcome.trial.injected is not None:
            return outcome.trial.injected
        keys = [(self.id, outcome.slot)]
        noise = torch.cat([rng.normal(self.seed, keys, k, "unknown", self.shape) for k in range(self.steps)])
        for slot, start, stop in outcome.path:
            for k in range(start, stop):
                noise[k] = rng.normal(self.seed, [(self.id, slot)], k, "step", self.shape)[0]
        return noise


@dataclass(frozen=True, kw_only=True)
class Search:
    """A sampler that searches: parameters as fields, facts as class attributes, one generator.

    Args:
        keep: samples that are kept, the best and those that differ from it.
        diversity: in [0, 1], how much being different counts among them (maximal marginal relevance); 0: the best alone count.
    """

    keep: int = 4
    diversity: float = 0.3

    name: ClassVar[str] = "search"
    exact: ClassVar[bool] = False
    needs_grad: ClassVar[bool] = False
    needs_reward: ClassVar[bool] = True
    source: ClassVar[str] = ""
    eta = 0.0  # of the session; trials may say otherwise. No annotation: where it is a field it comes where it stands
    cuts: ClassVar[bool] = False  # asks for less than whole chains, or for gradients: the transition is then diffsteer's
    drafts: ClassVar[bool] = False  # by default on drafts
    numbers: ClassVar[bool] = False  # wants rewards that are numbers by themselves
    particles: ClassVar[int] = SLOTS

    @property
    def of_noise(self) -> bool:
        """Is a sample a function of its unit noise, so that it can be made again on another grid?"""
        return not self.cuts

    def __post_init__(self) -> None:
        self.check(keep=(1, None), diversity=(0, 1))

    def check(self, **ranges: tuple[float | None, float | None]) -> None:
        """Refuse fields outside of [low, high].

        Raises:
            DiffsteerError: with the field, its value and the range.
        """
        fields = {f.name: str(f.type) for f in dataclasses.fields(self)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is None and "None" in fields[name]:
                continue
            whole = fields[name].startswith("int")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise DiffsteerError(f"{self.name}: {name}={value!r} is no {'whole ' * whole}number")
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                said = f"at least {low:g}" if high is None else f"in [{low:g}, {high:g}]"
                raise DiffsteerError(f"{self.name}: {name}={value:g}; it is {said}")

    def check_shares(self, name: str) -> None:
        """Refuse a field that is no list of shares in (0, 1).

        Raises:
            DiffsteerError: with the field.
        """
        values = getattr(self, name)
        numbers = isinstance(values, Sequence) and all(type(v) in (int, float) for v in values)
        if not numbers or not values or not all(0 < v < 1 for v in values):
            raise DiffsteerError(f"{self.name}: {name}={values!r}; wanted shares of the chain in (0, 1), such as [0.3, 0.6]")

    def search(self, arena: Arena) -> Asking:
        """Ask for trials and be told outcomes until nothing is left to ask."""
        raise NotImplementedError

    def finalists(self, drafts: Sequence[Outcome], number: int) -> list[Outcome]:
        """Which drafts, given the best first, are made in full."""
        return list(drafts[:number])

    def evaluations(self, steps: int) -> int:
        """Evaluations where a chain has so many steps, without a budget, guidance or drafts."""
        raise NotImplementedError


ALIKE = 0.5  # the cosine above which two noises are taken for iterates of one


def along_ways(drafts: Sequence[Outcome], number: int) -> list[Outcome]:
    """Finalists among the drafts of an optimisation, given the best first. What is gained on a model for drafts may be its own,
    and the more so the farther from the start. So the best of some other noises, too, a third of the finalists at most, and of
    the best one's way further iterates evenly back to its start, the start included. Iterates of one noise are alike, and
    independent noises are at right angles.
    """
    if not drafts:
        return []
    ways: list[list[Outcome]] = []
    for draft in drafts:
        noise = _direction(draft)
        mine = next((w for w in ways if float((noise * _direction(w[0])).sum()) > ALIKE), None)
        if mine is None:
            ways.append([draft])
        else:
            mine.append(draft)
    others = [way[0] for way in ways[1 : 1 + number // 3]]
    way = sorted((d for d in ways[0] if d.slot <= drafts[0].slot), key=lambda d: d.slot)
    places = torch.linspace(len(way) - 1, 0, max(number - len(others), 1)).round().long().tolist()
    back = [way[i] for i in dict.fromkeys(places)]
    chosen = [*back[:1], *others, *back[1:]]
    rest = [d for d in drafts if all(d is not c for c in chosen)]
    return [*chosen, *rest][:number]


def _direction(draft: Outcome) -> Tensor:
    root = draft.root
    flat = torch.zeros(1) if root is None else root.flatten().double()
    unit: Tensor = flat / flat.norm().clamp(min=1e-12)
    return unit


class Single(Search):
    """One plain deterministic chain."""

    name = "single"

    def search(self, arena: Arena) -> Asking:
        yield arena.fresh(arena.begin(1))

    def evaluations(self, steps: int) -> int:
        return steps
