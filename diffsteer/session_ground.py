"""Trials over a session: rows of any prompts, carried together where they are alike, gradients among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffsteer.algebra import noise_std
from diffsteer.budget import Cost, Purse
from diffsteer.ground import Ask, Costs, Ground, Interrupted
from diffsteer.judging import ByDuel, ByRank, ByReward, Duel, Judge, RankEnsemble, both_ways
from diffsteer.reward import Reward
from diffsteer.selection import checked
from diffsteer.session import Session
from diffsteer.trial import SLOTS, Outcome, Trial
from diffsteer.types import Context, DiffsteerError, UnsupportedError


class SessionGround(Ground):
    """Over a session, whose rows are numbered (prompt, slot).

    Args:
        reward: what scores; with several rewards in it, ranked or duelling.
        asked: what the reward is told, a text a prompt.
        tiny: finished samples, too, are decoded by the tiny decoder.

    Raises:
        UnsupportedError: a pipeline that begins with states of its own.
    """

    def __init__(self, session: Session, reward: Reward, asked: Sequence[str], tiny: bool = False) -> None:
        self.session, self.reward, self.asked, self.tiny = session, reward, list(asked), tiny
        begun = getattr(session.start, "evaluations", 0)
        self.costs = Costs(session.per_step, session.further, begun, session.decoder is not None, isinstance(reward, Duel))
        self.steps, self.levels, self.shape = session.steps, session.levels, session.shape
        self.ledger, self.seed, self.ids = session.ledger, session.seed, session.ids
        self.eta, self.noise_kind = session.eta, session.noise_kind
        if getattr(session, "family", None) is not None and session.family.entry != "latents":  # type: ignore[attr-defined]
            name = type(session.user).__name__  # type: ignore[attr-defined]
            raise UnsupportedError(f"{name} begins with states of its own, not with noise that could be searched")

    @property
    def solved(self) -> float:
        number = not isinstance(self.reward, RankEnsemble | Duel)
        return self.reward.range[1] if number else float("inf")

    @property
    def over(self) -> bool:
        return bool(getattr(self.session, "interrupted", False))

    @property
    def compared(self) -> bool:
        return self.costs.compared

    def alike(self, other: Ground) -> bool:
        return isinstance(other, SessionGround) and other.reward is self.reward

    def price(self, trial: Trial) -> Cost:
        return self.costs.price(trial, self.steps)

    def judge(self, prompt: int, purse: Purse | None = None) -> Judge:
        if isinstance(self.reward, RankEnsemble):
            return ByRank(self.reward.shares or [])
        if isinstance(self.reward, Duel):
            return ByDuel(lambda outcomes, pairs: self._play(prompt, outcomes, pairs), purse)
        return ByReward()

    def _play(self, prompt: int, outcomes: Sequence[Outcome], pairs: Sequence[tuple[int, int]]) -> Tensor:
        assert isinstance(self.reward, Duel)
        met = sorted({i for pair in pairs for i in pair})
        known = [outcomes[i] for i in met]
        shown = [self._decoded(o.x0[None], False, 1)[0] if o.sample is None else o.sample for o in known]
        place = {i: n for n, i in enumerate(met)}
        with self.ledger.timed("reward"), torch.no_grad():
            ctx = Context(self.steps, self.steps, self.session.embedded)
            won = both_ways(self.reward, torch.stack(shown), [(place[i], place[j]) for i, j in pairs], self.asked[prompt], ctx)
        self.ledger.reward_calls += 2 * len(pairs)
        return won

    def carry(self, asks: Sequence[Ask]) -> list[Outcome]:
        groups: dict[Any, list[int]] = {}
        for i, (_, _, t) in enumerate(asks):
            kind = "" if t.gradient is False else "reward" if t.gradient is True else "along"
            alike = (t.start, t.stop, t.look, t.eta, t.scored, kind, t.through, t.checkpoint, t.fresh, t.injected is None)
            groups.setdefault(alike, []).append(i)
        found: dict[int, Outcome] = {}
        lost: dict[int, Cost] = {}
        for members in groups.values():
            forward = asks[members[0]][2].gradient is False

            def one_block(block: list[int], members: list[int] = members, forward: bool = forward) -> None:
                mine = [members[i] for i in dict.fromkeys(block)]
                before, these = self._counted(), [asks[i] for i in mine]
                try:
                    made = self._forward(these) if forward else self._gradient(these, len(block))
                    found.update(zip(mine, made, strict=True))
                except KeyboardInterrupt:
                    each = (-(-(b - a) // len(mine)) for a, b in zip(before, self._counted(), strict=True))
                    lost.update(dict.fromkeys(mine, Cost(*each)))
                    raise

            try:
                self.session.cut.run(len(members), one_block)
            except KeyboardInterrupt as stop:
                raise Interrupted(found, lost) from stop
        return [found[i] for i in range(len(asks))]

    def _counted(self) -> Cost:
        ledger = self.ledger
        return Cost(ledger.evaluations, ledger.decodes + ledger.tiny_decodes, ledger.reward_calls, ledger.backwards)

    def _refuse_what_a_callback_cut(self) -> None:
        if self.over:  # these states are of no level
            raise KeyboardInterrupt("a callback interrupted the pipeline")

    def _forward(self, asks: Sequence[Ask]) -> list[Outcome]:
        """A block of chains, or of parts of them, which are alike."""
        session, first = self.session, asks[0][2]
        rows = [p * SLOTS + slot for p, slot, _ in asks]
        stop = self.steps if first.stop is None else first.stop
        given = torch.stack([t.x for _, _, t in asks])
        with torch.no_grad(), session.noisy(first.eta), self._injecting(asks):
            noise = session.transformed(given, rows) if first.fresh else None
            begun = session.scaled(noise) if noise is not None else given
            x, x0 = (begun, begun) if first.start == stop else session.segment(begun, first.start, stop, rows)
        self._refuse_what_a_callback_cut()
        seen = x0
        if first.look and stop < self.steps:
            with torch.no_grad(), session.noisy(0.0):
                seen = session.segment(x, stop, min(stop + first.look, self.steps), rows).x0
        final = stop == self.steps
        outcomes = []
        for i, (_, slot, trial) in enumerate(asks):
            outcome = Outcome(trial, slot, stop, begun[i], x[i], x0[i], final)
            if noise is not None:
                outcome.noise = noise[i]
            outcomes.append(outcome)
        if first.scored:
            self._score(outcomes, x if final else seen, [p for p, _, _ in asks], final, stop)
        return outcomes

    def _injecting(self, asks: Sequence[Ask]) -> Any:
        given = {p * SLOTS + slot: t.injected for p, slot, t in asks if t.injected is not None}
        return _Injected(self.session, given)

    def _decoded(self, latents: Tensor, tiny: bool, real: int) -> Tensor:
        """One block of latents as samples; themselves without a decoder. `real`: how many do not only fill it up."""
        session = self.session
        if session.decoder is None:
            return latents
        small = session.tiny_decoder if tiny else None
        with self.ledger.timed("tiny decode" if small else "decode"):
            samples = (small or session.decoder)(latents).float()
        if small:
            self.ledger.tiny_decodes += real
        else:
            self.ledger.decodes += real
        return samples

    def _score(self, outcomes: list[Outcome], latents: Tensor, prompts: list[int], final: bool, stop: int) -> None:
        def one_block(block: list[int]) -> None:
            mine = list(dict.fromkeys(block))
            samples = self._decoded(latents[block], not final or self.tiny, len(mine))
            texts = [self.asked[prompts[i]] for i in block]
            with self.ledger.timed("reward"), torch.no_grad():
                each, total = self._rated(samples, texts, Context(stop, self.steps, self.session.embedded))
            self.ledger.reward_calls += 0 if self.costs.compared else len(mine)
            for n, i in enumerate(mine):
                outcomes[i].scores, outcomes[i].reward = each[n], float(total[n])
                if final or isinstance(self.reward, Duel):
                    outcomes[i].sample = samples[n].detach().cpu()

        self.session.cut.run(len(outcomes), one_block)

    def _rated(self, samples: Tensor, texts: list[str], ctx: Context) -> tuple[Tensor, Tensor]:
        """Scores by term, (n, R), and what counts as a number by itself, (n,)."""
        if isinstance(self.reward, Duel):
            return torch.zeros(len(samples), 0), torch.full((len(samples),), float("nan"))
        if isinstance(self.reward, RankEnsemble):
            each = torch.stack([checked(r, samples, texts, ctx).double().cpu() for r in self.reward.rewards], 1)
            return each, torch.full((len(samples),), float("nan"))
        total = checked(self.reward, samples, texts, ctx).double().cpu()
        return total[:, None], total

    def _gradient(self, mine: list[Ask], size: int) -> list[Outcome]:
        """A block of whole chains, with the gradient of their reward; filled up to a size with the last of them."""
        session, first, n = self.session, mine[0][2], len(mine)
        asks = [*mine, *[mine[-1]] * (size - n)]
        rows = [p * SLOTS + slot for p, slot, _ in asks]
        z = torch.stack([t.x for _, _, t in asks]).detach().clone().requires_grad_(True)
        injected = [] if first.injected is None else [_given(t).detach().clone().requires_grad_(True) for _, _, t in mine]
        inside = [(p, s, replace(t, injected=v)) for (p, s, t), v in zip(mine, injected, strict=True)] if injected else mine
        if first.start:
            raise DiffsteerError("a gradient is that of a whole chain: its trial begins at its noise")
        free = 0 if first.through is None else max(0, self.steps - first.through)
        with session.padded(size, n), torch.enable_grad(), session.noisy(first.eta), self._injecting(inside):
            noise = session.transformed(z, rows) if first.fresh else z
            x = begun = session.scaled(noise) if first.fresh else noise
            if free:  # clean estimates before count as constants: a state is linear in the noises before it
                with torch.no_grad():
                    x = session.segment(begun.detach(), 0, free, rows).x
                x = x.detach().requires_grad_(True)
            leaf, x = x, session.trajectory(x, free, rows=rows, checkpoints=first.checkpoint)
            self._refuse_what_a_callback_cut()
            samples = x if session.decoder is None else self._decode_kept(x, first.checkpoint, n)
            values = self._objective(asks, samples)[:n]
            found = list(torch.autograd.grad(values.sum(), [leaf if free else z, *injected], allow_unused=True))
            if free:
                reached, (share, shares) = found[0], self._carried(free)
                assert reached is not None
                found[0] = torch.autograd.grad(begun, z, share * reached)[0]
                for i, g in enumerate(found[1:]):
                    whole = torch.zeros_like(injected[i]) if g is None else g.clone()
                    whole[:free] += shares.to(reached).view(-1, *[1] * len(self.shape)) * reached[i]
                    found[1 + i] = whole
        self.ledger.backwards += n * (self.steps - free)
        along = found[0] if found[0] is not None else torch.zeros_like(z)
        outcomes = []
        for i, (_, slot, trial) in enumerate(mine):
            sample = samples[i].detach().float().cpu()
            outcome = Outcome(trial, slot, self.steps, z[i].detach(), x[i].detach(), x[i].detach(), True, sample=sample)
            outcome.noise = noise[i].detach()
            outcome.gradient = along[i].float().cpu()
            if injected:
                g = found[1 + i]
                outcome.injected_gradient = torch.zeros_like(injected[i]) if g is None else g.float().cpu()
            outcomes.append(outcome)
        if first.scored:
            if first.gradient is True:
                total = values.detach().double().cpu()
                each = total[:, None]
            else:
                texts = [self.asked[p] for p, _, _ in asks]
                with self.ledger.timed("reward"), torch.no_grad():
                    each, total = self._rated(samples.detach(), texts, Context(self.steps, self.steps, session.embedded))
            for i, outcome in enumerate(outcomes):
                outcome.scores, outcome.reward = each[i], float(total[i])
            self.ledger.reward_calls += n
        return outcomes

    def _carried(self, free: int) -> tuple[float, Tensor]:
        """By how much the first state, and the noise of each transition, are in the state at index `free`, clean estimates
        being constants: ``x' = alpha' x0 + sqrt(sigma'^2 - nu^2) (x - alpha x0) / sigma + nu z``."""
        session, shares = self.session, torch.zeros(free, dtype=torch.float64)
        product = 1.0
        for k in reversed(range(free)):
            at, to = self.levels[k], self.levels[k + 1]
            nu = float(noise_std(at, to, session.eta, session.noise_kind))
            shares[k] = nu * product
            product *= math.sqrt(max(float(to.sigma) ** 2 - nu**2, 0.0)) / float(at.sigma)
        return product, shares

    def _decode_kept(self, x: Tensor, again: bool, real: int) -> Tensor:
        """Decoded with a graph; `again`: activations are computed again in the pass back."""
        tiny = self.session.tiny_decoder if self.tiny else None
        decoder = tiny or self.session.decoder
        assert decoder is not None
        with self.ledger.timed("tiny decode" if tiny else "decode"):
            samples: Tensor = checkpoint(decoder, x, use_reentrant=False, preserve_rng_state=False) if again else decoder(x)
        self.ledger.tiny_decodes += real if tiny else 0
        self.ledger.decodes += 0 if tiny else real
        return samples.float()

    def _objective(self, asks: list[Ask], samples: Tensor) -> Tensor:
        first = asks[0][2]
        if first.gradient is not True:
            given = torch.stack([t.gradient for _, _, t in asks if isinstance(t.gradient, Tensor)])
            return (samples * given.to(samples)).flatten(1).sum(1)
        texts = [self.asked[p] for p, _, _ in asks]
        ctx = Context(self.steps, self.steps, self.session.embedded)
        with self.ledger.timed("reward"):
            values = self.reward.rate(samples, texts, ctx).float()
        if not values.requires_grad:
            raise DiffsteerError(
                f"noise optimisation follows the gradient of the reward, and {self.reward.name} has none here: "
                "take one that has, or a method for black boxes (dno)"
            )
        return values


def _given(trial: Trial) -> Tensor:
    assert trial.injected is not None
    return trial.injected


class _Injected:
    """Rows whose transitions take given noise."""

    def __init__(self, session: Session, given: dict[int, Any]) -> None:
        self.session, self.given = session, given

    def __enter__(self) -> None:
        self.before, self.session.injected = self.session.injected, self.given

    def __exit__(self, *about: object) -> None:
        self.session.injected = self.before
