"""The scheduler seam: a subclass, made at run time, of whatever scheduler class the user's pipeline has.

`install` copies a scheduler and gives the copy a class that inherits from `SteeringMixin` and from the scheduler's own, so
`isinstance` checks, configuration, time grid and shift are the user's; the user's own object is not touched. What its `step`
does is asked of a `Control`. The class keeps the name and module of its parent, so that a pipeline saved while a steered
scheduler sits on it loads again, with the plain scheduler.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from diffsteer.algebra import Level, level, mixed, noise_std, to_clean, transition
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
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "velocity"}


class Control(Protocol):
    """What a steered scheduler asks.

    `eta` is the amount of noise of the transition, 0 (or None) meaning the user's own `step`. `interrupted` of the grid indices
    outside [start, stop) is told to the pipeline by `pipe._interrupt`, where there is a pipe.
    """

    @property
    def eta(self) -> float | None: ...

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int | None: ...

    @property
    def pipe(self) -> Any: ...

    @property
    def unit_noise(self) -> bool: ...

    @property
    def interrupts(self) -> bool: ...

    @property
    def doubled(self) -> bool: ...

    @property
    def experts(self) -> tuple[float, ...]: ...

    @property
    def native(self) -> bool: ...

    skipped: int

    def begin(self, scheduler: Any) -> None: ...

    def noise(self, index: int, sample: Tensor, generator: Any) -> Tensor: ...

    def arrived(self, index: int, total: int, x: Tensor, x0: Tensor, generator: Any) -> Tensor: ...


class _Grid(Tensor):
    """A time grid that tells the pipeline's loop which of its entries to skip, and ends where the segment ends.

    The loop keeps its true index, which callbacks and some pipelines read.
    """

    control: Control
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Tensor]:
        control, entered = self.control, False
        for k, t in enumerate(self.as_subclass(Tensor).unbind(0)):
            if control.stop is not None and k >= control.stop:
                return
            if not control.interrupts:  # the loop does not look: leave entries out, its index is then its own
                if k < control.start:
                    continue
            elif not (entered and control.pipe._interrupt):  # a user's callback may have set it: then it stays
                control.pipe._interrupt = k < control.start
            entered = k >= control.start
            yield t

    def __getitem__(self, index: Any) -> Any:
        """Image-to-image pipelines start in the middle: they walk a slice."""
        part = self.as_subclass(Tensor)[index]
        if not isinstance(index, slice) or index.stop is not None or not index.start:
            return part
        self.control.skipped = index.start
        part = part.as_subclass(_Grid)
        part.control = self.control
        return part


class SteeringMixin:
    """`step` and `set_timesteps` of a steered scheduler. Its class also inherits from the user's scheduler class."""

    _control: Control
    levels: list[Level]
    prediction: Tensor
    timesteps: Any
    _grid: Tensor
    _index: int | None
    _step_index: int | None

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """The user's grid and levels; then the part of it that the control wants."""
        super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        control = self._control
        if control.eta:
            _drop_repeats(self)
        if control.eta or control.native:
            self.levels = scheduler_levels(self)
            _refuse_rising(self)
        self._grid = self.timesteps.as_subclass(Tensor)
        self._index = None  # not located yet
        if control.start and hasattr(self, "_begin_index"):
            self._begin_index = control.start
        if control.pipe is not None:
            self.timesteps = self._grid.as_subclass(_Grid)
            self.timesteps.control = control
        control.begin(self)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Pipelines say 0 here whatever part of the grid they walk."""
        super().set_begin_index(begin_index + self._control.start)  # type: ignore[misc]

    @property
    def init_noise_sigma(self) -> Any:
        """The parent's scale of the first noise; 1 where the session hands over states that have it already."""
        return 1.0 if self._control.unit_noise else self.own_init_noise_sigma

    @init_noise_sigma.setter
    def init_noise_sigma(self, value: Any) -> None:
        self.__dict__["_init_noise_sigma"] = value

    @property
    def steering(self) -> Any:
        """The control; of a drop-in scheduler the record of its last run."""
        return self._control

    @property
    def own_init_noise_sigma(self) -> Any:
        """The scale of the first noise by the user's scheduler: an attribute in some classes, a property in others."""
        if "_init_noise_sigma" in self.__dict__:
            return self.__dict__["_init_noise_sigma"]
        return getattr(super(), "init_noise_sigma", 1.0)  # flow schedulers have none

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """One transition. `eta` and the further arguments reach only the user's own `step`."""
        k, control = self._locate(timestep), self._control
        self.prediction = model_output.detach()
        if control.doubled:
            model_output, sample = model_output[: len(sample) // 2], sample[: len(sample) // 2]
        if len(control.experts) > 1:  # they share the state, so each has the same
            model_output, sample = mixed(model_output, control.experts), sample[:: len(control.experts)]
        if control.eta:
            x0, x_next = self._transition(k, model_output, sample, control, generator)
            self._step_index = k + 1  # scale_model_input of the sigma classes reads it
        else:
            own = {"eta": eta, "generator": generator, **kwargs}
            if control.native:
                own |= control.native_options(k)  # type: ignore[attr-defined]
            accepted = inspect.signature(super().step).parameters  # type: ignore[misc]
            own = {name: value for name, value in own.items() if name in accepted}
            out = super().step(model_output, timestep, sample, return_dict=True, **own)  # type: ignore[misc]
            x_next, estimate = out.prev_sample, getattr(out, "pred_original_sample", None)
            x0 = x_next if estimate is None else estimate
            if control.native:
                x0 = self._clean(k, model_output, sample)[0]
        self._index = k + 1
        x_next = control.arrived(k, len(self._grid), x_next.to(sample.dtype), x0, generator)
        if control.doubled:
            x_next, x0 = torch.cat([x_next] * 2), torch.cat([x0] * 2)
        if len(control.experts) > 1:
            x_next, x0 = (v.repeat_interleave(len(control.experts), 0) for v in (x_next, x0))
        return _StepOutput(x_next, x0) if return_dict else (x_next, x0)

    def _transition(
        self, k: int, model_output: Tensor, sample: Tensor, control: Control, generator: Any
    ) -> tuple[Tensor, Tensor]:
        at, to = self.levels[k], self.levels[k + 1]
        x0, eps = self._clean(k, model_output, sample)
        noisy = bool((noise_std(at, to, control.eta or 0.0) > 0).any())
        z = control.noise(k, sample, generator) if noisy else torch.zeros_like(x0)
        return x0, transition(x0, eps, at, to, control.eta or 0.0, z.to(x0))

    def _clean(self, k: int, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """The clean estimate and the noise, in single precision or better."""
        work = torch.promote_types(sample.dtype, torch.float32)
        at, config = self.levels[k], self.config  # type: ignore[attr-defined]
        output = model_output[:, : sample.shape[1]].to(work)  # a learned variance rides along as further channels
        x, prediction = sample.to(work), _prediction(self)
        if prediction == "preconditioned":
            x0 = self.precondition_outputs(x, output, float(at.sigma))  # type: ignore[attr-defined]
            return x0, (x - x0) / float(at.sigma)
        x0, eps = to_clean(prediction, x, output, at)
        if getattr(config, "clip_sample", False):
            x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        return x0, eps

    def _locate(self, timestep: Any) -> int:
        """The index of a timestep, by value at first, then by counting; a grid may hold the same value twice."""
        value = float(timestep)
        if self._index is None:
            found = [k for k, t in enumerate(self._grid.tolist()) if k >= self._control.start and t == value]
            if not found:
                raise UnsupportedError(f"{type(self).__name__}: the pipeline steps at {value:g}, which is not on its time grid")
            return found[0]
        if self._index >= len(self._grid) or float(self._grid[self._index]) != value:
            raise UnsupportedError(
                f"{type(self).__name__}: the pipeline steps at {value:g}, out of the order of its time grid; "
                "a pipeline that visits a level twice cannot be steered"
            )
        return self._index


class _StepOutput(dict[str, Tensor]):
    """What diffusers' steps return: fields by name, and by position where a tuple is wanted."""

    def __init__(self, prev_sample: Tensor, pred_original_sample: Tensor) -> None:
        super().__init__(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
        self.prev_sample, self.pred_original_sample = prev_sample, pred_original_sample

    def __getitem__(self, key: Any) -> Tensor:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


@functools.cache
def steered_class(cls: Any) -> Any:
    """The steered subclass of a scheduler class."""

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: SteeringMixin, *args: Any, **kwargs: Any) -> None:
        """Pipelines look for `sigmas` and `timesteps` in this signature, so it is the parent's."""
        SteeringMixin.set_timesteps(self, *args, **kwargs)

    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": f"Steered{cls.__qualname__}",
        "__doc__": f"{cls.__name__}, steered by diffsteer.",
        "set_timesteps": set_timesteps,
    }
    if not hasattr(cls, "set_begin_index"):
        namespace["set_begin_index"] = lambda self, begin_index=0: None
    return type(cls.__name__, (SteeringMixin, cls), namespace)


def install(scheduler: Any, control: Control) -> Any:
    """A steered copy of a scheduler; the original is untouched.

    Raises:
        UnsupportedError: a class whose grid is no chain of one-step transitions, when the control wants our transition.
    """
    cls = type(scheduler)
    if issubclass(cls, SteeringMixin):
        raise UnsupportedError(f"{cls.__name__} is steered already: give the scheduler that it was made from")
    if control.eta:
        _refuse(scheduler)
    if control.native:
        native_state(scheduler)
    new = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            new.__dict__[name] = list(value)
    if "init_noise_sigma" in new.__dict__:
        new.__dict__["_init_noise_sigma"] = new.__dict__.pop("init_noise_sigma")
    new.__class__ = steered_class(cls)  # type: ignore[arg-type]  # classes are hashable
    new._control = control
    return new


def native_state(scheduler: Any) -> tuple[str, ...]:
    """The attributes of a solver that hold something of each row, for ``transition="native"``.

    Raises:
        UnsupportedError: a solver without noise of its own, or whose state is not known.
    """
    config, names = scheduler.config, [cls.__name__ for cls in type(scheduler).__mro__]
    found = next((NATIVE[name] for name in names if name in NATIVE), None)
    if found is None or (found and "sde" not in config.algorithm_type):
        own = "of its own noise" if found is None else f"with algorithm_type={config.algorithm_type!r}"
        raise UnsupportedError(
            f"{type(scheduler).__name__} {own} is no transition to resample after; transition=native takes "
            f"{', '.join(NATIVE)} (the last with algorithm_type='sde-dpmsolver++'); transition=own takes most others"
        )
    return found


def _refuse(scheduler: Any) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    if _NO_TRANSITION & {cls.__name__ for cls in type(scheduler).__mro__}:
        raise UnsupportedError(
            f"{name} has no one-step transition between its levels; use DDIMScheduler or EulerDiscreteScheduler"
        )
    if getattr(config, "thresholding", False):
        raise UnsupportedError(f"{name} has thresholding=True, which the transition does not follow; set it to False")
    if _prediction(scheduler) == "":
        valid = ", ".join(_PREDICTIONS)
        said = getattr(config, "prediction_type", None)
        raise UnsupportedError(f"{name} has prediction_type={said!r}; the transition knows {valid}")
    known = ("alphas_cumprod", "_sigma_to_alpha_sigma_t", "precondition_outputs")
    if not (_is_flow(scheduler) or any(hasattr(scheduler, what) for what in known)):
        raise UnsupportedError(f"{name}: its levels are not known; use DDIMScheduler or EulerDiscreteScheduler")


def _is_flow(scheduler: Any) -> bool:
    return any(cls.__name__ == "FlowMatchEulerDiscreteScheduler" for cls in type(scheduler).__mro__)


def _prediction(scheduler: Any) -> str:
    """What the model predicts, in the words of `to_clean`; "preconditioned" where the scheduler reads it; "" if unknown."""
    if hasattr(scheduler, "precondition_outputs"):
        return "preconditioned"
    said = "flow_prediction" if _is_flow(scheduler) else getattr(scheduler.config, "prediction_type", None)
    return _PREDICTIONS.get(str(said), "")


def _refuse_rising(scheduler: Any) -> None:
    noise = [float(at.sigma) / max(float(at.alpha), 1e-12) for at in scheduler.levels]
    if any(b > a * (1 + 1e-9) for a, b in zip(noise, noise[1:], strict=False)):
        raise UnsupportedError(
            f"{type(scheduler).__name__}: its noise does not fall from step to step, so it is no sampler's grid"
        )


def _drop_repeats(scheduler: Any) -> None:
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
    if _is_flow(scheduler):
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
