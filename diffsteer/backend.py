"""The diffusers backend, the only module that imports diffusers: sessions over unmodified pipelines."""

from __future__ import annotations

import copy
import difflib
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from diffsteer import rng
from diffsteer.hooks import Watch, guidance_parts, watching
from diffsteer.scheduler import install
from diffsteer.selection import Selection
from diffsteer.session import Arrival, Session
from diffsteer.shapes.models import MODELS, is_embedded, recommended
from diffsteer.types import DiffsteerError, UnsupportedError

SUPPORTED = ("StableDiffusionPipeline",)
# Call arguments that the session gives itself, or that have one row an image and so cannot follow blocks of rows.
_OWN = {"prompt", "prompt_embeds", "negative_prompt_embeds", "num_images_per_prompt", "output_type", "return_dict", "generator"}
_PER_ROW = {"ip_adapter_image", "ip_adapter_image_embeds"}


def check_pipeline(pipe: Any) -> None:
    """Refuse, by name, what cannot be steered.

    Raises:
        UnsupportedError: a pipeline class that no session was tried on.
    """
    names = [cls.__name__ for cls in type(pipe).__mro__]
    if not isinstance(pipe, DiffusionPipeline) or not set(names) & set(SUPPORTED):
        raise UnsupportedError(f"{type(pipe).__name__} cannot be steered; supported: {', '.join(SUPPORTED)}, and CallableModel")


def refuse_by_name(path: str, **options: Any) -> None:
    """Refuse a saved pipeline by what its index says, before its weights are fetched.

    Raises:
        UnsupportedError: a pipeline class that no session was tried on.
    """
    if path in MODELS:
        return
    try:
        name = DiffusionPipeline.load_config(path, **options).get("_class_name")
    except (OSError, ValueError):  # nothing there: loading says so
        return
    known = getattr(diffusers, str(name), None)
    if known is None or not {cls.__name__ for cls in known.__mro__} & set(SUPPORTED):
        raise UnsupportedError(f"{path} is a {name}, which cannot be steered; supported: {', '.join(SUPPORTED)}")


def check_call(pipe: Any, call: dict[str, Any]) -> None:
    """Refuse call arguments that the pipeline does not know, or that the session gives itself.

    Raises:
        DiffsteerError: with the nearest valid name.
    """
    valid = [p for p in inspect.signature(type(pipe).__call__).parameters if p not in ("self", "kwargs")]
    for name in call:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DiffsteerError(f"{type(pipe).__name__} takes no argument {name!r}{hint}")
        if name in _OWN | _PER_ROW:
            raise DiffsteerError(f"the argument {name!r} of {type(pipe).__name__} cannot be given to a steered run")


def quiet() -> None:
    """No progress bars and, unless their own variables ask for more, only errors from diffusers and transformers."""
    from transformers.utils import logging as transformers_logging

    for name, logging in (("DIFFUSERS_VERBOSITY", diffusers_logging), ("TRANSFORMERS_VERBOSITY", transformers_logging)):
        if name not in os.environ:
            logging.set_verbosity_error()
        logging.disable_progress_bar()


def is_guided(pipe: Any, call: dict[str, Any]) -> bool:
    """Does a call double its rows for classifier-free guidance?"""
    default = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    return bool(call.get("guidance_scale", default) > 1 and pipe.unet.config.time_cond_proj_dim is None)


def vae_decoder(pipe: Any) -> Callable[[Tensor], Tensor]:
    """Latents as `step` sees them, (N, C, h, w), to images (N, 3, H, W) in [0, 1], as the pipeline itself decodes them."""

    def decode(latents: Tensor) -> Tensor:
        vae = pipe.vae
        with torch.no_grad():
            images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        decoded: Tensor = (images / 2 + 0.5).clamp(0, 1)
        return decoded

    return decode


def as_images(pipe: Any, samples: Tensor) -> list[Any]:
    """Samples (N, 3, H, W) in [0, 1] to PIL images, rounded as diffusers rounds; blacked out where a safety checker says so."""
    from diffusers.image_processor import VaeImageProcessor

    if getattr(pipe, "safety_checker", None) is not None:
        signed, flags = pipe.run_safety_checker(samples * 2 - 1, samples.device, samples.dtype)
        black = torch.tensor([bool(f) for f in flags], device=samples.device)[:, None, None, None]
        samples = torch.where(black, torch.zeros_like(samples), signed / 2 + 0.5)
    array = samples.detach().cpu().permute(0, 2, 3, 1).float().numpy()
    return list(VaeImageProcessor.numpy_to_pil(array))


