"""What a search found, and what it shows on its way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffsteer.budget import Cost
from diffsteer.diversity import Diversity
from diffsteer.judging import ByRank, Judge
from diffsteer.prior import Diagnosis
from diffsteer.trial import Outcome


@dataclass(frozen=True)
class Gap:
    """What became of drafts at full quality: their rewards before (by the drafts' reward) and after, best draft first."""

    drafts: tuple[float, ...]
    finals: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of final minus draft; a number only where one reward scored both."""
        return sum(f - d for d, f in zip(self.drafts, self.finals, strict=True)) / max(1, len(self.finals))

    @property
    def kept_first(self) -> bool:
        """Is the best draft the best final, too?"""
        return bool(self.finals) and max(self.finals) == self.finals[0]


def gap_of(drafts: Sequence[Outcome], finals: Sequence[Outcome], before: Judge, after: Judge, together: bool) -> Gap:
    """The gap of drafts and their finals, by the judge of each.

    Args:
        together: one reward scored both, so that ranks are those among all of these.
    """
    if together and isinstance(after, ByRank):
        values = after.values([*drafts, *finals]).tolist()
        return Gap(tuple(values[: len(drafts)]), tuple(values[len(drafts) :]))
    return Gap(tuple(before.values(drafts).tolist()), tuple(after.values(finals).tolist()))


@dataclass(frozen=True)
class Progress:
    """Shown to whoever watches, once a round: of each prompt the best reward so far, and how much of the budget is gone."""

    best: tuple[float, ...]
    share: float
    evaluations: int


@dataclass(frozen=True)
class Found:
    """What a search found for one prompt.

    Attributes:
        outcomes: the samples that are kept, the best first. values: of them, by the judge: rewards, or ranks (ratings) among
            all that was compared.
        history: the best reward so far after so many evaluations, a point a gain: (evaluations, seconds, reward). Of drafts
            it is theirs, and the last point the best final's.
        scored: finished samples in all. spent: by the trials, drafts and finals.
        diagnoses: of the kept samples' noises: are they still what the model was trained on?
        diversity: of the kept samples, and `pool_diversity` of the best ones that it was chosen from.
        gap: of drafts and finals, where there were drafts.
        stopped: "done", "budget", "solved" or "interrupted".
    """

    outcomes: tuple[Outcome, ...]
    values: tuple[float, ...]
    history: tuple[tuple[int, float, float], ...]
    scored: int
    spent: Cost
    diagnoses: tuple[Diagnosis, ...]
    diversity: Diversity
    pool_diversity: Diversity
    gap: Gap | None = None
    stopped: str = "done"

    @property
    def clock(self) -> list[list[float]]:
        """When the points of the history were reached: (evaluations, seconds) each."""
        return [[e, round(s, 3)] for e, s, _ in self.history]

    def facts(self) -> dict[str, Any]:
        """What a record keeps of it, as JSON takes it: the same for the same search, so that `clock` is no part of it."""
        told: dict[str, Any] = {
            "stopped": self.stopped,
            "scored": self.scored,
            "spent": self.spent._asdict(),
            "history": [[e, r if math.isfinite(r) else None] for e, _, r in self.history],
            "prior": [asdict(d) for d in self.diagnoses],
            "diversity": self.diversity._asdict(),
            "pool_diversity": self.pool_diversity._asdict(),
        }
        if self.gap is not None:
            told["gap"] = {"drafts": _finite(self.gap.drafts), "finals": _finite(self.gap.finals)}
        return told


def _finite(values: Sequence[float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values]
