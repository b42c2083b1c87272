"""The nouns that methods, rewards and backends share. Nothing here knows a method, a reward or a model.

Rows are indexed (prompt, particle): P prompts with K particles each, prompt-major, row = p * K + k.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from diffsteer.rng import Id


class DiffsteerError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what is valid."""


class UnsupportedError(DiffsteerError):
    """A pipeline, scheduler or combination that cannot do what is asked, refused by name before any work is done."""


class FailedError(DiffsteerError):
    """Some prompts of a batch could not be made; the others were."""


class PromptError(DiffsteerError):
    """A prompt that a reward cannot read; the message says what in it."""


class RewardError(DiffsteerError):
    """A reward raised or returned something that is no reward; the message names the reward, the prompt and the step."""


def check_numbers(who: str, whole: dict[str, Any] | None = None, real: dict[str, Any] | None = None) -> None:
    """Refuse parameters that are no numbers.

    Raises:
        DiffsteerError: with the first that is not a whole number (of `whole`), or not a number (of `real`; None passes).
    """
    for name, value in (whole or {}).items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise DiffsteerError(f"{who}{name}={value!r} is no whole number")
    for name, value in (real or {}).items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise DiffsteerError(f"{who}{name}={value!r} is no number")


def nearest(name: str, valid: Iterable[str]) -> str:
    """How a message about a wrong name ends: ``; did you mean 'x'? valid: x, y``."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, 1, 0.5)
    return (f"; did you mean {near[0]!r}?" if near else ";") + f" valid: {', '.join(valid)}"


def setting(default: Any, *, choices: Sequence[str] = (), low: float | None = None, high: float | None = None) -> Any:
    """A field of a sampler's or a reward's dataclass that says which values it takes, for faces that offer them to people.
    Checking stays with the class."""
    facts = {"choices": tuple(choices), "low": low, "high": high}
    return field(default=default, metadata={name: fact for name, fact in facts.items() if fact not in (None, ())})


@dataclass(frozen=True)
class Problem:
    """What a sampler is asked to steer.

    Attributes:
        groups: P.
        steps: T, the number of transitions of the chain.
        last_noise: the index of the last transition that adds noise, -1 if none does. Copies made after it never part.
        seed, ids: the key of the randomness and one id a prompt.
    """

    groups: int
    steps: int
    last_noise: int
    seed: int
    ids: tuple[Id, ...]


@dataclass(frozen=True)
class Step:
    """What a sampler is shown at an event: `done` transitions lie behind, `rewards` (P, K) are those of the clean
    estimates of the last transition, or at the end (`final`) of the samples themselves. `log_ratio` (P, K) is log p / q of the
    transitions since the last event, where guidance moved them; None where nothing did."""

    done: int
    final: bool
    rewards: Tensor
    log_ratio: Tensor | None = None


@dataclass(frozen=True)
class Info:
    """What a person wants to see of an event. (P, K) unless said; `exponent` is lambda, (P,)."""

    done: int
    rewards: Tensor
    log_weights: Tensor
    ess: Tensor  # (P,), before resampling
    ancestors: Tensor
    resampled: Tensor  # (P,) bool
    exponent: Tensor


class SamplerState(Protocol):
    """What every sampler's state offers."""

    log_weights: Tensor
    log_z: Tensor


@runtime_checkable
class Sampler(Protocol):
    """A steering method: parameters as dataclass fields, facts as class attributes, pure functions.

    `schedule` says after how many transitions it wants rewards (the end, `steps`, is always among them); `init` makes the
    first state; `apply` maps a state and what an event shows to the next state, without changing anything in place.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    needs_grad: ClassVar[bool]
    needs_reward: ClassVar[bool]
    source: ClassVar[str]

    @property
    def particles(self) -> int: ...

    @property
    def eta(self) -> float: ...

    def schedule(self, steps: int) -> tuple[int, ...]: ...

    def init(self, problem: Problem) -> Any: ...

    def apply(self, state: Any, step: Step) -> tuple[Any, Info]: ...


@dataclass(frozen=True)
class Context:
    """What a reward may want to know beside samples and prompts.

    Attributes:
        done, steps: the transitions behind and in all; ``done == steps`` for finished samples.
        embedded: the model is one that ships with diffsteer, whose vocabulary is that of its word list.
    """

    done: int = 0
    steps: int = 0
    embedded: bool = False


@dataclass(frozen=True)
class Trace:
    """The record of a run: one `Info` an event, in order; of time-shift also a `diffsteer.timing.Shift` a step that it
    looked at; of a search a `diffsteer.found.Found` a prompt, and no events. `looks`, where they were asked for, are what the
    reward was shown at each event: bytes (P, K, 3, h, w)."""

    events: tuple[Info, ...] = field(default=())
    shifts: tuple[Any, ...] = field(default=())
    searches: tuple[Any, ...] = field(default=())
    looks: tuple[Tensor, ...] = field(default=())

    @property
    def ancestors(self) -> list[Tensor]:
        """The ancestors (P, K) chosen at each event."""
        return [info.ancestors for info in self.events]

    def lineage(self) -> Tensor:
        """For every event, which of the first particles each particle descends from: (events + 1, P, K)."""
        import torch

        if not self.events:
            raise ValueError("a run without events has no lineage")
        groups, particles = self.events[0].ancestors.shape
        roots = [torch.arange(particles).expand(groups, particles)]
        for info in self.events:
            roots.append(roots[-1].gather(1, info.ancestors))
        return torch.stack(roots)
