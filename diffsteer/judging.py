"""Who tells better from worse: a number, a mean rank over several rewards, or duels."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from diffsteer.budget import Cost, Purse
from diffsteer.reward import Reward, ZScore, as_reward
from diffsteer.types import Context, DiffsteerError, RewardError

if TYPE_CHECKING:
    from diffsteer.trial import Outcome


class Judge(Protocol):
    """Orders outcomes.

    Attributes:
        interrupted: Ctrl-C came while it compared; it went on with what it knew.
    """

    interrupted: bool

    def order(self, outcomes: Sequence[Outcome]) -> list[int]:
        """Positions, the best first; ties in the order given."""
        ...

    def values(self, outcomes: Sequence[Outcome]) -> Tensor:
        """(N,) float64, higher is better; comparable among these alone."""
        ...


def positions(values: Tensor) -> list[int]:
    """Where the highest, the next highest ... stand; NaN last, equals in their order."""
    each = values.double().tolist()
    return sorted(range(len(each)), key=lambda i: (math.isnan(each[i]), 0.0 if math.isnan(each[i]) else -each[i], i))


class ByReward:
    """A reward that is a number by itself."""

    interrupted = False

    def values(self, outcomes: Sequence[Outcome]) -> Tensor:
        return torch.tensor([o.reward for o in outcomes], dtype=torch.float64)

    def order(self, outcomes: Sequence[Outcome]) -> list[int]:
        return positions(self.values(outcomes))


class ByRank:
    """The weighted mean rank within whatever is compared: of incumbents and newcomers together, never across pools."""

    interrupted = False

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = list(weights)

    def values(self, outcomes: Sequence[Outcome]) -> Tensor:
        return mean_rank(torch.stack([o.scores for o in outcomes]), self.weights)

    def order(self, outcomes: Sequence[Outcome]) -> list[int]:
        return positions(self.values(outcomes))


def ranks(scores: Tensor) -> Tensor:
    """Ranks in [0, 1] of each column of (N, R), 1 being the highest: the share of the others that are beaten, ties half. NaN
    is worse than everything, -inf included, and ties with NaN. One alone has 0.5."""
    n = len(scores)
    if n < 2:
        return torch.full(scores.shape, 0.5, dtype=torch.float64)
    found = torch.empty(scores.shape, dtype=torch.float64)
    for j, column in enumerate(scores.double().unbind(1)):
        nan = column.isnan()
        known = column[~nan].sort().values
        low, high = (torch.searchsorted(known, column.masked_fill(nan, 0.0), right=right) for right in (False, True))
        lost = int(nan.sum())
        beaten = torch.where(nan, 0, low + lost)
        tied = torch.where(nan, lost, high - low) - 1
        found[:, j] = (beaten + 0.5 * tied) / (n - 1)
    return found


def mean_rank(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted mean of the ranks (Ma et al., 2025, arXiv 2501.09732), (N, R) -> (N,) in [0, 1]. Any increasing change of
    any column's scale leaves it as it is."""
    w = torch.tensor(weights, dtype=torch.float64)
    return (ranks(scores) * w).sum(1) / w.sum()


def is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


