"""The drop-in form: a steered scheduler put on a pipeline by hand.

pipe.scheduler = steered(pipe.scheduler, FeynmanKac(particles=4), reward=ClipScore(), decoder=pipe, prompts=prompts)
images = pipe(prompts, num_images_per_prompt=4).images
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffsteer import rng
from diffsteer.algebra import noise_std
from diffsteer.blocks import Blocks, Size, check_size
from diffsteer.control import Control, check_noise
from diffsteer.families import family_of
from diffsteer.grids import check_schedule
from diffsteer.ledger import Ledger
from diffsteer.particles import reindex
from diffsteer.reward import Reward, RewardFunction, as_reward, prepare
from diffsteer.scheduler import install
from diffsteer.schedules import Schedule, as_schedule
from diffsteer.selection import Scorer, Selection, check_inputs, choose
from diffsteer.types import Context, DiffsteerError, Problem, Sampler, Trace, UnsupportedError


def steered(
    scheduler: Any,
    sampler: Sampler | None,
    *,
    reward: Reward | RewardFunction | None = None,
    decoder: Any = "none",
    prompts: str | Sequence[str] = (),
    ids: Sequence[int | str] | None = None,
    choice: Reward | RewardFunction | None = None,
    output: str = "best",
    chunk: Size = None,
    seed: int | None = None,
    noise: str = "eta",
    schedule: Schedule | None = None,
) -> Any:
    """A scheduler of the user's own class that steers whatever pipeline it is put on.

    Selection happens inside `step`, so the pipeline must make K images a prompt, prompt-major (``num_images_per_prompt=K``).
    All of them come back, each group's chosen particle first. After a run `scheduler.steering` has `trace`, `rewards`,
    `log_weights`, `log_z` and `ledger` (decodes and reward calls; the denoiser's rows are the pipeline's), in the order of the
    images. The `generator` given to the pipeline is the key of the randomness (its `initial_seed`; of a list, all together),
    where the pipeline hands it to `step`; most flow pipelines do not, and want `seed`, or draw a key from torch's own stream.
    The pipeline's `eta` argument is not used, the sampler's own is.

    Args:
        scheduler: the pipeline's own; it is copied, not changed.
        sampler: a method of `diffsteer.samplers`; None gives a scheduler that only delegates.
        reward, choice, output: as for `SteeredPipeline`.
        decoder: the pipeline, whose VAE then decodes; a callable latents -> samples; or "none" to score latents. Packed latents
            (Flux, Qwen-Image, LTX) do not tell their height and width: where these are not the pipeline's default, give
            ``decoder_of(pipe, height=..., width=...)``; so with the seconds of sounds.
        prompts: P prompts, since `step` never sees them.
        ids: one a prompt; default: its index.
        chunk: at most so many rows in the decoder and the reward at a time.
        seed: the key of the randomness of every run, whatever generator comes.
        noise: what the sampler's eta is a share of, as for `SteeredPipeline`.
        schedule: walked, with as many steps, in the place of the grid that the pipeline asks for.

    Raises:
        UnsupportedError: a scheduler that has no one-step transition; a method with gradients, or with levels of its own.
        DiffsteerError: no prompts, no reward, or (when it runs) a number of rows that is not prompts x particles.
    """
    return install(scheduler, Steering(sampler, reward, decoder, prompts, ids, choice, output, chunk, seed, noise, schedule))


class Steering(Control):
    """The control of a drop-in scheduler, and the record of its last run."""

    def __init__(
        self,
        sampler: Any,
        reward: Any,
        decoder: Any,
        prompts: Any,
        ids: Any,
        choice: Any,
        output: str,
        chunk: Size,
        seed: int | None,
        noise: str,
        schedule: Schedule | None,
    ) -> None:
        check_noise(noise)
        for what in ("guidance", "timing"):
            if hasattr(sampler, what):
                raise UnsupportedError(
                    f"steered(): {sampler.name} needs the model, which a scheduler does not see: give it to a SteeredPipeline"
                )
        self.noise_kind, self.schedule = noise, as_schedule(schedule)
        check_schedule(self.schedule, sampler is not None, "own")
        self.sampler, self.output = sampler, output
        self.eta = None if sampler is None else sampler.eta
        self.seed = self.given_seed = seed
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.ids = tuple(range(len(self.prompts)) if ids is None else ids)
        if sampler is not None and not self.prompts:
            raise DiffsteerError("steered(): give prompts=, since a scheduler's step never sees them")
        if output not in ("best", "draw"):
            raise DiffsteerError(f"steered(): output={output!r} is unknown; valid: best, draw (all rows return anyway)")
        if len(self.ids) != len(self.prompts) or len(set(self.ids)) != len(self.ids):
            raise DiffsteerError(f"steered(): {len(self.prompts)} prompts need as many distinct ids, not {list(self.ids)}")
        if sampler is not None and reward is None:
            raise DiffsteerError(f"steered(): the sampler {sampler.name} selects by a reward: give reward=")
        self.decoder = decoder
        self.decode, self.embedded = _decoder(decoder)
        seen = "latents" if self.decode is None else "pixels"
        self.reward = None if reward is None else as_reward(reward, seen)
        self.choice = None if choice is None else as_reward(choice, seen)
        self.pipe_of_decoder = _pipe_of(decoder)
        made = family_of(self.pipe_of_decoder)
        check_inputs(self.decode is not None, self.reward, self.choice, makes=made.makes if made else "")
        check_size(chunk)
        self.chunk = chunk
        self.selection: Selection | None = None
        self.trace, self.ledger = Trace(), Ledger()  # of the last run
        self.rewards = self.log_weights = torch.empty(len(self.prompts), 0, dtype=torch.float64)
        self.log_z = torch.empty(0, dtype=torch.float64)

    def begin(self, scheduler: Any) -> None:
        """A new run."""
        self.scheduler, self.selection, self.seed, self.skipped = scheduler, None, self.given_seed, 0

    def noise(self, index: int, sample: Tensor, generator: Any) -> Tensor:
        """The keyed noise of one transition, (N, ...)."""
        self._open(index, len(sample), generator)
        return rng.normal(*self.keys(), index - self.skipped, "step", sample.shape[1:])

    def keys(self) -> tuple[int, list[tuple[rng.Id, int]]]:
        assert self.seed is not None
        return self.seed, [(id, k) for id in self.ids for k in range(self.sampler.particles)]

    def arrived(self, index: int, total: int, x: Tensor, x0: Tensor, generator: Any) -> Tensor:
        """A transition was made: select, and at the end put the chosen ones first."""
        if self.sampler is None:
            return x
        selection, done = self._open(index, len(x), generator), index + 1 - self.skipped
        if done not in selection.events:
            return x
        x = selection(done, x, x0)
        self.moved = selection.moved
        return self._finish(selection, x) if index + 1 == total else x

    def _open(self, index: int, rows: int, generator: Any) -> Selection:
        """The run's selection, made at its first step; before that an image-to-image pipeline has skipped part of the grid."""
        if self.selection is not None:
            return self.selection
        self.seed = rng.seed_of(generator) if self.seed is None else self.seed
        self.skipped, total = index, len(self.scheduler.timesteps) - index
        wanted = len(self.prompts) * self.sampler.particles
        if rows != wanted:
            raise DiffsteerError(
                f"{len(self.prompts)} prompt(s) x {self.sampler.particles} particles are {wanted} rows, "
                f"but the pipeline has {rows}: "
                f"call it with the same prompts and num_images_per_prompt={self.sampler.particles}"
            )
        self.ledger = Ledger().open()
        for reward in (self.reward, self.choice):
            if reward is not None:
                prepare(reward, self.prompts, Context(0, total, self.embedded))
        levels = getattr(self.scheduler, "levels", [])[index:]
        noise = self.noise_kind
        noisy = [
            k
            for k, (a, b) in enumerate(zip(levels, levels[1:], strict=False))
            if float(noise_std(a, b, self.eta or 0.0, noise)) > 0
        ]
        problem = Problem(len(self.prompts), total, max(noisy, default=-1), self.seed, self.ids)
        scorer = Scorer(self.reward, self.decode, self.prompts, self.ledger, self.embedded, Blocks(self.chunk))
        self.selection = Selection(self.sampler, problem, scorer)
        if len(self.selection.events) > 1 and self.pipe_of_decoder is not None:
            from diffsteer.pipes import refuse_caches

            refuse_caches(self.pipe_of_decoder)
        return self.selection

    def _finish(self, selection: Selection, x: Tensor) -> Tensor:
        rewards, log_weights = selection.infos[-1].rewards, selection.state.log_weights
        assert selection.samples is not None
        total = selection.problem.steps
        deciding = rewards if self.choice is None else selection.scorer.score(selection.samples, total, total, self.choice)
        chosen = choose(self.output, deciding, log_weights, selection.problem.seed, self.ids)
        order = torch.arange(rewards.shape[1]).repeat(len(rewards), 1)
        order = torch.stack(
            [torch.cat([row[c : c + 1], row[:c], row[c + 1 :]]) for row, c in zip(order, chosen.tolist(), strict=True)]
        )
        self.moved = order if self.moved is None else self.moved.gather(1, order.to(self.moved.device))
        self.rewards, self.log_weights = reindex((rewards, log_weights), order)
        self.log_z, self.trace = selection.state.log_z, Trace(tuple(selection.infos))
        self.ledger.close()
        return reindex(x.view(*rewards.shape, *x.shape[1:]), order).flatten(0, 1)


