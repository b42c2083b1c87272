"""A schedule on a model: the levels nearest to its ratios that the model can be told."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsteer.algebra import Level, level
from diffsteer.levels import is_flow
from diffsteer.schedules import Given, Schedule, interpolated
from diffsteer.types import DiffsteerError, UnsupportedError

HIGHEST_RATIO = 1e3  # that schedules are asked for, where a model's noisiest level has no signal at all


class Range(NamedTuple):
    """The noise ratios that a model can be told: from `low` to `high`, which is infinite where nothing but noise is left.

    Attributes:
        flow: are its sigmas a flow's t? ratio_of: what its timesteps mean; None where they are not to be given.
    """

    high: float
    low: float
    flow: bool
    ratio_of: Callable[[Tensor], Tensor] | None


def ratios_for(schedule: Schedule, steps: int, known: Range) -> Tensor:
    """A schedule's ratios for a model, (steps,) falling, in float64; the first may be infinite.

    Raises:
        DiffsteerError: ratios that do not fall, are not positive, or of another number than steps.
    """
    top = min(known.high, HIGHEST_RATIO)
    ratios = torch.as_tensor(schedule.ratios(steps, top, known.low), dtype=torch.float64)
    if isinstance(schedule, Given) and schedule.kind == "timesteps":
        if known.ratio_of is None:
            raise DiffsteerError("timesteps of this model are not to be given: give sigmas")
        ratios = known.ratio_of(ratios)
    elif isinstance(schedule, Given) and schedule.kind == "sigmas" and known.flow:
        if bool((ratios > 1).any()):
            raise DiffsteerError(f"sigmas of a flow lie in (0, 1], not {float(ratios.max()):g}")
        ratios = ratios / (1 - ratios)
    name = getattr(schedule, "name", type(schedule).__name__)
    if ratios.shape != (steps,):
        raise DiffsteerError(f"the schedule {name} has {tuple(ratios.shape)} ratios for {steps} steps")
    if not bool((ratios > 0).all()) or not bool((ratios[1:] < ratios[:-1]).all()):
        raise DiffsteerError(f"the schedule {name} does not fall from step to step, above 0, in {steps} steps")
    if known.high > top and float(ratios[0]) >= top * (1 - 1e-9):
        ratios[0] = known.high
    return ratios


def snapped(ratios: Tensor, table: Tensor) -> Tensor:
    """The distinct timesteps whose ratios are nearest, by their logarithm: (N,) falling indices into `table` (M,), which rises.

    Raises:
        DiffsteerError: more steps than the model has timesteps.
    """
    count, last = len(ratios), len(table)
    if count > last:
        raise DiffsteerError(f"{count} steps; this model has {last} timesteps")
    logs = table.clamp(1e-12, 1e12).log()
    near = (logs - ratios.clamp(1e-12, 1e12).log()[:, None]).abs().argmin(1).tolist()
    found: list[int] = []
    for k, index in enumerate(near):
        lowest, highest = count - 1 - k, (found[-1] if found else last) - 1
        found.append(min(max(index, lowest), highest))
    return torch.tensor(found)


def flow_times(ratios: Tensor) -> Tensor:
    """A flow's time t = sigma / (alpha + sigma)."""
    return 1 / (1 + 1 / ratios)


def vp_ratios(bars: Tensor) -> Tensor:
    """The ratios of alphas_cumprod (M,), which may reach 0."""
    return ((1 - bars) / bars).sqrt()


def vp_range(table: Tensor) -> Range:
    """The range of a table of ratios (M,) by timestep."""
    index = torch.arange(len(table), dtype=torch.float64)

    def ratio_of(times: Tensor) -> Tensor:
        if bool(((times < 0) | (times > len(table) - 1)).any()):
            raise DiffsteerError(f"timesteps lie in [0, {len(table) - 1}], not {times.tolist()}")
        return interpolated(times, index, table.clamp(1e-12, 1e12).log()).exp()

    high = float(table[-1])
    return Range(high if high < 1e9 else math.inf, float(table[0].clamp(min=1e-6)), False, ratio_of)


