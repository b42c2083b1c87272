"""A session's walk with gradient guidance: one step at a time where it guides, and as before where it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from diffsteer import rng
from diffsteer.algebra import Level, noise_std
from diffsteer.guidance import Guidance, Scale, gradient_of, refuse_flat, uncertainty, update, warn_idle, warn_skipped
from diffsteer.reward import Reward
from diffsteer.selection import Selection
from diffsteer.session import Arrival, Session
from diffsteer.tapped import tapped
from diffsteer.types import Context, DiffsteerError, UnsupportedError


class GuidedWalk:
    """Carries all rows from noise to clean, moving clean estimates along the gradient of a reward.

    Args:
        prompts: what the reward is told, one a group.
        weighed: the rows carry weights: what moved them is told with each event, so that their target stays.

    Raises:
        DiffsteerError: weights together with a solver's own noise; features of the network that are to be smoothed.
        UnsupportedError: a pipeline that cannot be cut into steps; normaliser=cfg without classifier-free guidance.
    """

    def __init__(
        self, session: Session, guidance: Guidance, reward: Reward, prompts: Sequence[str], weighed: bool = False
    ) -> None:
        if session.no_reentry:
            raise UnsupportedError(f"guidance takes single steps, and this pipeline cannot be cut, since {session.no_reentry}")
        if weighed and session.native:
            raise DiffsteerError("guidance: weighted particles want transition=own, whose noise is known")
        self.session, self.guidance, self.reward, self.prompts = session, guidance, reward, list(prompts)
        if not session.levels:
            raise UnsupportedError(
                "guidance takes single steps between known levels, and with eta=0 this pipeline's own solver steps: "
                "set the sampler's eta above 0"
            )
        self.weighed, self.shares = weighed, guidance.shares(session.levels)
        self.tapped = tapped(session, reward) if guidance.network > 0 else None
        if self.tapped and (guidance.draws > 1 or guidance.smoothing > 0):
            raise DiffsteerError("guidance: features of the network are not smoothed: set draws=1 and smoothing=0")
        self.moments = guidance.moments()
        self.guided = 0
        if guidance.measures_pulls:
            session.measure_pulls()

    def __call__(self, select: Selection) -> Tensor:
        """The final states, (P * K, ...)."""
        session = self.session
        x, at = session.noise(), 0
        for event in select.events:
            log_ratio = torch.zeros(len(session.prompts), session.particles, dtype=torch.float64)
            x0 = x
            with torch.no_grad():
                while at < event:
                    stop = next((k for k in range(at, event) if self._guides(k)), event)
                    if stop > at:
                        x, x0 = session.segment(x, at, stop)
                    else:
                        stop = at + 1
                        (x, x0), ratio = self._step(x, at)
                        log_ratio += ratio.view_as(log_ratio)
                    at = stop
                x = select(event, x, x0, log_ratio if self.weighed else None)
                ancestors = select.ancestors
                session.follow(ancestors, event)
                for moments in self.moments.values():
                    moments.follow(ancestors)
        warn_skipped(session.ledger.skipped)
        if not self.guided and max(self.guidance.clean, self.guidance.network) > 0:
            warn_idle(self.guidance, session.steps)
        return x

    def _guides(self, k: int) -> bool:
        levels = self.session.levels
        return self.guidance.guides(k, levels[k]) and not (self.weighed and float(self._std(k)) == 0)

    def _std(self, k: int) -> Tensor:
        """Of the noise that the step adds."""
        levels, session = self.session.levels, self.session
        return noise_std(levels[k], levels[k + 1], session.eta, session.noise_kind)

    def _step(self, x: Tensor, k: int) -> tuple[Arrival, Tensor]:
        """One guided step: where it leads, and log p / q of it, (N,)."""
        session, guidance = self.session, self.guidance
        at, to = session.levels[k], session.levels[k + 1]
        ratio = torch.zeros(len(x), dtype=torch.float64)
        arrival = Arrival(x, x)
        for visit in range(guidance.recurrence):
            session.visit = visit
            arrival, moved = self._moved(x, k)
            shift = to.alpha.to(moved) * moved
            if self.weighed:
                z = session.step_noise(range(len(x)), k).to(moved)
                ratio = _log_ratio(shift, z, self._std(k))
            arrival = Arrival(arrival.x + shift.to(arrival.x), arrival.x0 + moved.to(arrival.x0))
            if visit + 1 < guidance.recurrence:
                z = rng.normal(session.seed, [session.key(r) for r in range(len(x))], k, f"again {visit}", session.shape)
                x = again(arrival.x, at, to, z.to(arrival.x))
        session.visit = 0
        self.guided += 1
        return arrival, ratio

    def _moved(self, x: Tensor, k: int) -> tuple[Arrival, Tensor]:
        """Where the step leads without guidance, and by what its clean estimates are to be moved, (N, ...)."""
        session, guidance, share = self.session, self.guidance, self.shares[k]
        at, moved = session.levels[k], torch.zeros_like(x, dtype=torch.float32)
        if guidance.network > 0:
            values = torch.zeros(len(x))
            read = self.tapped
            wanted = read.reference(k) if read else {}
            with session.tapping(read.reward.taps) if read else nullcontext({}) as features:

                def objective(x0: Tensor, rows: list[int]) -> Tensor:
                    if read:
                        session.ledger.reward_calls += len(set(rows))
                    found = read.score(features, wanted, rows) if read else self._smoothed(x0, rows, k)
                    values[rows] = found.detach().float().cpu()  # a block may come again, halved
                    return found

                gradient, arrival = session.gradient(x, k, objective)
            session.ledger.backwards += len(x)
            moved = moved + self._update("network", gradient, x, arrival.x0, at, values, share * guidance.network)
        else:
            arrival = session.segment(x, k, k + 1)
        if guidance.clean > 0:
            along = torch.zeros_like(moved)  # without what went through the network, as Ye et al. (2024) have it
            for _ in range(guidance.iterations):
                gradient, rewards = self._gradient(arrival.x0 + along.to(arrival.x0), k)
                along = along + self._update("clean", gradient, x, arrival.x0, at, rewards, share * guidance.clean)
            moved = moved + along
        return arrival, moved

    def _update(
        self, path: str, gradient: Tensor, x: Tensor, x0: Tensor, at: Level, rewards: Tensor, strength: float
    ) -> Tensor:
        alpha, sigma = at.like(x)
        noise = ((x - alpha * x0) / sigma).float().flatten(1).square().mean(1).sqrt()
        pulls = None if self.session.pulls is None else self.session.pulls.to(noise)
        scale = Scale(at, noise, rewards.to(noise), self.reward.range[1], pulls)
        moved, skipped = update(self.guidance, gradient, scale, strength, path == "network", self.moments.get(path))
        self.session.ledger.skipped += skipped
        return moved

    def _gradient(self, x0: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The gradient of the reward at clean estimates (N, ...), and the rewards (N,)."""

        def one_block(block: list[int]) -> tuple[Tensor, Tensor]:
            real = len(set(block))
            gradient, rewards = gradient_of(lambda leaf: self._smoothed(leaf, block, k), x0[block])
            return gradient[:real], rewards[:real]

        parts = self.session.cut.run(len(x0), one_block)
        return torch.cat([g for g, _ in parts]), torch.cat([r for _, r in parts])

    def _smoothed(self, x0: Tensor, rows: list[int], k: int) -> Tensor:
        """The reward of clean estimates (n, ...), smoothed, (n,); differentiable. Rows that only fill up a block count once."""
        guidance, session = self.guidance, self.session
        if guidance.draws == 1 and guidance.smoothing == 0:
            return self._rate(x0, rows, k)
        size = guidance.smoothing * float(uncertainty(session.levels[k]))
        keys = [session.key(r) for r in rows]
        drawn = [rng.normal(session.seed, keys, k, f"smooth {j}", session.shape) for j in range(guidance.draws)]
        rewards = torch.stack([self._rate(x0 + size * z.to(x0), rows, k) for z in drawn])
        return rewards.logsumexp(0) - math.log(guidance.draws)

    def _rate(self, x0: Tensor, rows: list[int], k: int) -> Tensor:
        session, ledger = self.session, self.session.ledger
        samples = x0
        if session.decoder is not None:
            with ledger.timed("decode"):
                samples = session.decoder(x0).float()
            ledger.decodes += len(set(rows))
        with ledger.timed("reward"):
            prompts = [self.prompts[r // session.particles] for r in rows]
            rewards = self.reward.rate(samples, prompts, Context(k, session.steps, session.embedded)).float()
        ledger.reward_calls += len(set(rows))
        refuse_flat(rewards)
        return rewards


def pieces(guides: Sequence[bool], recurrence: int, events: Sequence[int]) -> int:
    """How many segments a walk takes: each guided step is one, as often as it is taken; so is what lies between."""
    count, at = 0, 0
    for event in events:
        while at < event:
            guided = at < len(guides) and guides[at]
            stop = at + 1 if guided else next((k for k in range(at, event) if k < len(guides) and guides[k]), event)
            count, at = count + (recurrence if guided else 1), stop
    return count


def again(x: Tensor, at: Level, to: Level, z: Tensor) -> Tensor:
    """Back to the level before: the states (N, ...) at `to`, with noise added until they are at `at`, on any path.

    ``x = a x' + b z`` with ``a = alpha / alpha'`` and ``b^2 = sigma^2 - a^2 sigma'^2``: states of the model keep its marginals.
    """
    a = at.alpha / to.alpha
    b = (at.sigma**2 - a**2 * to.sigma**2).clamp(min=0).sqrt()
    return a.to(x) * x + b.to(x) * z


def _log_ratio(shift: Tensor, z: Tensor, std: Tensor) -> Tensor:
    """log p(x') / q(x') of ``x' = mean + shift + std z``, p being without the shift: no two densities are subtracted, (N,)."""
    g = (shift.double() / std.double()).flatten(1)
    return -(g * z.double().flatten(1)).sum(1) - 0.5 * g.square().sum(1)
