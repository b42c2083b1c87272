"""Sessions over unmodified diffusers pipelines."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffsteer import rng
from diffsteer.blocks import Blocks
from diffsteer.classifier_free import guidance_parts, pulls
from diffsteer.clip_session import ClipSession
from diffsteer.conditions import Memory
from diffsteer.control import Left
from diffsteer.decoding import size_of
from diffsteer.history import History
from diffsteer.hooks import Watch, tapping, watching
from diffsteer.levels import clock_of, cut_state
from diffsteer.pipes import (
    asked_of,
    check_call,
    check_pipeline,
    decoder_of,
    denoisers_of,
    given_per_prompt,
    is_guided,
    refuse_caches,
    refuse_counted,
    refuse_graph,
    skipped_steps,
    tiny_decoder_of,
)
from diffsteer.scheduler import install
from diffsteer.segments import SegmentControl, frozen, only_latents
from diffsteer.selection import Selection
from diffsteer.session import Arrival
from diffsteer.shapes.models import is_embedded, recommended
from diffsteer.start import NoiseTransform
from diffsteer.types import DiffsteerError, UnsupportedError


class DiffusersSession(ClipSession):
    """A session over a pipeline: a shadow of it (`copy.copy`, components shared) carries the steered scheduler.

    Texts are encoded once a session, by the pipeline's own encoder behind a memory (`diffsteer.conditions`). A segment is one
    call of the unmodified pipeline, which skips the grid before `start` and ends at `stop`. Classes that cannot be cut so
    (`diffsteer.families`) run in one call.

    Raises:
        UnsupportedError, DiffsteerError: see `check_pipeline`, `check_call`, `diffsteer.scheduler.install`.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Any],
        *,
        num_inference_steps: int | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        latents: Tensor | None = None,
        decoder: str = "full",
        transition: str = "own",
        start: NoiseTransform | None = None,
        call: dict[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        super().__init__(prompts, **keys)
        self.family, self.native = check_pipeline(pipe), transition == "native"
        self.makes, self.no_reentry = self.family.makes, self.family.no_reentry
        if self.family.mixed and keys.get("deterministic"):
            raise UnsupportedError(f"{type(pipe).__name__} cannot be deterministic: {self.family.mixed}")
        if not self.eta and not self.native and getattr(pipe.scheduler.config, "stochastic_sampling", False):
            name = type(pipe.scheduler).__name__
            raise UnsupportedError(
                f"{name} with stochastic_sampling=True draws by no key of ours: set eta above 0, or that to False"
            )
        self.history = History(pipe.scheduler, self.native, self.ours)
        self.remembers, self.start = bool(self.history.of_rows), start
        self._prepared: dict[Any, Any] = {}  # by rows: what the pipeline made of pictures
        call = recommended(pipe) | (call or {})
        advised = call.pop("num_inference_steps", None)
        check_call(pipe, call)
        self._parameters = inspect.signature(type(pipe).__call__).parameters
        custom = {k: call.pop(k) for k in ("timesteps", "sigmas") if call.get(k) is not None}
        self._grid_call = custom or {
            "num_inference_steps": int(num_inference_steps or advised or self._default("num_inference_steps"))
        }
        self.guidance_scale = float(call.get("guidance_scale", self._default("guidance_scale") or 1.0))
        if latents is not None and self.family.entry != "latents":
            raise DiffsteerError(f"{type(pipe).__name__} begins with states of its own: leave latents= out")
        self.user, self.given = pipe, latents
        self.each = given_per_prompt(call, negative_prompt, len(self.prompts))
        self.call = {k: v for k, v in call.items() if k not in self.each}
        self.embedded = is_embedded(pipe)
        kind, _, where = decoder.partition(":")
        self.decoder = None if kind == "none" else decoder_of(pipe, **call)
        self.tiny_decoder = tiny_decoder_of(pipe, where, **call) if kind == "tiny" else None
        self._size = size_of(pipe, call)
        self.size = (self._size.height, self._size.width)
        self.shadow = copy.copy(pipe)
        asked = call | {"negative_prompt": negative_prompt}
        self._control = SegmentControl(self, self.shadow, is_guided(pipe, asked))
        self.per_step = (1 + is_guided(pipe, asked)) * len(self.experts)
        self.shadow.scheduler = install(pipe.scheduler, self._control)
        self.shadow._progress_bar_config = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
        if hasattr(pipe, "encode_prompt"):
            texts = {k: [v for v in values for _ in self.experts] for k, values in self.each.items() if "prompt" in k}
            every = {"prompt": self.texts_of(range(0, self.rows, self.particles)), **texts}
            self.shadow.encode_prompt = Memory(self.shadow.encode_prompt, every if self.family.together else None)
        self._denoisers = denoisers_of(pipe)
        self._modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
        self._watch = Watch(self.ledger, keep=True)
        self._outputs: list[Tensor] = []
        self.interrupted = self._stopped = False  # by a user's callback
        self._probe()
        self.further = skipped_steps(pipe, self.steps, call) * len(self.experts)

    def _default(self, name: str) -> Any:
        return self._parameters[name].default if name in self._parameters else None

    def _probe(self) -> None:
        """A call for one row with an empty part of the grid tells the levels, and the shape and scale of the states."""
        control = self._control
        try:
            first = self._first_states([0])
        except (TypeError, ValueError) as error:
            name = f"{type(self.user).__name__} with {type(self.user.scheduler).__name__}"
            grid = next((key for key in ("timesteps", "sigmas") if key in self._grid_call), "")
            said = f"walks no {grid}={list(self._grid_call[grid])}" if grid else "cannot begin"
            raise DiffsteerError(f"{name} {said}: {error}") from error
        scheduler = self.shadow.scheduler
        self.steps = len(scheduler._grid) - control.skipped
        if self.steps < 1:
            raise DiffsteerError(f"{type(self.user).__name__}: this strength= and num_inference_steps= leave no step to take")
        self.levels = scheduler.levels[control.skipped :]
        self._noise_scale, self.clock = float(scheduler.own_init_noise_sigma), clock_of(scheduler, control.skipped)
        self.shape, self._dtype, self._device = tuple(first.shape[1:]), first.dtype, first.device

    def _first_states(self, rows: Sequence[int]) -> Tensor:
        """What the pipeline itself begins with for these rows, by a call with an empty part of its grid."""
        control = self._control
        control.start = control.stop = 0
        control.rows, control.x = rows, torch.empty(0)
        control.entering = self.family.entry == "step"
        made: list[Tensor] = []

        def keep(prepared: Any) -> Any:
            made.append(prepared[0] if isinstance(prepared, tuple) else prepared)
            return prepared

        out = None
        call = self._arguments(rows) | {k: None for k in ("callback_on_step_end",) if k in self.call}
        # an unbound name: some return what only a step makes
        with torch.no_grad(), self._preparing(rows, keep), suppress(Left, UnboundLocalError):
            out = self.shadow(**call)[0]
        if self.family.entry == "step":
            return control.drawn
        returned = self.family.entry == "latents" and self.family.returns_states and out is not None
        first: Any = out if returned else made[0]
        states: Tensor = first[:: len(self.experts)]
        return states

    @contextmanager
    def _preparing(self, rows: Sequence[int], change: Callable[[Any], Any]) -> Iterator[None]:
        """Whatever the shadow's `prepare_latents` makes goes through `change`. What it makes of pictures and masks is made once
        for the same rows: the pipeline would encode them again in every call."""
        names = [name for name in ("prepare_latents", "prepare_mask_latents") if hasattr(self.shadow, name)]

        def once(name: str, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            key = (name, self.purpose, *rows)
            if self.family.entry != "prepared":
                made = prepare(*args, **kwargs)
            else:
                if key not in self._prepared:
                    self._prepared[key] = prepare(*args, **kwargs)
                made = self._prepared[key]
            return change(made) if name == "prepare_latents" else made

        for name in names:
            setattr(self.shadow, name, partial(once, name, getattr(self.shadow, name)))
        try:
            yield
        finally:
            for name in names:
                delattr(self.shadow, name)

    def guidance(self) -> tuple[Tensor, Tensor]:
        """The unconditional and the conditional output of the last block's last step, before they were mixed, (N, ...) each."""
        return guidance_parts(self._outputs, self.shadow.scheduler.prediction, self.guidance_scale)

    def measure_pulls(self) -> None:
        self.pulls = torch.zeros(self.rows)

    def noise(self, rows: Sequence[int] | None = None) -> Tensor:
        """Keyed first states; the given `latents`, scaled as the pipeline scales them, where there are any. Where a picture is
        changed they are the picture with keyed noise."""
        rows = list(range(self.rows) if rows is None else rows)
        if self.family.entry == "prepared":

            def one_block(block: list[int]) -> Tensor:
                return self._first_states([rows[i] for i in block])[: len(set(block))]

            return torch.cat(self.cut.run(len(rows), one_block))
        if self.family.entry == "step":
            generators = [self._stream(r) for r in rows]
            drawn: Tensor = randn_tensor((len(rows), *self.shape), generators, device=self._device, dtype=self._dtype)
            return drawn
        if self.given is None:
            return super().noise(rows)
        if len(self.given) != self.rows:
            raise DiffsteerError(f"latents have {len(self.given)} rows; {self.rows} are needed, prompt-major")
        return self._scale_noise(self.given[rows])

    def _scale_noise(self, noise: Tensor) -> Tensor:
        return (noise * self._noise_scale).to(self._device, self._dtype)

    def segment(self, x: Tensor, start: int, stop: int, rows: Sequence[int] | None = None, graph: bool = False) -> Arrival:
        """As in `Session`. Once a user's callback has interrupted the pipeline, later segments leave the states as they are.

        Raises:
            UnsupportedError: a graph through a class that cannot be cut, or through offloaded modules.
            UnsupportedError: a part of the grid with eta = 0, where a cut would lose what the user's own solver knows; a part
                from where a solver remembers its last steps, for rows that this session did not carry there.
        """
        if self.interrupted:
            return Arrival(x, x)
        whole = (start, stop) == (0, self.steps)
        if not self.ours and not self.native and not whole and cut_state(self.user.scheduler) is None:
            name = type(self.user.scheduler).__name__
            raise UnsupportedError(
                f"eta=0 steps with {name} itself, which runs from 0 to {self.steps} only, not {start} to {stop}"
            )
        self._stopped = False
        if not whole:
            refuse_counted(self.user, self.call, f"0 to {self.steps} only, not {start} to {stop}")
        if graph:
            refuse_graph(self.user, self._modules)
        arrival = super().segment(x, start, stop, rows, graph)
        self.interrupted = self._stopped
        return arrival

    def walk(self, select: Selection) -> Tensor:
        """As in `Session`; in one call, selection happening inside `step`, where the class cannot be cut, or where a user's
        callback is to keep what it changes and one block of rows holds all.

        Raises:
            UnsupportedError: a class that cannot be cut, in several blocks; a denoiser with a cache.
        """
        if len(select.events) > 1:
            refuse_caches(self.user)
        whole = self.cut.size is None or (self.cut.size >= self.rows and not self.cut.pad)
        if self.family.no_reentry and not whole:
            name, reason = type(self.user).__name__, self.family.no_reentry
            raise UnsupportedError(f"{name} runs all particles in one call, since {reason}: leave chunk and deterministic out")
        asks = ("callback_on_step_end", *self.family.by_index)
        one_call = (
            self.family.no_reentry or self.family.entry == "step" or any(self.call.get(name) is not None for name in asks)
        )
        if not (one_call and whole):
            return super().walk(select)
        x, cut = self.noise(), self.cut
        self._control.select, self.cut = select, Blocks()  # which do not halve: the selection wants all rows
        try:
            x = self.segment(x, 0, self.steps).x
            fits = True
        except torch.OutOfMemoryError:
            if not cut.auto or self.family.no_reentry or self.rows == 1:
                raise
            fits = False
        finally:
            self._control.select, self.cut = None, cut
        if not fits:
            cut.halve(self.rows)
            select.restart()
            return super().walk(select)
        for event in select.events[select.reached :]:  # the callback stopped the run before
            x = select(event, x, x)
        return x

    def _segment(self, x: Tensor, start: int, stop: int, rows: Sequence[int]) -> Arrival:
        count = len(self.experts)
        shown, call = x.repeat_interleave(count, 0), self._arguments(rows)
        control = self._control
        control.start, control.stop, control.rows, control.x, control.x0 = start, stop, rows, x, x
        control.eta = None if control.native else self.eta
        asked, control.shifted = (None, None) if self.shifted is None else self.shifted.of(list(rows))
        self._watch.asked = None if asked is None else asked.repeat_interleave(count)
        # at the beginning of a walk the pipeline draws the very states that would be let in
        control.entering = self.family.entry == "step" and (start > 0 or control.select is None)
        if self.family.entry == "latents":
            call["latents"] = self.family.enter(self.user, self._size, shown)
        if call.get("callback_on_step_end") is not None and (start, stop) != (0, self.steps):
            call |= only_latents(call["callback_on_step_end"], 0 if control.interrupts else start)
        run, out = type(self.shadow).__call__, None

        def let_in(prepared: Any) -> Any:
            if self.family.entry != "prepared":
                return prepared
            return (shown, *prepared[1:]) if isinstance(prepared, tuple) else shown

        try:
            modules = self._modules if torch.is_grad_enabled() else []
            taps = tapping(self._denoisers[0], self._taps, self.features)
            with watching(self._watch, *self._denoisers), frozen(modules), self._preparing(rows, let_in), taps, suppress(Left):
                out = (inspect.unwrap(run) if torch.is_grad_enabled() else run)(self.shadow, **call)[0]
            self.lay_out(shown)
        finally:
            if hasattr(self.shadow, "maybe_free_model_hooks"):
                self.shadow.maybe_free_model_hooks()
        if self.pulls is not None and stop == start + 1:
            found = pulls(self.shadow.scheduler, self._outputs, self.guidance_scale, self.experts, x, control.at)
            self.pulls[list(rows)] = found
        if stop < self.steps:  # nothing goes on from the end
            self.history.keep(self.shadow.scheduler, rows, stop)
        self._stopped |= bool(getattr(self.shadow, "_interrupt", False))
        return Arrival(out[::count] if self.family.returns_states and out is not None else control.x, control.x0)

    def follow(self, ancestors: Tensor, index: int) -> None:
        """Rows have become copies of others: so do their histories."""
        self.history.follow(ancestors, index)

    def gradient(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Arrival]:
        """As in `Session`. Parameters stay frozen until the pass back is done: a denoiser with checkpoints runs again there."""
        with frozen(self._modules):
            return super().gradient(*args, **kwargs)

    def trajectory(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in `Session`.

        Raises:
            UnsupportedError: a solver that remembers its last steps: what it remembers would get no gradient.
        """
        if self.history.of_rows:
            name = type(self.user.scheduler).__name__
            raise UnsupportedError(
                f"{name} remembers its last steps, which get no gradient: take one that does not, or eta > 0"
            )
        return super().trajectory(*args, **kwargs)

    def _stream(self, row: int) -> torch.Generator:
        """From this a pipeline draws what it draws itself for a row, the same in every call. Our transition draws by key."""
        return rng.generator(self.seed, *self.key(row), 0, "call" if self.purpose == "start" else self.purpose)

    def _arguments(self, rows: Sequence[int]) -> dict[str, Any]:
        """Of a call of the pipeline for these rows."""
        prompts = [r // self.particles for r in rows for _ in self.experts]
        call = {**self.call, **self._grid_call, **{name: [values[p] for p in prompts] for name, values in self.each.items()}}
        call |= asked_of(self.user, self.texts_of(rows))
        call["generator"] = [self._stream(r) for r in rows for _ in self.experts]
        if "output_type" in self._parameters:
            call["output_type"] = "latent" if self.family.returns_states else "pt"
        return call
