"""What a scheduler's class and grid say: its noise levels, what its model predicts, and what it cannot be used for."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from diffsteer.algebra import Level, level
from diffsteer.timing import Clock
from diffsteer.types import UnsupportedError

# These walk half steps or keep a noise process of their own, so the levels of their grid are no chain of one-step transitions.
_NO_TRANSITION = {
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "IPNDMScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "CogVideoXDPMScheduler",
}
# Stochastic solvers whose own step can be taken for the transition, and what of their state belongs to the rows.
NATIVE: dict[str, tuple[str, ...]] = {
    "DDIMScheduler": (),
    "DDPMScheduler": (),
    "EulerAncestralDiscreteScheduler": (),
    "LCMScheduler": (),
    "TCDScheduler": (),
    "DPMSolverMultistepScheduler": ("model_outputs",),
}
# Deterministic solvers whose own steps can be cut: what of their state belongs to the rows, and what to all.
CUT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "DDIMScheduler": ((), ()),
    "EulerDiscreteScheduler": ((), ()),
    "FlowMatchEulerDiscreteScheduler": ((), ()),
    "DPMSolverMultistepScheduler": (("model_outputs",), ("lower_order_nums",)),
    "DEISMultistepScheduler": (("model_outputs",), ("lower_order_nums",)),
    "UniPCMultistepScheduler": (("model_outputs", "last_sample"), ("lower_order_nums", "timestep_list", "this_order")),
}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "velocity"}


def native_state(scheduler: Any) -> tuple[str, ...]:
    """The attributes of a solver that hold something of each row, for ``transition="native"``.

    Raises:
        UnsupportedError: a solver without noise of its own, or whose state is not known.
    """
    config, names = scheduler.config, [cls.__name__ for cls in type(scheduler).__mro__]
    found = next((NATIVE[name] for name in names if name in NATIVE), None)
    if found is None or (found and config.algorithm_type != "sde-dpmsolver++"):
        own = "of its own noise" if found is None else f"with algorithm_type={config.algorithm_type!r}"
        raise UnsupportedError(
            f"{type(scheduler).__name__} {own} is no transition to resample after; transition=native takes "
            f"{', '.join(NATIVE)} (the last with algorithm_type='sde-dpmsolver++'); transition=own takes most others"
        )
    return found


def cut_state(scheduler: Any) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The attributes of a deterministic solver that hold something of each row, and of all; None where it cannot be cut."""
    config, found = scheduler.config, next((CUT[c.__name__] for c in type(scheduler).__mro__ if c.__name__ in CUT), None)
    noisy = getattr(config, "stochastic_sampling", False) or "sde" in str(getattr(config, "algorithm_type", ""))
    return None if noisy else found


def refuse_step(scheduler: Any) -> None:
    parameters = list(inspect.signature(type(scheduler).step).parameters)
    if parameters[1:4] != ["model_output", "timestep", "sample"]:
        wants = ", ".join(parameters[1:6])
        raise UnsupportedError(
            f"{type(scheduler).__name__} has a step of its own kind, step({wants}, ...): use another scheduler"
        )


def refuse_transition(scheduler: Any) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    if _NO_TRANSITION & {cls.__name__ for cls in type(scheduler).__mro__}:
        raise UnsupportedError(
            f"{name} has no one-step transition between its levels; use DDIMScheduler or EulerDiscreteScheduler"
        )
    if getattr(config, "thresholding", False):
        raise UnsupportedError(f"{name} has thresholding=True, which the transition does not follow; set it to False")
    if prediction_of(scheduler) == "":
        valid = ", ".join(_PREDICTIONS)
        said = getattr(config, "prediction_type", None)
        raise UnsupportedError(f"{name} has prediction_type={said!r}; the transition knows {valid}")
    known = ("alphas_cumprod", "_sigma_to_alpha_sigma_t", "precondition_outputs")
    if not (is_flow(scheduler) or any(hasattr(scheduler, what) for what in known)):
        raise UnsupportedError(f"{name}: its levels are not known; use DDIMScheduler or EulerDiscreteScheduler")


def is_flow(scheduler: Any) -> bool:
    return any(cls.__name__ == "FlowMatchEulerDiscreteScheduler" for cls in type(scheduler).__mro__)


def prediction_of(scheduler: Any) -> str:
    """What the model predicts, in the words of `to_clean`; "preconditioned" where the scheduler reads it; "" if unknown."""
    if hasattr(scheduler, "precondition_outputs"):
        return "preconditioned"
    said = "flow_prediction" if is_flow(scheduler) else getattr(scheduler.config, "prediction_type", None)
    return _PREDICTIONS.get(str(said), "")


def refuse_rising(scheduler: Any) -> None:
    noise = [float(at.sigma) / max(float(at.alpha), 1e-12) for at in scheduler.levels]
    if any(b > a * (1 + 1e-9) for a, b in zip(noise, noise[1:], strict=False)):
        raise UnsupportedError(
            f"{type(scheduler).__name__}: its noise does not fall from step to step, so it is no sampler's grid"
        )


def drop_repeats(scheduler: Any) -> None:
    """Heun and PNDM visit levels twice, for their second evaluations; a one-step transition needs each level once."""
    grid = scheduler.timesteps
    keep = torch.cat([torch.ones(1, dtype=torch.bool), (grid[1:] != grid[:-1]).cpu()])
    if getattr(type(scheduler), "order", 1) > 1 or type(scheduler).__name__ == "PNDMScheduler":
        scheduler.order = 1  # image-to-image pipelines cut the grid in steps of this
        scheduler.timesteps = grid[keep.to(grid.device)]
        if getattr(scheduler, "sigmas", None) is not None:
            scheduler.sigmas = torch.cat([scheduler.sigmas[:-1][keep.to(scheduler.sigmas.device)], scheduler.sigmas[-1:]])


def scheduler_levels(scheduler: Any) -> list[Level]:
    """The levels of a scheduler's grid after `set_timesteps`, the last one after its final step included: T + 1 of them."""
    if is_flow(scheduler):
        return [level(1 - s, s) for s in scheduler.sigmas.double()]
    if hasattr(scheduler, "precondition_outputs"):
        return [level(1.0, s) for s in scheduler.sigmas.double()]
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        return [level(*scheduler._sigma_to_alpha_sigma_t(s)) for s in scheduler.sigmas.double()]
    if getattr(scheduler, "sigmas", None) is not None:
        return [level(1.0, s) for s in scheduler.sigmas.double()]
    cumulative = scheduler.alphas_cumprod.double()
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    bars = [*cumulative[scheduler.timesteps.long().cpu()].tolist(), final]
    return [level(bar**0.5, (1 - bar) ** 0.5) for bar in bars]


def clock_of(scheduler: Any, skipped: int = 0) -> Clock | None:
    """What a scheduler calls its levels, if a network can be told them row by row: states that go in unscaled, at times that
    the schedule has a level for.

    Args:
        skipped: of the grid, where a pipeline starts in its middle.
    """
    times = scheduler.timesteps.as_subclass(torch.Tensor).double().cpu()[skipped:]
    if is_flow(scheduler):
        return None  # pipelines tell their networks a flow's time in units of their own
    if getattr(scheduler, "sigmas", None) is not None or not hasattr(scheduler, "alphas_cumprod") or not scheduler.levels:
        return None
    bars = scheduler.alphas_cumprod.double().cpu()
    return Clock(times, torch.stack([torch.arange(len(bars)).double(), bars.sqrt(), (1 - bars).sqrt()], 1))
