"""The search of ``diffsteer tune``: what Optuna tries, and what it gives up. No model in sight.

Optuna's study lives in memory and is led along what was measured before (`known`), so that there is one record of a search
and none that could disagree with it: a search that goes on asks the same questions as one that was never stopped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffsteer.ranges import Range
from diffsteer.rng import generator
from diffsteer.types import DiffsteerError, RewardError

PLAIN = -1  # the number of the chain that nothing steers
STARTUP = 8  # trials at random, before the search learns from them
# One prompt alone decides nothing; three of three that are worse than the best trial's do: their p is 1/8.
WORSE = 0.13
DONE, PRUNED, FAILED = "done", "pruned", "failed"


@dataclass(frozen=True)
class Measured:
    """One case (a prompt with a seed) under one trial: rewards of the chosen sample, NaN where it could not be scored, None
    without a held-out one; rows through the denoiser; seconds."""

    reward: float
    holdout: float | None
    evaluations: int
    seconds: float


@dataclass
class Trial:
    """Parameters and what was measured with them, case by case; `why` it failed."""

    number: int
    parameters: dict[str, float]
    measured: list[Measured] = field(default_factory=list)
    state: str = DONE
    why: str = ""

    @property
    def reward(self) -> float:
        """The mean over what was measured; NaN of nothing."""
        return _mean([m.reward for m in self.measured])

    @property
    def holdout(self) -> float:
        """The same of the held-out reward."""
        return _mean([math.nan if m.holdout is None else m.holdout for m in self.measured])

    @property
    def evaluations(self) -> int:
        """Of all cases together."""
        return sum(m.evaluations for m in self.measured)

    @property
    def seconds(self) -> float:
        """Of all cases together."""
        return sum(m.seconds for m in self.measured)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def search(
    ranges: Mapping[str, Range],
    cases: int,
    measure: Callable[[int, dict[str, float], int], Measured],
    cost: Callable[[int, dict[str, float]], int],
    *,
    seed: int,
    trials: int,
    evaluations: int | None = None,
    first: Mapping[str, Any] | None = None,
    known: Mapping[int, Mapping[str, float]] | None = None,
    done: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Measure the plain chain and then trial after trial, each case by case, giving up those that are plainly worse.

    A trial is pruned once a Wilcoxon signed-rank test over the cases that it has in common with the best trial so far says
    that it is worse: equal cases have equal noise, so that trials are compared pair by pair.

    Args:
        cases: how many a trial has. measure: (trial's number, parameters, case) -> what came out.
        cost: (number, parameters) -> evaluations of all cases; refuses (`DiffsteerError`) parameters that do not go together.
        evaluations: the budget, of everything together; a trial that might pass it is not begun.
        first: where the search begins, if that lies within the ranges.
        known: the parameters of trials that were begun before, by number; those are asked again, whatever the budget is now.

    Returns:
        The plain chain, then the trials, in order.

    Raises:
        DiffsteerError: Optuna is not there; the budget holds no trial; every trial was refused.
    """
    optuna = load_optuna()
    known = known or {}
    trials = max([trials, *(number + 1 for number in known)])
    plain = Trial(PLAIN, {})
    if evaluations is not None and not known:
        least = cost(PLAIN, {})
        least += _try_cost(cost, {name: int(r.low) if r.whole else r.low for name, r in ranges.items()})
        if least > evaluations:
            raise DiffsteerError(f"tune.evaluations={evaluations}; the plain chain and one trial take at least {least}")
    for case in range(cases):
        plain.measured.append(measure(PLAIN, {}, case))
    done(plain)
    study = optuna.create_study(
        direction="maximize", pruner=_quietly(lambda: optuna.pruners.WilcoxonPruner(p_threshold=WORSE, n_startup_steps=2))
    )
    found = [plain]
    for number in range(trials):
        if number in known:
            study.enqueue_trial(dict(known[number]))
        elif number == 0 and first is not None and _within(ranges, first):
            study.enqueue_trial({name: first[name] for name in ranges})
        # A stream of its own for each trial: what it suggests depends on those before alone, and not on who asked for them.
        key = generator(seed, "tune", number).initial_seed() % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=key, n_startup_trials=STARTUP)
        asked = study.ask()
        trial = Trial(number, {name: _suggest(asked, name, r) for name, r in ranges.items()})
        if number not in known:
            try:
                price = cost(number, trial.parameters)
            except RewardError:
                raise
            except DiffsteerError as error:
                trial.state, trial.why = FAILED, str(error)
            else:
                if evaluations is not None and sum(t.evaluations for t in found) + price > evaluations:
                    break
        if trial.state != FAILED:
            _measure(asked, trial, cases, measure)
        if trial.state == DONE:
            study.tell(asked, trial.reward)
        else:
            states = {PRUNED: optuna.trial.TrialState.PRUNED, FAILED: optuna.trial.TrialState.FAIL}
            study.tell(asked, state=states[trial.state])
        found.append(trial)
        done(trial)
    if len(found) == 1:
        raise DiffsteerError(f"tune.evaluations={evaluations} leaves no trial: the first would have passed it")
    if all(t.state == FAILED for t in found[1:]):
        raise DiffsteerError(f"no trial could be done; the last one: {found[-1].why}")
    return found


def _measure(asked: Any, trial: Trial, cases: int, measure: Callable[[int, dict[str, float], int], Measured]) -> None:
    """Until the end, or until it is given up."""
    for case in range(cases):
        measured = measure(trial.number, trial.parameters, case)
        trial.measured.append(measured)
        if not math.isfinite(measured.reward):
            trial.state, trial.why = FAILED, f"a reward of {measured.reward}, at case {case + 1} of {cases}"
            return
        asked.report(measured.reward, case)
        # With nothing left to save there is nothing to prune.
        if case + 1 < cases and _quietly(asked.should_prune):
            trial.state = PRUNED
            return


def load_optuna() -> Any:
    """Optuna, told to be silent.

    Raises:
        DiffsteerError: it, or the SciPy that its test needs, is not installed.
    """
    try:
        import optuna
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise DiffsteerError(f"tune needs Optuna and SciPy ({error}): pip install diffsteer[tune]") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial of the highest reward among those that were done to their end, the first of equals."""
    done = [t for t in trials if t.number != PLAIN and t.state == DONE]
    return max(done, key=lambda t: t.reward) if done else None


def _suggest(asked: Any, name: str, r: Range) -> float:
    if r.whole:
        return int(asked.suggest_int(name, int(r.low), int(r.high), log=r.log))
    return float(asked.suggest_float(name, r.low, r.high, log=r.log))


def _within(ranges: Mapping[str, Range], values: Mapping[str, Any]) -> bool:
    given = [(r, values.get(name)) for name, r in ranges.items()]
    return all(isinstance(value, (int, float)) and r.low <= value <= r.high for r, value in given)


def _try_cost(cost: Callable[[int, dict[str, float]], int], parameters: dict[str, float]) -> int:
    try:
        return cost(0, parameters)
    except DiffsteerError:  # of ends that do not go together; others between them may
        return 0


def _quietly(call: Callable[[], Any]) -> Any:
    """What Optuna calls experimental, and what SciPy says of few or equal pairs, is nothing that a person can mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()