class DiffusersSession(Session):
    """A session over a pipeline: a shadow of it (`copy.copy`, components shared) carries the steered scheduler.

    Prompts are encoded once, one at a time, so that an embedding does not depend on the other prompts. A segment is one call of
    the unmodified pipeline, which skips the grid before `start` and ends at `stop`.

    Raises:
        UnsupportedError, DiffsteerError: see `check_pipeline`, `check_call`, `diffsteer.scheduler.install`.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        num_inference_steps: int | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        latents: Tensor | None = None,
        decode: bool = True,
        call: dict[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        super().__init__(prompts, **keys)
        check_pipeline(pipe)
        call = recommended(pipe) | (call or {})
        advised = call.pop("num_inference_steps", None)
        check_call(pipe, call)
        defaults = inspect.signature(type(pipe).__call__).parameters
        self.steps = int(num_inference_steps or advised or defaults["num_inference_steps"].default)
        self.guidance_scale = float(call.get("guidance_scale", defaults["guidance_scale"].default))
        self.user, self.call, self.given = pipe, call, latents
        self.embedded = is_embedded(pipe)
        self.decoder = vae_decoder(pipe) if decode else None
        self.shadow = copy.copy(pipe)
        self._control = _SegmentControl(self, self.shadow)
        self.shadow.scheduler = install(pipe.scheduler, self._control)
        self.shadow._progress_bar_config = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
        self._denoisers = [m for m in (getattr(pipe, n, None) for n in ("unet", "transformer")) if m is not None]
        self._watch = Watch(self.ledger, keep=True)
        self._outputs: list[Tensor] = []
        self.interrupted = self._stopped = False  # by a user's callback
        self._device = pipe._execution_device  # asked once: it walks through all modules
        self._probe_grid()
        with torch.no_grad():
            self._embed(negative_prompt)

    def _probe_grid(self) -> None:
        """Walk into the grid once, to know its levels before any work is done."""
        scheduler, device, config = self.shadow.scheduler, self._device, self.user.unet.config
        custom = {k: self.call[k] for k in ("timesteps", "sigmas") if self.call.get(k) is not None}
        self._grid_call = custom or {"num_inference_steps": self.steps}
        try:
            scheduler.set_timesteps(device=device, **self._grid_call)
        except (TypeError, ValueError) as error:
            raise DiffsteerError(f"{type(self.user.scheduler).__name__}: {error}") from error
        self.steps = len(scheduler.timesteps)
        self.levels = scheduler.levels if self.eta else []
        self._noise_scale = float(scheduler.own_init_noise_sigma)
        tall, wide = config.sample_size if isinstance(config.sample_size, (list, tuple)) else (config.sample_size,) * 2
        height, width = self.call.get("height"), self.call.get("width")
        factor = self.user.vae_scale_factor
        self.shape = (config.in_channels, height // factor if height else tall, width // factor if width else wide)

    def _embed(self, negative_prompt: str | Sequence[str] | None) -> None:
        pipe, guided = self.user, is_guided(self.user, self.call)
        if negative_prompt is None or isinstance(negative_prompt, str):
            negatives: list[Any] = [negative_prompt] * len(self.prompts)
        else:
            negatives = list(negative_prompt)
        if len(negatives) != len(self.prompts):
            raise DiffsteerError(f"{len(negatives)} negative prompts for {len(self.prompts)} prompts; give one, or one each")
        lora_scale = (self.call.get("cross_attention_kwargs") or {}).get("scale")
        options = {"lora_scale": lora_scale, "clip_skip": self.call.get("clip_skip")}
        known: dict[tuple[str, Any], tuple[Tensor, Tensor | None]] = {}
        for pair in zip(self.prompts, negatives, strict=True):
            if pair not in known:
                known[pair] = pipe.encode_prompt(pair[0], self._device, 1, guided, negative_prompt=pair[1], **options)
        found = [known[pair] for pair in zip(self.prompts, negatives, strict=True)]
        self.embeds = torch.cat([f[0] for f in found])
        self.negatives = torch.cat([f[1] for f in found if f[1] is not None]) if guided else None

    def guidance(self) -> tuple[Tensor, Tensor]:
        """The unconditional and the conditional output of the last block's last step, before they were mixed, (N, ...) each."""
        return guidance_parts(self._outputs, self.shadow.scheduler.prediction, self.guidance_scale)

    def noise(self, rows: Sequence[int] | None = None) -> Tensor:
        """Keyed first states; the given `latents`, scaled as the pipeline scales them, where there are any."""
        if self.given is None:
            return super().noise(rows)
        if len(self.given) != self.rows:
            raise DiffsteerError(f"latents have {len(self.given)} rows; {self.rows} are needed, prompt-major")
        return self._scale_noise(self.given if rows is None else self.given[list(rows)])

    def _scale_noise(self, noise: Tensor) -> Tensor:
        return (noise * self._noise_scale).to(self._device, self.embeds.dtype)

    def segment(self, x: Tensor, start: int, stop: int, rows: Sequence[int] | None = None) -> Arrival:
        """As in `Session`. Once a user's callback has interrupted the pipeline, later segments leave the states as they are.

        Raises:
            UnsupportedError: a part of the grid with eta = 0: the user's own solver may have a history, which a cut would lose.
        """
        if self.interrupted:
            return Arrival(x, x)
        if not self.eta and (start, stop) != (0, self.steps):
            name = type(self.user.scheduler).__name__
            raise UnsupportedError(
                f"eta=0 steps with {name} itself, which runs from 0 to {self.steps} only, not {start} to {stop}"
            )
        self._stopped = False
        arrival = super().segment(x, start, stop, rows)
        self.interrupted = self._stopped
        return arrival

    def walk(self, select: Selection) -> Tensor:
        """As in `Session`; with a user's callback and one block of rows it is one call, selection happening inside `step`,
        so that whatever the callback changes lasts."""
        whole = self.chunk is None or (self.chunk >= self.rows and not self.deterministic)
        if self.call.get("callback_on_step_end") is None or not whole:
            return super().walk(select)
        self._control.select = select
        try:
            x = self.segment(self.noise(), 0, self.steps).x
        finally:
            self._control.select = None
        for event in select.events[len(select.infos) :]:  # the callback stopped the run before
            x = select(event, x, x)
        return x

    def _segment(self, x: Tensor, start: int, stop: int, rows: Sequence[int]) -> Arrival:
        prompts = [r // self.particles for r in rows]
        call = {**self.call, **self._grid_call, "prompt_embeds": self.embeds[prompts], "latents": x, "output_type": "latent"}
        if self.negatives is not None:
            call["negative_prompt_embeds"] = self.negatives[prompts]
        # our transition draws by key; a user's own stochastic step draws from these, a stream for each row
        call["generator"] = [rng.generator(self.seed, *self.key(r), start, "native") for r in rows]
        if call.get("callback_on_step_end") is not None and (start, stop) != (0, self.steps):
            call |= _only_latents(call["callback_on_step_end"])
        control = self._control
        control.start, control.stop, control.rows, control.x0 = start, stop, rows, x
        with watching(self._watch, *self._denoisers):
            out = self.shadow(**call).images
        self._stopped |= bool(self.shadow._interrupt)
        return Arrival(out, control.x0)


def _only_latents(callback: Any) -> dict[str, Any]:
    """A user's callback for a segment: the next segment would not know what it changes beside the latents."""

    def watched(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        before, scale = dict(tensors), pipe._guidance_scale
        returned = callback(pipe, index, timestep, tensors)
        changed = [name for name, v in (returned or {}).items() if name != "latents" and v is not before.get(name)]
        changed += ["guidance_scale"] if pipe._guidance_scale != scale else []
        if changed:
            raise UnsupportedError(
                f"callback_on_step_end changes {changed[0]}, which does not last in a run in blocks of rows: "
                "leave chunk and deterministic out"
            )
        return returned

    own = getattr(callback, "tensor_inputs", None)  # of diffusers' own callback classes
    return {"callback_on_step_end": watched} | ({} if own is None else {"callback_on_step_end_tensor_inputs": own})


def grid_length(pipe: Any, steps: int, eta: float | None) -> int:
    """How often a call with so many steps evaluates the denoiser for a row: more than `steps` for solvers with inner steps."""
    if eta:
        return DiffusersSession(pipe, [""], particles=1, seed=0, num_inference_steps=steps, eta=eta).steps
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


class _SegmentControl:
    """What the scheduler of a session's shadow asks: the segment in hand."""

    unit_noise = True

    def __init__(self, session: DiffusersSession, shadow: Any) -> None:
        self.session, self.pipe = session, shadow
        self.start, self.stop = 0, session.steps
        self.rows: Sequence[int] = []
        self.x0: Tensor = torch.empty(0)
        self.select: Selection | None = None

    @property
    def eta(self) -> float | None:
        return self.session.eta

    def begin(self, scheduler: Any) -> None:
        """A call of the pipeline has set its grid."""

    def noise(self, index: int, sample: Tensor, generator: Any) -> Tensor:
        return self.session.step_noise(self.rows, index)

    def arrived(self, index: int, total: int, x: Tensor, x0: Tensor, generator: Any) -> Tensor:
        self.x0 = x0
        self.session._outputs = self.session._watch.take()
        if self.select is not None and index + 1 in self.select.events:
            x = self.select(index + 1, x, x0)
        return x
