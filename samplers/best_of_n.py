"""Best of N: N independent chains, scored at the end. The honest baseline: the same code path and ledger as every method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.particles import PER_ROW, warn_blind
from diffsteer.types import DiffsteerError, Info, Problem, Step, check_numbers, setting


@dataclass(frozen=True)
class State:
    """log_weights (P, K) stay uniform and log_z (P,) zero: every chain is a fair draw from the model."""

    problem: Problem
    log_weights: Tensor = field(metadata=PER_ROW)
    log_z: Tensor


@dataclass(frozen=True)
class BestOfN:
    """N independent chains a prompt; the best by the reward is chosen.

    A heuristic: the chosen sample has no stated law (``output="draw"`` gives a fair draw from the model itself). With one
    particle it is the plain model.

    Cost: N times the plain chain, and N decodes and reward calls, all at the end.

    Args:
        particles: N, a prompt.
        eta: amount of noise in the transition, in [0, 1]; 0 steps with the user's own scheduler.

    Raises:
        DiffsteerError: a value out of its range.
    """

    particles: int = setting(4, low=1)
    eta: float = setting(1.0, low=0, high=1)

    name: ClassVar[str] = "best_of_n"
    exact: ClassVar[bool] = False
    needs_grad: ClassVar[bool] = False
    needs_reward: ClassVar[bool] = False
    source: ClassVar[str] = "folklore; as a baseline: Ma et al., 2025, arXiv 2501.09732"

    def __post_init__(self) -> None:
        check_numbers(f"{self.name}: ", {"particles": self.particles}, {"eta": self.eta})
        if self.particles < 1:
            raise DiffsteerError(f"{self.name}: particles={self.particles}; at least 1 is needed")
        if not 0 <= self.eta <= 1:
            raise DiffsteerError(f"{self.name}: eta={self.eta:g}; it lies in [0, 1]")

    def schedule(self, steps: int) -> tuple[int, ...]:
        """Rewards are wanted at the end only."""
        return (steps,)

    def init(self, problem: Problem) -> State:
        """Uniform weights."""
        uniform = torch.full((problem.groups, self.particles), -math.log(self.particles), dtype=torch.float64)
        return State(problem, uniform, torch.zeros(problem.groups, dtype=torch.float64))

    def apply(self, state: State, step: Step) -> tuple[State, Info]:
        """Record the rewards; nothing is weighed or resampled."""
        groups = len(state.log_weights)
        blind = (step.rewards.isnan() | (step.rewards == -math.inf)).all(1)
        if bool(blind.any()):
            warn_blind(self.name, state.problem, step.done, blind, "its first particle is chosen")
        return state, Info(
            done=step.done,
            rewards=step.rewards,
            log_weights=state.log_weights,
            ess=torch.full((groups,), float(self.particles), dtype=torch.float64),
            ancestors=torch.arange(self.particles).repeat(groups, 1),
            resampled=torch.zeros(groups, dtype=torch.bool),
            exponent=torch.zeros(groups, dtype=torch.float64),
        )
