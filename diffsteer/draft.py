"""Drafts: a search on cheap versions of what is wanted, of which the best few are made again in full and ranked anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffsteer.reward import Reward, RewardFunction
from diffsteer.schedules import Given
from diffsteer.trial import Search
from diffsteer.types import DiffsteerError, check_numbers


@dataclass(frozen=True)
class Draft:
    """What is cheaper while searching. Where nothing is, only the final ranking is anew.

    Finals are rendered from the noise of the drafts, which a deterministic chain makes a like picture of; how alike is told by
    `Gap` in the result. Searches whose samples are no function of their first noise (those with noise on the way) can have a
    cheaper reward, no shorter chain and no other model: they are refused by name.

    Args:
        steps: of a draft's chain; or `share` of the full chain's. Default: all.
        decoder: "tiny" or "tiny:PATH" for drafts; default: the full one.
        reward: for drafts; default: that of the search.
        model: a pipeline (or `CallableModel`) whose noise means the same, such as one distilled to few steps: the search, or
            the optimisation, runs on it, as DITTO-2 does (Novack et al., 2024, arXiv 2405.20289).
        call: arguments of that model's call; `num_inference_steps` is `steps`.
        finalists: drafts that are made again in full; at most half of the budget goes to them.

    Raises:
        DiffsteerError: a value out of its range; steps and share together.
    """

    steps: int | None = None
    share: float | None = None
    decoder: str | None = None
    reward: Reward | RewardFunction | None = None
    model: Any = None
    call: Mapping[str, Any] = field(default_factory=dict)
    finalists: int = 4

    def __post_init__(self) -> None:
        given = {} if self.steps is None else {"steps": self.steps}
        check_numbers("draft: ", given | {"finalists": self.finalists}, {"share": self.share})
        if self.steps is not None and self.share is not None:
            raise DiffsteerError("draft: steps and share are two lengths of a chain: give one of them")
        if self.steps is not None and self.steps < 1 or self.finalists < 1:
            raise DiffsteerError(f"draft: steps={self.steps}, finalists={self.finalists}; both are at least 1")
        if self.share is not None and not 0 < self.share <= 1:
            raise DiffsteerError(f"draft: share={self.share:g}; it lies in (0, 1]")
        if self.decoder is not None and self.decoder != "tiny" and not self.decoder.startswith("tiny:"):
            raise DiffsteerError(f"draft: decoder={self.decoder!r}; valid: tiny, tiny:PATH")
        if self.call and self.model is None:
            raise DiffsteerError("draft: call= is for the model of the drafts: give model=")

    @property
    def shorter(self) -> bool:
        """Is the chain another one?"""
        return self.steps is not None or self.share is not None or self.model is not None

    def length(self, steps: int | None) -> int | None:
        """Steps of a draft, given those of the full chain; None is the model's own default."""
        if self.steps is not None or steps is None:
            return self.steps
        return None if self.share is None else max(1, round(self.share * steps))


DEFAULT = Draft(share=1 / 3)  # where a budget does not pay for a draft and its final, there are none


def draft_of(draft: Draft | bool | None, search: Search) -> Draft | None:
    """The drafts of a search: None is its own default, False none.

    Raises:
        DiffsteerError: a shorter chain for a search whose samples are no function of their first noise.
    """
    if draft is None:
        return DEFAULT if search.drafts else None
    if draft is True or draft is False:
        return DEFAULT if draft else None
    if draft.shorter and not search.of_noise:
        raise DiffsteerError(
            f"{search.name}: what it finds is no function of the first noise, so that it cannot be made again in full: draft "
            "with reward= alone, or take a search of noises such as random_search, zero_order or reno"
        )
    return draft


def on_grid(draft: Draft | None, schedule: Any, call: Mapping[str, Any]) -> Draft | None:
    """The drafts where the grid may be given in numbers, of which there are as many as there are: then no default ones.

    Raises:
        DiffsteerError: drafts of other steps that were asked for.
    """
    numbers = isinstance(schedule, Given) or any(call.get(key) is not None for key in ("sigmas", "timesteps"))
    if not numbers or draft is None or draft.model is not None or (draft.steps is None and draft.share is None):
        return draft
    if draft is DEFAULT:
        return None
    raise DiffsteerError("draft: fewer steps want a grid that can be made shorter, not one in numbers")
