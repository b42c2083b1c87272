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
from typing import Any

import torch
from torch import Tensor

from diffsteer.algebra import Level, mixed, noise_std, to_clean, transition
from diffsteer.control import Control, Follower, Left
from diffsteer.grids import ended, walk
from diffsteer.levels import (
    cut_state,
    drop_repeats,
    native_state,
    prediction_of,
    refuse_rising,
    refuse_step,
    refuse_transition,
    scheduler_levels,
)
from diffsteer.particles import reindex
from diffsteer.types import UnsupportedError


class _Grid(Tensor):
    """A time grid that tells the pipeline's loop which of its entries to skip, and ends where the segment ends.

    The loop keeps its true index, which callbacks and some pipelines read.
    """

    control: Control
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Tensor]:
        control, entered = self.control, False
        for k, t in enumerate(self.as_subclass(Tensor).unbind(0)):
            if k == control.start and control.entering:
                yield t
            if control.stop is not None and k >= control.stop:
                break
            if not control.interrupts:  # the loop does not look: leave entries out, its index is then its own
                if k < control.start:
                    continue
            elif not (entered and control.pipe._interrupt):  # a user's callback may have set it: then it stays
                control.pipe._interrupt = k < control.start
            entered = k >= control.start
            yield t
        if control.left:
            raise Left

    def __getitem__(self, index: Any) -> Any:
        """Image-to-image pipelines start in the middle: they walk a slice."""
        part = self.as_subclass(Tensor)[index]
        if not isinstance(index, slice) or index.stop is not None:
            return part
        self.control.skipped = index.start or 0
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
        self.levels = []
        if control.ours:
            drop_repeats(self)
        if control.schedule is not None:
            walk(self, control.schedule)
        if control.ours or control.native or (control.eta == 0 and cut_state(self) and prediction_of(self)):
            self.levels = scheduler_levels(self)
            if control.schedule is not None:
                self.levels = ended(self.levels)
        if control.ours or control.native:
            refuse_rising(self)
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy steps a second stream of the same particles."""
        new = _copied(self)
        new._control = Follower(self._control)
        return new

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
        if control.entering:
            control.entering = False
            let_in = self._for_every_row(control.enter(sample))
            return _StepOutput(let_in, let_in) if return_dict else (let_in, let_in)
        if control.ours:
            x0, x_next = self._transition(k, model_output, sample, control, generator)
            self._step_index = k + 1  # scale_model_input of the sigma classes reads it
        else:
            own = {"eta": eta, "generator": generator, **kwargs}
            if control.native:
                own |= control.native_options(k)
            accepted = inspect.signature(super().step).parameters  # type: ignore[misc]
            own = {name: value for name, value in own.items() if name in accepted}
            out = super().step(model_output, timestep, sample, return_dict=True, **own)  # type: ignore[misc]
            x_next, estimate = out.prev_sample, getattr(out, "pred_original_sample", None)
            x0 = x_next if estimate is None else estimate
            if control.native or (control.eta == 0 and self.levels):
                x0 = self._clean(k, model_output, sample)[0]
        self._index = k + 1
        control.at, control.moved = k, None
        x_next = control.arrived(k, len(self._grid), x_next.to(sample.dtype), x0, generator)
        if control.moved is not None:  # some pipelines show the estimate
            x0 = reindex(x0.view(*control.moved.shape, *x0.shape[1:]), control.moved).flatten(0, 1)
        x_next, x0 = self._for_every_row(x_next), self._for_every_row(x0)
        return _StepOutput(x_next, x0) if return_dict else (x_next, x0)

    def _for_every_row(self, x: Tensor) -> Tensor:
        """States as the pipeline has them: one for each expert, and twice where it doubles them itself."""
        x = x.repeat_interleave(len(self._control.experts), 0)
        return torch.cat([x, x]) if self._control.doubled else x

    def _transition(
        self, k: int, model_output: Tensor, sample: Tensor, control: Control, generator: Any
    ) -> tuple[Tensor, Tensor]:
        at, to = control.shifted or self.levels[k], self.levels[k + 1]
        x0, eps = self._clean(k, model_output, sample)
        noisy = bool((noise_std(at, to, control.eta or 0.0, control.noise_kind) > 0).any())
        z = control.noise(k, sample, generator) if noisy else torch.zeros_like(x0)
        return x0, transition(x0, eps, at, to, control.eta or 0.0, z.to(x0), control.noise_kind)

    def _clean(self, k: int, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """The clean estimate and the noise, in single precision or better."""
        work = torch.promote_types(sample.dtype, torch.float32)
        at, config = self._control.shifted or self.levels[k], self.config  # type: ignore[attr-defined]
        output = model_output[:, : sample.shape[1]].to(work)  # a learned variance rides along as further channels
        x, prediction = sample.to(work), prediction_of(self)
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
    refuse_step(scheduler)
    if control.ours:
        refuse_transition(scheduler)
    if control.native:
        native_state(scheduler)
    new = _copied(scheduler)
    if "init_noise_sigma" in new.__dict__:
        new.__dict__["_init_noise_sigma"] = new.__dict__.pop("init_noise_sigma")
    new.__class__ = steered_class(cls)  # type: ignore[arg-type]  # classes are hashable
    new._control = control
    return new


def _copied(scheduler: Any) -> Any:
    new = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            new.__dict__[name] = list(value)
    return new