def walk(scheduler: Any, schedule: Schedule) -> None:
    """Put a schedule in the place of the grid that a diffusers scheduler has just made, a level for each step it was asked for.

    Schedulers with integer timesteps of a table get the nearest of them, others the ratios themselves and the matching times.

    Raises:
        UnsupportedError: a scheduler whose times are not known. DiffsteerError: see `ratios_for`, `snapped`.
    """
    times, config = scheduler.timesteps.as_subclass(Tensor), scheduler.config
    steps = getattr(scheduler, "num_inference_steps", None) or len(times)  # some make more levels than they were asked for
    sigmas = getattr(scheduler, "sigmas", None)
    if is_flow(scheduler) or getattr(config, "use_flow_sigmas", False):
        train, high, low = float(config.num_train_timesteps), *_flow_ends(scheduler)
        known = Range(high, low, True, lambda t: (t / train) / (1 - t / train))
        t = flow_times(ratios_for(schedule, steps, known))
        # integer timesteps are cut off there; what is whole but for rounding stays
        shown = t * train if times.is_floating_point() else (t * train + 1e-3).floor()
        _put(scheduler, t, shown)
    elif hasattr(scheduler, "precondition_noise"):
        ratios = ratios_for(schedule, steps, Range(float(config.sigma_max), float(config.sigma_min), False, None))
        _put(scheduler, ratios, scheduler.precondition_noise(ratios.float()))
    elif hasattr(scheduler, "alphas_cumprod"):
        table = vp_ratios(scheduler.alphas_cumprod.double().cpu())
        ratios = ratios_for(schedule, steps, vp_range(table))
        if sigmas is None or not times.is_floating_point():
            index = snapped(ratios, table)
            _put(scheduler, table[index], index)
        else:
            ratios = ratios.clamp(max=float(table[-1]))
            index = interpolated(ratios.log(), table.log(), torch.arange(len(table)).double())
            continuous = getattr(config, "timestep_type", "") == "continuous" and config.prediction_type == "v_prediction"
            _put(scheduler, ratios, ratios.log() / 4 if continuous else index)
    else:
        raise UnsupportedError(f"{type(scheduler).__name__}: its levels are not known, so it walks no schedule but its own")


def ended(levels: list[Level]) -> list[Level]:
    """Levels with the clean one at their end, where a scheduler ends at its lowest level and a schedule was there before."""
    ratios = [float(at.sigma) / max(float(at.alpha), 1e-12) for at in levels[-2:]]
    return levels if ratios[-1] < ratios[0] * (1 - 1e-6) else [*levels[:-1], level(1.0, 0.0)]


def check_schedule(schedule: Schedule | None, steered: bool, transition: str) -> None:
    """Refuse a schedule that would not be walked.

    Raises:
        DiffsteerError: without a sampler, or for the solver's own transitions.
    """
    if schedule is not None and not steered:
        raise DiffsteerError(
            "a schedule wants a sampler, since its steps are diffsteer's: BestOfN(1, eta=0), or sampler=best_of_n "
            "sampler.particles=1 sampler.eta=0, is the plain chain"
        )
    if schedule is not None and transition == "native":
        raise DiffsteerError("transition=native walks the solver's own grid: leave the schedule out, or take transition=own")


def explicit(
    pipe: Any, schedule: Schedule | None, call: dict[str, Any], steered: bool, transition: str
) -> tuple[Schedule | None, dict[str, Any]]:
    """The schedule that ``sigmas=`` or ``timesteps=`` of a call stand for, and the call without them.

    Where pipeline and scheduler take them themselves they stay in the call, and mean what they mean there.

    Raises:
        DiffsteerError: several grids at once; see `check_schedule`.
    """
    found = [k for k in ("sigmas", "timesteps") if call.get(k) is not None]
    if len(found) + (schedule is not None) > 1:
        grids = [*found, *(["schedule"] if schedule is not None else [])]
        raise DiffsteerError(f"give one of {' and '.join(grids)}, not both")
    if not found:
        return schedule, call
    name, scheduler = found[0], getattr(pipe, "scheduler", None)
    takers = () if scheduler is None else (type(pipe).__call__, scheduler.set_timesteps)
    if takers and all(name in inspect.signature(taker).parameters for taker in takers):
        return schedule, call
    values = [float(v) for v in call[name]]
    if name == "sigmas" and values and values[-1] == 0:  # the clean level, which is no step
        del values[-1]
    made = Given(tuple(values), name)
    check_schedule(made, steered, transition)
    return made, {k: v for k, v in call.items() if k != name}


def _put(scheduler: Any, sigmas: Tensor, times: Tensor) -> None:
    own = scheduler.timesteps.as_subclass(Tensor)
    scheduler.timesteps = times.to(own)
    if getattr(scheduler, "sigmas", None) is not None:
        scheduler.sigmas = torch.cat([sigmas.to(scheduler.sigmas), scheduler.sigmas[-1:]])


def _flow_ends(scheduler: Any) -> tuple[float, float]:
    """The highest and the lowest ratio of a flow's scheduler."""
    config = scheduler.config
    if getattr(config, "invert_sigmas", False):
        raise UnsupportedError(f"{type(scheduler).__name__} with invert_sigmas=True walks no schedule but its own")
    if is_flow(scheduler):
        ends = (float(scheduler.sigma_max), float(scheduler.sigma_min))
    else:
        shift, least = float(config.flow_shift), 1 / float(config.num_train_timesteps)
        ends = tuple(shift * t / (1 + (shift - 1) * t) for t in (1 - least, least))  # type: ignore[assignment]
    high, low = (t / (1 - t) if t < 1 else math.inf for t in ends)
    return high, low
