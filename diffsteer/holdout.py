"""Rewards that look on and never steer: what selection did to them, beside what it did to the reward that it followed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsteer.reward import Reward, RewardFunction, as_reward
from diffsteer.types import DiffsteerError
from diffsteer.warn import Notice, warn

SURE = 2.0  # standard deviations of blind choice, beyond which a fall is told


class DriftWarning(Notice):
    """The choice raised the reward that it followed and lowered one that was held out."""


@dataclass(frozen=True)
class Selected:
    """What selection did to a reward, by prompt.

    Every time some particles are chosen and others not, the mean of the chosen ones less the mean of all is what the choice
    gained (the selection differential of Price, 1970). `gains` are the sums over a run's resamplings and its final choice, and
    `variances` what they would scatter by if the choice had been blind, made with the same numbers of copies.

    Attributes:
        gains, variances: (P,).
    """

    gains: Tensor
    variances: Tensor

    @property
    def mean(self) -> float:
        """Of the gains."""
        return float(self.gains.mean())

    @property
    def score(self) -> float:
        """The sum of the gains in standard deviations of blind choice; 0 where there was none."""
        spread = math.sqrt(float(self.variances.sum()))
        return float(self.gains.sum()) / spread if spread > 0 else 0.0

    def plus(self, other: Selected) -> Selected:
        return Selected(self.gains + other.gains, self.variances + other.variances)


def nothing(groups: int) -> Selected:
    """Before any choice."""
    return Selected(torch.zeros(groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64))


def selected(scores: Tensor, ancestors: Tensor) -> Selected:
    """One choice: scores (P, K) of those there were, ancestors (P, M) of those that live on. Where a score is no number, this
    choice tells nothing of that prompt, and counts as none."""
    scores = scores.double()
    scores = scores.masked_fill(~scores.isfinite(), math.nan)
    k = scores.shape[1]
    shares = torch.zeros_like(scores).scatter_add_(1, ancestors, torch.full(ancestors.shape, 1 / ancestors.shape[1]).to(scores))
    gains = (scores.gather(1, ancestors)).mean(1) - scores.mean(1)
    spread = scores.var(1, correction=1) if k > 1 else torch.zeros(len(scores), dtype=torch.float64)
    variances = spread * (shares.square().sum(1) - 1 / k)
    known = gains.isfinite() & variances.isfinite()
    return Selected(gains.where(known, 0.0), variances.where(known, 0.0))


@dataclass(frozen=True)
class HeldOut:
    """A reward that looked on: its scores of all particles, (P, K), and what selection did to it."""

    scores: Tensor
    selected: Selected


def holdouts_of(given: Any, seen: str) -> dict[str, Reward]:
    """Rewards that look on, by name, from one, several, or a mapping.

    Args:
        seen: what bare callables are given, "pixels" or "latents".

    Raises:
        DiffsteerError: two of one name, or one that only ranks.
    """
    if given is None:
        return {}
    several: Sequence[Reward | RewardFunction] = list(given) if isinstance(given, (list, tuple)) else [given]
    named = given.items() if isinstance(given, Mapping) else [(None, r) for r in several]
    found: dict[str, Reward] = {}
    for name, reward in ((name, as_reward(r, seen)) for name, r in named):
        name = reward.name if name is None else str(name)
        if name in found:
            raise DiffsteerError(f"holdout: two rewards are called {name}: give them names, holdout={{'one': ...}}")
        if reward.pooled:
            raise DiffsteerError(f"holdout: {reward.name} only ranks what it is shown together; hold out a reward that scores")
        found[name] = reward
    return found


def warn_of_drift(steered: Selected, held: Mapping[str, Selected], where: str = "") -> None:
    """Say so where the choice raised the reward that it followed, and lowered one that was held out, by more than blind choice
    would."""
    for name, one in held.items():
        if steered.mean > 0 and one.score < -SURE:
            warn(
                f"{where}what was chosen is {steered.mean:.3g} higher by the reward that steers, and {-one.mean:.3g} lower by "
                f"the held-out {name} ({one.score:.1f} standard deviations of blind choice): the gain may not show",
                DriftWarning,
            )
