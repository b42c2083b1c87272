"""Rewards of the denoiser's own features: those of a step in hand, and those that a reference clip has at the same level."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffsteer import rng
from diffsteer.reward import Reward, terms_of
from diffsteer.session import Session
from diffsteer.types import DiffsteerError, UnsupportedError


class Tapped:
    """Scores the features of the session's last segment, its graph included.

    The reference is noised to the level with noise of its own key, the same at every step, and shown to the network under the
    prompt of the rows that are compared with it: a row a prompt and step.

    Raises:
        DiffsteerError: a reward of features beside others. UnsupportedError: a solver that remembers its steps.
    """

    def __init__(self, session: Session, reward: Any) -> None:
        self.session, self.reward = session, reward
        if session.remembers:
            raise UnsupportedError(f"{reward.name}: features=network wants steps without memory: set the sampler's eta above 0")
        frames = session.shape[1] if len(session.shape) == 4 else 0
        latents = session.encoded(reward.clip(frames, *session.size)) if frames else session.encoded(reward.frames)
        self.latents = latents[0]
        keyed = rng.normal(session.seed, [("reference", 0)], 0, "reference", session.shape)
        self.noise = keyed[0].to(self.latents)

    def reference(self, k: int) -> dict[str, Tensor]:
        """Features of the reference at the level of step k, a row a prompt: (P, F, C, h, w) by module."""
        session, at = self.session, self.session.levels[k]
        x = float(at.alpha) * self.latents + float(at.sigma) * self.noise
        rows = list(range(0, session.rows, session.particles))
        parts = []
        with torch.no_grad(), session.tapping(self.reward.taps) as features:
            for row in rows:
                session.segment(x[None].to(self.latents), k, k + 1, [row])
                parts.append({name: f.float() for name, f in features.items()})
        return {name: torch.cat([p[name] for p in parts]) for name in self.reward.taps}

    def score(self, features: dict[str, Tensor], reference: dict[str, Tensor], rows: list[int]) -> Tensor:
        """(n,) of features (n, F, C, h, w) of these rows."""
        of = torch.tensor([r // self.session.particles for r in rows])
        found: Tensor = self.reward.score_features(features, {name: f[of.to(f.device)] for name, f in reference.items()})
        return found


def tapped(session: Session, reward: Reward) -> Tapped | None:
    """For a reward that reads the denoiser's features; None for others."""
    terms = terms_of(reward)
    reading = [r for _, r in terms if getattr(r, "taps", ())]
    if not reading:
        return None
    if len(terms) > 1:
        raise DiffsteerError(f"{reading[0].name} with features=network guides alone: it cannot be one term of a sum")
    if terms[0][0] != 1:
        raise DiffsteerError(f"{reading[0].name} with features=network has no weight: give the strength to the guidance")
    return Tapped(session, reading[0])