@dataclass(eq=False)
class RankEnsemble(Reward):
    """Several rewards by the mean of their ranks among what is compared: no scale of theirs matters (Ma et al., 2025, arXiv
    2501.09732).

    A search compares incumbents with newcomers by ranking them together. Samplers that weigh particles get the mean rank within
    each prompt's particles, in [0, 1]. No gradient.

    Cost: that of all its rewards.

    Args:
        rewards: two or more; on the command line names, or mappings with a ``name``.
        shares: weights of their ranks, positive; default: all alike.

    Raises:
        DiffsteerError: fewer than two; shares that do not fit; rewards that look at different things, or that only compare.
    """

    rewards: Sequence[Any] = field(default=(), metadata={"of": "reward"})
    shares: Sequence[float] | None = None

    name: ClassVar[str] = "rank_ensemble"
    modality: ClassVar[str] = "any"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    pooled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.rewards, str) or not isinstance(self.rewards, Sequence):
            raise DiffsteerError(f"rank_ensemble: rewards={self.rewards!r}; wanted several, such as rewards=[clip, aesthetic]")
        first = next((r.input for r in self.rewards if isinstance(r, Reward)), "pixels")
        self.rewards = [as_reward(r, first) for r in self.rewards]
        self.shares = [1.0] * len(self.rewards) if self.shares is None else list(self.shares)
        if len(self.rewards) < 2:
            raise DiffsteerError("rank_ensemble: it wants two rewards or more, such as rewards=[clip, aesthetic]")
        if len(self.shares) != len(self.rewards) or not all(is_share(w) for w in self.shares):
            raise DiffsteerError(f"rank_ensemble: shares={self.shares}; wanted {len(self.rewards)} positive numbers")
        if len({r.input for r in self.rewards}) > 1:
            raise DiffsteerError("rank_ensemble: rewards on pixels and on latents see different samples")
        scaled = next((r.name for r in self.rewards if isinstance(r, ZScore)), None)
        if scaled is not None:
            raise DiffsteerError(f"rank_ensemble: ranks have no scale, so that {scaled} is the reward itself: leave z() out")
        if any(r.pooled for r in self.rewards):
            raise DiffsteerError("rank_ensemble: its rewards are numbers by themselves, not ranks or duels")
        self.__dict__.update(
            input=self.rewards[0].input,
            deterministic=all(r.deterministic for r in self.rewards),
            needs_prompt=any(r.needs_prompt for r in self.rewards),
        )

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        for reward in self.rewards:
            reward.prepare(prompts, ctx)

    def combine(self, scores: Tensor) -> Tensor:
        """Scores (N, R) of one pool -> mean ranks (N,)."""
        return mean_rank(scores, self.shares or [])

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """The mean rank of each sample among those of the same prompt that are given with it, (N,)."""
        scores = torch.stack([r.rate(samples, prompts, ctx).double().cpu() for r in self.rewards], 1)
        found = torch.empty(len(samples))
        for prompt in dict.fromkeys(prompts):
            mine = [i for i, p in enumerate(prompts) if p == prompt]
            found[mine] = self.combine(scores[mine]).float()
        return found


