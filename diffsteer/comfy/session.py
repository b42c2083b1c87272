"""A session over ComfyUI's model: what a sampler function of its is given, as the primitive of the core."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffsteer.algebra import Level, level, transition
from diffsteer.blocks import Size
from diffsteer.hooks import Watch, watching
from diffsteer.particles import reindex
from diffsteer.selection import Selection
from diffsteer.session import Arrival, Session
from diffsteer.types import DiffsteerError, UnsupportedError


def path_of(model_sampling: Any) -> str:
    """ "flow" where ``x = (1 - sigma) x0 + sigma eps``, "edm" where ``x = x0 + sigma eps`` (all others of ComfyUI).

    Raises:
        UnsupportedError: a model that is given no noise to take away.
    """
    names = {cls.__name__ for cls in type(model_sampling).__mro__}
    if "IMG_TO_IMG" in names:
        raise UnsupportedError("this model turns pictures into pictures without any noise: there is nothing to steer")
    return "flow" if "CONST" in names else "edm"


def levels_of(path: str, sigmas: Tensor) -> list[Level]:
    """The levels of SIGMAS (T + 1,).

    Raises:
        DiffsteerError: sigmas that do not fall.
    """
    values = sigmas.cpu().double()  # some accelerators have no float64
    if bool((values[1:] >= values[:-1]).any()):
        raise DiffsteerError(f"the sigmas must fall from step to step; these are {[round(float(s), 4) for s in values]}")
    return [level(1 - s, s) if path == "flow" else level(1.0, s) for s in values]


class ComfySession(Session):
    """One run of a SAMPLER. Rows are the latent batch: P images with K particles each, image-major.

    The states are those that ComfyUI made of its noise and its latent; the model gives clean estimates, guidance, ControlNet
    and masks included. With the whole batch at a time (`chunk` None) a step is one call of the model.

    Args:
        model, x, sigmas, extra_args, callback: as ComfyUI hands them to a sampler function.
        decoder: states (N, *shape) -> samples, None for rewards on latents.
        stop_if_interrupted: called before each step and raises if the user wants an end.

    Raises:
        DiffsteerError: a batch that is no multiple of the particles, sigmas that do not fall, or conditions that differ from
            row to row, which cannot follow particles.
    """

    def __init__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[[dict[str, Any]], None] | None,
        *,
        prompt: str,
        particles: int,
        eta: float,
        noise: str,
        chunk: Size,
        decoder: Callable[[Tensor], Tensor] | None,
        stop_if_interrupted: Callable[[], None],
    ) -> None:
        groups, rest = divmod(len(x), particles)
        if rest:
            raise DiffsteerError(
                f"a latent batch of {len(x)} is no number of images with {particles} particles each: "
                f"set its batch_size to {particles} or a multiple, or particles to 0 (the whole batch)"
            )
        super().__init__([prompt] * groups, particles, int(extra_args.get("seed") or 0), eta=eta, noise=noise, chunk=chunk)
        self.guider = model.inner_model
        self.inner = self.guider.inner_model
        self.levels = levels_of(path_of(self.inner.model_sampling), sigmas)
        self.steps, self.shape, self.decoder = len(sigmas) - 1, tuple(x.shape[1:]), decoder
        self.model, self.first, self.sigmas, self.extra_args = model, x, sigmas, extra_args
        self.callback, self.stop_if_interrupted = callback, stop_if_interrupted
        self.embedded = bool(getattr(self.inner, "diffsteer_embedded", False))
        self.origin = torch.arange(len(x))  # which row of the batch each particle descends from
        self.clean = x  # the last clean estimates, (N, *shape)
        if "SVD_img2vid" in {cls.__name__ for cls in type(self.inner).__mro__} and particles > 1:
            raise UnsupportedError("the rows of this model's batch are the frames of one video: set particles to 1")
        if particles > 1 or (isinstance(chunk, int) and chunk < len(x)):
            _refuse_rows_apart(getattr(self.guider, "conds", {}))

    def noise(self, rows: Sequence[int] | None = None) -> Tensor:
        """The states that ComfyUI made, (N, *shape)."""
        return self.first if rows is None else self.first[list(rows)]

    def walk(self, select: Selection) -> Tensor:
        """As in the core, step by step, so that progress, previews and interrupts come with each step. Where the sigmas end
        above 0 (a run in several parts), the clean estimates are what is scored at the end."""
        x = self.first
        network = getattr(self.inner, "diffusion_model", None)
        watched = [network] if isinstance(network, torch.nn.Module) else []
        with watching(Watch(self.ledger), *watched):
            for k in range(self.steps):
                self.stop_if_interrupted()
                arrival = self.segment(x, k, k + 1)
                x, self.clean, last = arrival.x, arrival.x0, k + 1 == self.steps
                if self.callback is not None:
                    sigma = self.sigmas[k]
                    self.callback({"x": x, "i": k, "sigma": sigma, "sigma_hat": sigma, "denoised": arrival.x0})
                if k + 1 in select.events:
                    selected = select(k + 1, arrival.x0 if last else x, arrival.x0)
                    x = x if last else selected
                    self.follow(select.ancestors, k + 1)
        return x

    def follow(self, ancestors: Tensor, index: int) -> None:
        self.origin = reindex(self.origin.view(ancestors.shape), ancestors).flatten()

    def _segment(self, x: Tensor, start: int, stop: int, rows: Sequence[int]) -> Arrival:
        model, extra_args = self._for_rows(rows)
        x0 = x
        for k in range(start, stop):
            at, to = self.levels[k], self.levels[k + 1]
            self.stop_if_interrupted()
            before = self.ledger.evaluations
            x0 = model(x, self.sigmas[k] * x.new_ones(len(x)), **extra_args)
            if self.ledger.evaluations == before:  # no network that hooks could count
                self.ledger.forwards += 1
                self.ledger.evaluations += len(x)
            alpha, sigma = at.like(x)
            eps = (x - alpha * x0) / sigma
            x = transition(x0, eps, at, to, self.eta, self.step_noise(rows, k).to(x), self.noise_kind)
        return Arrival(x, x0)

    def _scale_noise(self, noise: Tensor) -> Tensor:
        return noise * self.levels[0].sigma.to(noise.dtype)

    def _for_rows(self, rows: Sequence[int]) -> tuple[Any, dict[str, Any]]:
        """The model and the arguments for some rows. What ComfyUI holds of each row to inpaint goes where its particle does."""
        mask = self.extra_args.get("denoise_mask")
        if mask is None:
            return self.model, self.extra_args
        origin, model = self.origin[list(rows)], copy.copy(self.model)
        for name in ("latent_image", "noise"):
            setattr(model, name, _rows(getattr(model, name), origin))
        return model, {**self.extra_args, "denoise_mask": _rows(mask, origin)}


def _rows(held: Tensor, origin: Tensor) -> Tensor:
    return held[origin.to(held.device)] if len(held) > 1 else held


def _refuse_rows_apart(conds: dict[str, Any]) -> None:
    for cond in (c for listed in conds.values() for c in listed):
        held: list[Any] = [cond.get("mask")]
        for value in cond.get("model_conds", {}).values():
            inside = getattr(value, "cond", None)
            held += inside if isinstance(inside, list) else [inside]
        control = cond.get("control")
        while control is not None:
            held.append(getattr(control, "cond_hint_original", None))
            control = getattr(control, "previous_controlnet", None)
        for value in held:
            if isinstance(value, Tensor) and len(value) > 1 and not bool((value == value[:1]).all()):
                raise UnsupportedError(
                    f"a condition has {len(value)} different rows, but the rows of the latent batch are particles of one image "
                    "and share their conditions: give one prompt, and one hint, a run"
                )
