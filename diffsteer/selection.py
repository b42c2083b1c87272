"""Scoring and selecting, shared by the session's loop (between segments) and by the drop-in scheduler (inside `step`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffsteer.blocks import Blocks
from diffsteer.holdout import nothing, selected
from diffsteer.judging import Duel, RankEnsemble
from diffsteer.ledger import Ledger
from diffsteer.media import small
from diffsteer.particles import reindex
from diffsteer.reward import Reward, leaves, scores_images
from diffsteer.rng import generator
from diffsteer.types import Context, DiffsteerError, Info, Problem, RewardError, Sampler, Step, Trace

Decode = Callable[[Tensor], Tensor]


def check_inputs(decoded: bool, *rewards: Reward | None, makes: str = "", searching: bool = False) -> None:
    """Refuse rewards that would be shown something else than they look at.

    Args:
        makes: of a pipeline: "images", "video" or "sound". searching: by a search, which lets judges compare.

    Raises:
        DiffsteerError: with the reward's name, and what it would be shown.
    """
    for reward in rewards:
        if reward is not None and reward.input != ("pixels" if decoded else "latents"):
            shown = "decoded samples" if decoded else "latents"
            raise DiffsteerError(f"the reward {reward.name} looks at {reward.input}, but this decoder gives it {shown}")
        if reward is not None and makes == "sound" and decoded and scores_images(reward):
            raise DiffsteerError(f"the reward {reward.name} looks at images, but this pipeline makes sound")
        if isinstance(reward, Duel) and not searching:
            raise DiffsteerError(f"the judge {reward.name} only compares: it wants a search, such as random_search")
        clips = [r.name for r in leaves(reward) if r.modality == "video"] if reward is not None else []
        if clips and makes not in ("", "video"):
            raise DiffsteerError(f"the reward {clips[0]} looks at clips, but this pipeline makes {makes}")


class Scorer:
    """Latents to decoded samples to rewards, in blocks of rows, counted in the ledger.

    Args:
        reward: what to score with; None scores nothing.
        decode: latents (N, ...) -> samples; None leaves latents as they are.
        tiny: a cheaper decoder for the scores on the way.
        prompts: one a group. embedded: see `Context`.
        cut: how rows are cut into blocks.
        aside: rewards that are told of all that the scorer's own one is asked about; `aside_scores` (P, K) are the latest.
        looks: keep what the reward was shown as bytes (P, K, 3, h, w), no longer than so many pixels: `seen`, the latest; 0
            keeps nothing.
    """

    aside_scores: dict[str, Tensor]

    def __init__(
        self,
        reward: Reward | None,
        decode: Decode | None,
        prompts: Sequence[str],
        ledger: Ledger,
        embedded: bool = False,
        cut: Blocks | None = None,
        tiny: Decode | None = None,
        aside: Mapping[str, Reward] | None = None,
        looks: int = 0,
    ) -> None:
        self.looks, self._looks = looks, list[Tensor]()
        self.seen: Tensor | None = None
        self.aside, self.aside_scores = dict(aside or {}), {}
        self._aside: dict[str, list[Tensor]] = {}
        self.reward, self.decode_block, self.prompts, self.ledger = reward, decode, list(prompts), ledger
        self.embedded, self.cut, self.tiny = embedded, cut or Blocks(), tiny

    def decode(self, latents: Tensor) -> Tensor:
        """(N, ...) latents -> (N, ...) samples, float32; the latents themselves without a decoder."""
        return torch.cat(self.cut.run(len(latents), lambda rows: self._decode(latents, rows, None)[: len(set(rows))]))

    def score(self, samples: Tensor, done: int, steps: int, reward: Reward | None = None) -> Tensor:
        """Rewards (P, K) in float64 of P * K samples, by `reward` or by the scorer's own."""
        parts = self.cut.run(len(samples), lambda rows: self._score(samples[rows], rows, len(samples), done, steps, reward))
        return self._grouped(torch.cat(parts), reward)

    def score_latents(self, latents: Tensor, done: int, steps: int) -> Tensor:
        """Rewards (P, K) of P * K latents. A block's samples are gone before the next block is decoded."""

        def one_block(rows: list[int]) -> Tensor:
            return self._score(self._decode(latents, rows, self.tiny), rows, len(latents), done, steps)

        return self._grouped(torch.cat(self.cut.run(len(latents), one_block)), None)

    def _grouped(self, scores: Tensor, reward: Reward | None) -> Tensor:
        """Scores (P * K,) as (P, K); of an ensemble of ranks its rewards' (P * K, R), ranked within each group."""
        if self._looks:
            seen = torch.cat(self._looks)
            self.seen, self._looks = seen.view(len(self.prompts), -1, *seen.shape[1:]), []
        if self._aside:
            self.aside_scores = {n: torch.cat(parts).view(len(self.prompts), -1) for n, parts in self._aside.items()}
            self._aside = {}
        grouped = scores.view(len(self.prompts), -1, *scores.shape[1:])
        judge = reward or self.reward
        return torch.stack([judge.combine(s) for s in grouped]) if isinstance(judge, RankEnsemble) else grouped

    def _decode(self, latents: Tensor, rows: list[int], tiny: Decode | None) -> Tensor:
        """One block, its padding included."""
        if self.decode_block is None:
            return latents[rows]
        with self.ledger.timed("tiny decode" if tiny else "decode"):
            samples = (tiny or self.decode_block)(latents[rows]).float()
        if tiny:
            self.ledger.tiny_decodes += len(set(rows))
        else:
            self.ledger.decodes += len(set(rows))
        return samples

    def _score(
        self, samples: Tensor, rows: list[int], count: int, done: int, steps: int, reward: Reward | None = None
    ) -> Tensor:
        own, reward, real = reward is None, reward or self.reward, len(set(rows))
        each = count // len(self.prompts)
        ctx, texts = Context(done, steps, self.embedded), [self.prompts[i // each] for i in rows]
        shown = small(samples[:real], self.looks) if own and self.looks else None
        aside: dict[str, Tensor] = {}
        if own and self.aside:
            with self.ledger.timed("held-out"), torch.no_grad():
                for name, r in self.aside.items():
                    aside[name] = checked(r, samples, texts, ctx)[:real].cpu().double()
        scores = torch.zeros(real, dtype=torch.float64)
        if reward is not None:
            scores = self._told(reward, samples, texts, ctx)
            self.ledger.reward_calls += real
        # noted once all went well: a block that does not fit into memory is tried again in parts
        if shown is not None:
            self._looks.append(shown)
        for name, said in aside.items():
            self._aside.setdefault(name, []).append(said)
        self.ledger.held_out_calls += real * len(aside)
        return scores[:real].cpu().double()

    def _told(self, reward: Reward, samples: Tensor, texts: list[str], ctx: Context) -> Tensor:
        with self.ledger.timed("reward"), torch.no_grad():
            if isinstance(reward, RankEnsemble):
                return torch.stack([checked(r, samples, texts, ctx).double().cpu() for r in reward.rewards], 1)
            return checked(reward, samples, texts, ctx)


class Selection:
    """Runs a sampler over the events of one run.

    Attributes:
        later: the end is left to `finish`: what is decoded and scored there decides about no further step.
    """

    later = False

    def __init__(self, sampler: Sampler, problem: Problem, scorer: Scorer, watch: Callable[[Info], None] | None = None) -> None:
        self.sampler, self.problem, self.scorer, self.watch = sampler, problem, scorer, watch
        self.events = sampler.schedule(problem.steps)
        self.restart()

    def restart(self) -> None:
        """Forget what was selected."""
        self.state: Any = self.sampler.init(self.problem)
        self.infos: list[Info] = []
        self.looks: list[Tensor] = []
        self.samples: Tensor | None = None  # of the end
        self._end: tuple[Tensor, Tensor | None] | None = None  # where the last event was left to `finish`
        self.moved: Tensor | None = None  # the ancestors of the last event, where anyone was replaced
        self.selected = nothing(self.problem.groups)  # what the resamplings did to the reward
        self.selected_aside = {name: nothing(self.problem.groups) for name in self.scorer.aside}

    @property
    def trace(self) -> Trace:
        """The events so far."""
        return Trace(tuple(self.infos), looks=tuple(self.looks))

    def __call__(self, done: int, x: Tensor, x0: Tensor, log_ratio: Tensor | None = None) -> Tensor:
        """Select at an event. x, x0: (P * K, ...), the states and the clean estimates; log_ratio: see `Step`. Returns the
        states that live on."""
        final = done == self.problem.steps
        if final and self.later:
            self._end, self.moved = (x, log_ratio), None
            return x
        if final:
            self.samples = self.scorer.decode(x)
            rewards = self.scorer.score(self.samples, done, self.problem.steps)
        else:
            rewards = self.scorer.score_latents(x0, done, self.problem.steps)
        with self.scorer.ledger.timed("select"):
            self.state, info = self.sampler.apply(self.state, Step(done, final, rewards, log_ratio))
            self.infos.append(info)
            if self.scorer.seen is not None:
                self.looks.append(self.scorer.seen)
            self.moved = info.ancestors if bool(info.resampled.any()) else None
            if self.moved is not None:
                self.note(rewards, self.moved)
                grouped = x.view(self.problem.groups, -1, *x.shape[1:])
                x = reindex(grouped, self.moved).view_as(x)
        if self.watch is not None:
            self.watch(info)
        return x

    @property
    def reached(self) -> int:
        """How many events there were."""
        return len(self.infos) + (self._end is not None)

    @property
    def ancestors(self) -> Tensor:
        """Of the last event, (P, K); of one that was left to `finish` everyone's own place."""
        info = self.infos[-1] if self.infos else None
        if self._end is None and info is not None:
            return info.ancestors
        particles = len(self._end[0]) // self.problem.groups if self._end is not None else 0
        return torch.arange(particles).repeat(self.problem.groups, 1)

    def finish(self, x: Tensor) -> Tensor:
        """The last event, if it was left to this. What is scored is what there was at that event; what lives on is x, which a
        user's callback may have changed since. Returns the states."""
        if self._end is None:
            return x
        (at, log_ratio), self._end, self.later = self._end, None, False
        self(self.problem.steps, at, at, log_ratio)
        if self.moved is None:
            return x
        return reindex(x.view(self.problem.groups, -1, *x.shape[1:]), self.moved).view_as(x)

    def note(self, rewards: Tensor, ancestors: Tensor) -> None:
        """A choice was made among what was just scored: what it did to the reward, and to those that look on."""
        if self.scorer.aside:
            self.selected = self.selected.plus(selected(rewards, ancestors))
            for name, scores in self.scorer.aside_scores.items():
                self.selected_aside[name] = self.selected_aside[name].plus(selected(scores, ancestors))


def choose(output: str, rewards: Tensor, log_weights: Tensor, seed: int, ids: Sequence[Any]) -> Tensor:
    """The chosen particle of each group, (P,).

    "best" is the highest reward among the particles that have any weight (the first of equals; NaN never), "draw" one draw
    from the weights.
    """
    if output == "draw":
        draws = [
            torch.multinomial(w.exp(), 1, generator=generator(seed, id, "draw"))[0]
            for w, id in zip(log_weights, ids, strict=True)
        ]
        return torch.stack(draws)
    lost = log_weights == float("-inf")
    lost &= ~lost.all(1, keepdim=True)
    return rewards.nan_to_num(nan=float("-inf")).masked_fill(lost, float("-inf")).argmax(1)


def checked(reward: Reward, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
    """What a reward says of samples, (N,).

    Raises:
        RewardError: it raised, or returned no (N,) numbers, or +inf.
    """
    try:
        scores = torch.as_tensor(reward.rate(samples, prompts, ctx))
    except (DiffsteerError, torch.OutOfMemoryError):  # of memory fewer rows are tried
        raise
    except Exception as error:
        culprit = next((p for s, p in zip(samples, prompts, strict=True) if _raises(reward, s, p, ctx)), None)
        which = f"for {len(samples)} samples together" if culprit is None else f"for the prompt {culprit!r}"
        where = f"{which} after step {ctx.done} of {ctx.steps}"
        raise RewardError(f"the reward {reward.name} raised {type(error).__name__} {where}: {error}") from error
    if scores.shape != (len(samples),):
        raise RewardError(
            f"the reward {reward.name} returned shape {tuple(scores.shape)}; wanted ({len(samples)},), one a sample"
        )
    if bool((scores == float("inf")).any()):
        worst = prompts[int((scores == float("inf")).nonzero()[0])]
        raise RewardError(f"the reward {reward.name} is +inf for the prompt {worst!r} after step {ctx.done} of {ctx.steps}")
    return scores


def _raises(reward: Reward, sample: Tensor, prompt: str, ctx: Context) -> bool:
    try:
        reward.rate(sample[None], [prompt], ctx)
    except Exception:
        return True
    return False