class Duel(Reward):
    """A judge that only compares: subclasses write `compare`. A search lets it play tournaments.

    Used as a plain reward it gives each sample its Elo rating within its prompt's pool, around 0.
    """

    name = "duel"
    modality = "any"
    needs_prompt = True
    pooled = True

    def compare(self, a: Tensor, b: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """How likely each of `a` (N, ...) is better than its opponent in `b`: (N,) in [0, 1], 0.5 for a draw."""
        raise TypeError(f"{type(self).__name__} does not define compare(a, b, prompts, ctx)")

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Elo ratings after everybody has met everybody of the same prompt, (N,)."""
        found = torch.zeros(len(samples))
        for prompt in dict.fromkeys(prompts):
            mine = [i for i, p in enumerate(prompts) if p == prompt]
            pairs = [(i, j) for i in range(len(mine)) for j in range(i + 1, len(mine))]
            if pairs:
                won = both_ways(self, samples[mine], pairs, prompt, ctx)
                found[mine] = elo(len(mine), pairs, won).float()
        return found


def both_ways(duel: Duel, samples: Tensor, pairs: Sequence[tuple[int, int]], prompt: Any, ctx: Context) -> Tensor:
    """Results in [0, 1] of pairs (i, j), each met in both orders, so that a judge who likes the first one likes nobody.

    Raises:
        RewardError: results that are no probabilities.
    """
    i, j = (torch.tensor([p[k] for p in pairs]) for k in (0, 1))
    texts = [prompt] * len(pairs)
    there = torch.as_tensor(duel.compare(samples[i], samples[j], texts, ctx)).double().cpu()
    back = torch.as_tensor(duel.compare(samples[j], samples[i], texts, ctx)).double().cpu()
    for found in (there, back):
        if found.shape != (len(pairs),) or bool(((found < 0) | (found > 1)).any()):
            raise RewardError(f"{duel.name}: compare returned no {len(pairs)} numbers in [0, 1]")
    won: Tensor = torch.stack([there, 1 - back]).nanmean(0)  # one order alone, where the judge says nothing in the other
    return won.nan_to_num(nan=0.5)


def elo(count: int, pairs: Sequence[tuple[int, int]], won: Tensor, k: float = 32.0, rounds: int = 400) -> Tensor:
    """Ratings (count,) of mean 0 that explain the results: Elo's update, all results at once, so that the order of the games
    does not matter, repeated until it rests (who never lost rises for ever, a little less each time: after `rounds` it ends).
    k is Elo's, in points; 400 points are odds of ten to one."""
    ratings = torch.zeros(count, dtype=torch.float64)
    i, j = (torch.tensor([p[n] for p in pairs], dtype=torch.long) for n in (0, 1))
    games = torch.bincount(torch.cat([i, j]), minlength=count).clamp(min=1)
    for _ in range(rounds):
        expected = 1 / (1 + 10 ** ((ratings[j] - ratings[i]) / 400))
        surprise = won.double() - expected
        change = torch.zeros_like(ratings).index_add_(0, i, surprise).index_add_(0, j, -surprise)
        ratings = ratings + k * change / games
        if float((k * change / games).abs().max()) < 1e-2:
            break
    return ratings - ratings.mean()


PAIR = Cost(reward_calls=2)  # what it costs that two meet: once in each order


class ByDuel:
    """A tournament among whatever is compared; results are remembered, so that nobody meets twice, and paid for: two
    comparisons a pair. When the purse is empty, or after Ctrl-C, pairs that have not met count for nothing, and who has met
    nobody of those that are compared is as good as the last of them.

    Args:
        play: from outcomes, and positions of pairs among them, to results (pairs,) of the first.
    """

    def __init__(self, play: Any, purse: Purse | None = None) -> None:
        self.play, self.purse = play, purse
        self._results: dict[tuple[int, int], float] = {}
        self.interrupted = False

    def values(self, outcomes: Sequence[Outcome]) -> Tensor:
        pairs = [(i, j) for i in range(len(outcomes)) for j in range(i + 1, len(outcomes))]
        keys = {pair: (outcomes[pair[0]].slot, outcomes[pair[1]].slot) for pair in pairs}
        new = [] if self.interrupted else [pair for pair in pairs if keys[pair] not in self._results]
        if self.purse is not None:
            new = new[: self.purse.affords(PAIR, late=True)]
            self.purse.pay(PAIR, len(new))
        if new:
            met = self._met(outcomes, new)
            for pair, result in zip(new[: len(met)], met, strict=True):
                self._results[keys[pair]] = result
                self._results[keys[pair][::-1]] = 1 - result
        known = [pair for pair in pairs if keys[pair] in self._results]
        if not known:
            return torch.zeros(len(outcomes), dtype=torch.float64)
        ratings = elo(len(outcomes), known, torch.tensor([self._results[keys[pair]] for pair in known]))
        known_ones = sorted({i for pair in known for i in pair})
        others = [i for i in range(len(outcomes)) if i not in known_ones]
        ratings[others] = ratings[known_ones].min()
        return ratings

    def _met(self, outcomes: Sequence[Outcome], pairs: list[tuple[int, int]]) -> list[float]:
        """Results of pairs; none after Ctrl-C, which costs none."""
        try:
            found: list[float] = self.play(outcomes, pairs).tolist()
            return found
        except KeyboardInterrupt:
            self.interrupted = True
            if self.purse is not None:
                self.purse.pay(PAIR, -len(pairs))
            return []

    def order(self, outcomes: Sequence[Outcome]) -> list[int]:
        return positions(self.values(outcomes))


class UnorderedReward(Reward):
    """A reward that answers in an order of its own (workers, web services): subclasses write `answers`."""

    modality = "any"

    def answers(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Any:
        """Yield (row, score) for every row of samples (N, ...), in any order."""
        raise TypeError(f"{type(self).__name__} does not define answers(samples, prompts, ctx)")

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """The answers in the order of the samples, (N,).

        Raises:
            RewardError: a row that was answered twice, or never, or that is none.
        """
        found: dict[int, float] = {}
        for row, value in self.answers(samples, prompts, ctx):
            number = operator.index(row) if hasattr(row, "__index__") else -1
            if number in found or not 0 <= number < len(samples):
                raise RewardError(f"{self.name}: row {row!r} was answered {'twice' if number in found else 'and is none'}")
            found[number] = float(value)
        lost = [i for i in range(len(samples)) if i not in found]
        if lost:
            raise RewardError(f"{self.name}: no answer for row {lost[0]}")
        return torch.tensor([found[i] for i in range(len(samples))])