def _pipe_of(decoder: Any) -> Any:
    """The pipeline that decodes: itself, or by `decoder_of`."""
    if isinstance(decoder, partial) and decoder.args:
        decoder = decoder.args[0]
    return decoder if hasattr(decoder, "scheduler") else None


def _decoder(decoder: Any) -> tuple[Callable[[Tensor], Tensor] | None, bool]:
    if decoder is None or (isinstance(decoder, str) and decoder == "none"):
        return None, False
    if hasattr(decoder, "scheduler"):
        from diffsteer.pipes import decoder_of
        from diffsteer.shapes.models import is_embedded

        inner = decoder_of(decoder)

        def decode(latents: Tensor) -> Tensor:
            try:
                return inner(latents)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                shape, name = tuple(latents.shape), type(decoder).__name__
                raise DiffsteerError(
                    f"steered(): latents of shape {shape} do not fit the default size of {name} ({error}); "
                    "give the size: decoder=decoder_of(pipe, height=..., width=...)"
                ) from error

        return decode, is_embedded(decoder)
    if callable(decoder):
        pipe = _pipe_of(decoder)
        if pipe is None:
            return decoder, False
        from diffsteer.shapes.models import is_embedded

        return decoder, is_embedded(pipe)
    raise DiffsteerError(f'decoder={decoder!r}; valid: the pipeline, a callable latents -> samples, or "none"')
