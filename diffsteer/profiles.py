"""Schedules that are measured: where a model errs (`loss_mass`), and what steps along its own paths cost (`gits_schedule`).

>>> from diffsteer.profiles import loss_mass
>>> from diffsteer.toy import GaussianMixture
>>> profile = loss_mass(GaussianMixture([-1.0, 1.0], [0.2, 0.2]).model("vp"), ["any"] * 16)
>>> len(profile.ratios(10, 1e3, 1e-3))
10
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from diffsteer import __version__, rng
from diffsteer.algebra import Level, transition
from diffsteer.callable import CallableModel, CallableSession
from diffsteer.reward import Reward, RewardFunction, as_reward, prepare
from diffsteer.schedules import Given, Profile, Schedule, as_schedule, from_profile, gits
from diffsteer.selection import Scorer
from diffsteer.session import Session
from diffsteer.types import Context, DiffsteerError

_measured: dict[str, Profile] = {}
_of_functions: WeakKeyDictionary[CallableModel, dict[str, Profile]] = WeakKeyDictionary()


def own_grid(pipe: Any, steps: int, **call: Any) -> Given:
    """The grid that a pipeline or a `CallableModel` walks by itself in so many steps, in numbers."""
    if isinstance(pipe, CallableModel):
        levels: Sequence[Level] = pipe.grid(steps)[1]
    else:
        from diffsteer.segments import grid_of

        levels = grid_of(pipe, steps, call, 1.0)[1]
    if not levels:
        raise DiffsteerError(f"{type(pipe).__name__}: its grid is made by itself, during a call: give a schedule")
    return Given(tuple(float(at.sigma) / max(float(at.alpha), 1e-12) for at in levels[:-1]))


def session_of(pipe: Any, prompts: Sequence[Any], schedule: Schedule, steps: int, seed: int = 0, **call: Any) -> Session:
    """A session over one row a prompt, of deterministic first-order steps along a schedule."""
    keys: dict[str, Any] = {"particles": 1, "seed": seed, "eta": 0.0, "chunk": 64, "schedule": schedule}
    keys["num_inference_steps"] = len(schedule.values) if isinstance(schedule, Given) else steps
    if isinstance(pipe, CallableModel):
        return CallableSession(pipe, prompts, **keys)
    from diffsteer.backend import DiffusersSession

    return DiffusersSession(pipe, prompts, negative_prompt=call.pop("negative_prompt", None), call=call, **keys)


def loss_mass(
    pipe: Any,
    prompts: Sequence[Any],
    *,
    cells: int = 32,
    samples: Tensor | None = None,
    steps: int = 50,
    seed: int = 0,
    cache: bool = True,
    **call: Any,
) -> Profile:
    """The mean error of a model's velocity over noise: where it errs more, more steps are put. A heuristic.

    Clean samples are noised again at the middles of so many cells, evenly spaced in a flow's time, with keyed noise, and
    denoised. A state of any model, divided by alpha + sigma, is one of a flow at t = sigma / (alpha + sigma), so that one
    measure does for all: the mean square of (x0 - estimate) / t, the error of the velocity eps - x0, free of scale.

    Args:
        prompts: P of them, one sample each.
        samples: clean latents (P, *shape); without them the model makes its own, along its own grid of so many `steps`.
        cache: look for the profile in memory and in $XDG_CACHE_HOME or ~/.cache, diffsteer/profiles, and keep it there, by
            weights, scheduler and all settings. Of a `CallableModel` only in memory.
        call: the pipeline's own arguments. With guidance it is the guided velocity whose error is measured.

    Cost:
        P (cells + steps) rows through the denoiser, twice as many where it is guided.

    Source:
        PUFM++, 2025, arXiv 2512.20988, whose profile is that of training; trapezoids and inverse as there.

    Raises:
        DiffsteerError: samples of another number than prompts; an error that is no number.
    """
    if samples is not None and len(samples) != len(prompts):
        raise DiffsteerError(f"{len(samples)} samples for {len(prompts)} prompts; give one each")
    if cells < 2:
        raise DiffsteerError(f"cells={cells}; at least 2 are needed")
    asked = {"prompts": list(prompts), "cells": cells, "steps": steps, "seed": seed, "call": call}
    key = _key(pipe, asked, samples)
    found = _find(pipe, key) if cache else None
    if found is not None:
        return found
    if samples is None:
        reference = session_of(pipe, prompts, own_grid(pipe, steps, **call), steps, seed, **call)
        samples = reference.segment(reference.noise(), 0, reference.steps).x
    middles = (torch.arange(cells, dtype=torch.float64).flip(0) + 0.5) / cells
    session = session_of(pipe, prompts, Given(tuple((middles / (1 - middles)).tolist())), cells, seed, **call)
    keys = [session.key(r) for r in range(session.rows)]
    times, errors = [1.0], []
    for k, at in enumerate(session.levels[:-1]):
        alpha, sigma = (float(v) for v in at)
        eps = rng.normal(seed, keys, k, "profile", session.shape).to(samples)
        clean = session.segment(alpha * samples + sigma * eps, k, k + 1).x0
        times.append(sigma / (alpha + sigma))
        errors.append(float((clean - samples).double().square().mean()) / times[-1] ** 2)
    if not all(0 <= e < float("inf") for e in errors):
        raise DiffsteerError(f"{type(pipe).__name__}: the error of its estimates is no number")
    times, errors = [*times, 0.0], [errors[0], *errors, errors[-1]]
    profile = from_profile(times[::-1], errors[::-1])
    if cache:
        _keep(pipe, key, profile)
    return profile


@dataclass(frozen=True)
class Trajectory:
    """Deterministic paths on a fine grid, N rows.

    Attributes:
        session: that walked them. states: T + 1 of (N, *shape). cleans: the estimates at each; of the last it is itself.
    """

    session: Session
    states: tuple[Tensor, ...]
    cleans: tuple[Tensor, ...]

    @property
    def levels(self) -> list[Level]:
        return self.session.levels


def trajectory(
    pipe: Any,
    prompts: Sequence[Any],
    *,
    steps: int = 60,
    schedule: Schedule | Sequence[float] | None = None,
    seed: int = 0,
    **call: Any,
) -> Trajectory:
    """Walk a fine grid with first-order deterministic steps: the teacher of `gits_schedule`.

    Args:
        prompts: one row each; Chen et al. take 256. steps: T, 60 in the paper. schedule: without it the model's own grid.

    Cost:
        P steps rows through the denoiser, twice as many where it is guided; 2 (T + 1) states are kept.
    """
    own = as_schedule(schedule)
    session = session_of(pipe, prompts, own_grid(pipe, steps, **call) if own is None else own, steps, seed, **call)
    states, cleans = [session.noise()], []
    for k in range(session.steps):
        x, x0 = session.segment(states[-1], k, k + 1)
        states.append(x)
        cleans.append(x0)
    return Trajectory(session, tuple(states), (*cleans, states[-1]))


def local_deviation(teacher: Trajectory) -> Tensor:
    """What one first-order step from i to j misses the teacher's state at j by: (T + 1, T + 1), rms over rows and elements.

    Distances are those of states on the unit circle, x / sqrt(alpha^2 + sigma^2): of data of about unit variance an error
    reaches the end about as large as it is there, from whatever level. (Chen et al., 2024, arXiv 2405.11326, measure in the
    space of alpha = 1, or by what a point deviates from the line between the ends.) No further evaluations.
    """
    levels, count = teacher.levels, len(teacher.states)
    cost = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count - 1):
        at, x, x0 = levels[i], teacher.states[i].double(), teacher.cleans[i].double()
        eps = (x - float(at.alpha) * x0) / float(at.sigma)
        for j in range(i + 1, count):
            to = levels[j]
            missed = transition(x0, eps, at, to, 0.0, torch.zeros_like(x0)) - teacher.states[j].double()
            cost[i, j] = missed.square().mean().sqrt() / float((to.alpha**2 + to.sigma**2).sqrt())
    return cost


def reward_change(teacher: Trajectory, reward: Reward | RewardFunction, power: float = 2.0, prompts: Any = None) -> Tensor:
    """How much a reward's estimate changes from i to j, |r_j - r_i| ** power, the mean over rows: (T + 1, T + 1).

    r_i is the reward of the clean estimate at i, r_T that of the sample. A power of 1 adds up to the same for all ways along
    which rewards rise or fall; 2 spreads the change evenly over the steps, so that they stand where the estimate moves.
    A heuristic of ours.

    Args:
        prompts: for the reward; without them those of the paths.

    Cost:
        T + 1 decodes and reward calls a row; no further evaluations.
    """
    rewards = _rewards(teacher, reward, prompts)
    return (rewards[None, :] - rewards[:, None]).abs().pow(power).mean(2)


def reward_error(teacher: Trajectory, reward: Reward | RewardFunction, prompts: Any = None) -> Tensor:
    """The error of the reward's estimate over the noise that a step spans: a step from i to j costs |r_i - r_T|, the mean over
    rows, times the squared distance in a flow's time: (T + 1, T + 1). Steps are short where the estimate is still wrong.
    A heuristic of ours; cost as of `reward_change`."""
    rewards = _rewards(teacher, reward, prompts)
    t = torch.tensor([float(at.sigma / (at.alpha + at.sigma)) for at in teacher.levels], dtype=torch.float64)
    error = (rewards - rewards[-1]).abs().mean(1)
    return error[:, None] * (t[:, None] - t[None, :]).square()


def gits_schedule(teacher: Trajectory, cost: Tensor, steps: int, coefficient: float = 1.0) -> Given:
    """The grid of `gits` on a teacher's levels, for so many steps: exact for the cost; the cost is a heuristic.

    Args:
        cost: (T + 1, T + 1), of `local_deviation`, `reward_change`, `reward_error`, or your own.
        coefficient: see `gits`.
    """
    if len(cost) != len(teacher.states):
        raise DiffsteerError(f"cost {tuple(cost.shape)} is not that of a teacher with {len(teacher.states)} levels")
    levels = [teacher.levels[i] for i in gits(cost, steps, coefficient)[:-1]]
    return Given(tuple(float(at.sigma) / max(float(at.alpha), 1e-12) for at in levels))


def _rewards(teacher: Trajectory, reward: Reward | RewardFunction, prompts: Any) -> Tensor:
    """(T + 1, N)."""
    session = teacher.session
    made = as_reward(reward, "latents" if session.decoder is None else "pixels")
    texts = list(session.prompts if prompts is None else prompts)
    prepare(made, texts, Context(embedded=session.embedded))
    scorer = Scorer(made, session.decoder, texts, session.ledger, session.embedded)
    scores = [scorer.score(scorer.decode(x0), k, session.steps) for k, x0 in enumerate(teacher.cleans)]
    return torch.stack([s.double().flatten() for s in scores])


def _key(pipe: Any, asked: dict[str, Any], samples: Tensor | None) -> str:
    sha = hashlib.sha256(json.dumps({**asked, "version": __version__}, sort_keys=True, default=repr).encode())
    if samples is not None:
        sha.update(samples.detach().double().cpu().numpy().tobytes())
    if not isinstance(pipe, CallableModel):
        from diffsteer.pipes import denoisers_of

        sha.update(f"{type(pipe).__name__} {sorted(pipe.scheduler.config.items(), key=str)}".encode())
        modules = {id(m): m for m in [*denoisers_of(pipe), *(m for m in pipe.components.values() if hasattr(m, "state_dict"))]}
        for module in modules.values():
            for name, value in module.state_dict().items():  # some values of each tensor tell one training from another
                flat = value.detach().flatten()
                some = flat[:: max(1, flat.numel() // 64)].double().cpu()
                sha.update(f"{name} {tuple(value.shape)}".encode() + some.numpy().tobytes())
    return sha.hexdigest()


def _file(key: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "diffsteer" / "profiles" / f"{key}.json"


def _find(pipe: Any, key: str) -> Profile | None:
    if isinstance(pipe, CallableModel):
        return _of_functions.get(pipe, {}).get(key)
    if key not in _measured:
        try:
            said = json.loads(_file(key).read_text())
            _measured[key] = Profile(tuple(said["times"]), tuple(said["masses"]))
        except (OSError, ValueError, KeyError, TypeError, DiffsteerError):  # not there, or not whole: measured again
            return None
    return _measured[key]


def _keep(pipe: Any, key: str, profile: Profile) -> None:
    if isinstance(pipe, CallableModel):
        _of_functions.setdefault(pipe, {})[key] = profile
        return
    _measured[key], path = profile, _file(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(f".{os.getpid()}.tmp")
        whole.write_text(json.dumps({"times": profile.times, "masses": profile.masses}))
        whole.replace(path)
    except OSError:  # a cache that cannot be written is no reason to fail
        return
