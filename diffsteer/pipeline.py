"""The Python face: `SteeredPipeline` around a diffusers pipeline or a `CallableModel`, and `load_pipeline`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffsteer import rng
from diffsteer.blocks import Size, check_size
from diffsteer.budget import Budget
from diffsteer.callable import CallableModel, CallableSession
from diffsteer.control import check_noise
from diffsteer.draft import Draft, draft_of, on_grid
from diffsteer.grids import check_schedule, explicit
from diffsteer.guidance import guidance_of
from diffsteer.holdout import holdouts_of
from diffsteer.ledger import Ledger
from diffsteer.loading import load_pipeline as load_pipeline
from diffsteer.reward import Reward, RewardFunction, as_reward, check_gradient
from diffsteer.run import OUTPUTS, SteeredOutput, begin
from diffsteer.schedules import Given, Schedule, as_schedule
from diffsteer.start import NoiseTransform
from diffsteer.trial import Search
from diffsteer.types import DiffsteerError, Info, Sampler, check_numbers

if TYPE_CHECKING:
    from diffsteer.session import Session

DECODERS = ("full", "tiny", "none")
TRANSITIONS = ("own", "native")


def check_effect(transition: str, noise: str, steered: bool) -> None:
    """Refuse settings that nothing would read.

    Raises:
        DiffsteerError: an amount of noise for the user's own solver; a transition or a noise without a sampler.
    """
    if transition == "native" and noise != "eta":
        raise DiffsteerError(f"noise={noise} has no effect with transition=native: the solver draws what it draws")
    if not steered and (transition, noise) != ("own", "eta"):
        raise DiffsteerError(f"transition={transition}, noise={noise} have no effect without a sampler")


class SteeredPipeline:
    """Any supported pipeline, steered. The pipeline that is given is never changed.

    Args:
        pipe: a diffusers pipeline (`UnsupportedError` names those that cannot be steered), or a `CallableModel`.
        sampler: a method of `diffsteer.samplers`; None runs the pipeline as it is, all prompts in one call, with its own
            randomness: `chunk`, `deterministic` and `ids` then have no effect.
        reward: a `Reward`, or a callable ``r(samples (N, ...), prompts) -> (N,)``; may be missing only for None and `BestOfN`.
        choice: another reward for the final choice alone (``output="best"``); the weights stay those of `reward`.
        holdout: a reward, several, or a mapping of names to them, that look on and never steer: `SteeredOutput.held_out`. A
            warning tells when the choice raises `reward` and lowers one of them.
        decoder: "full" scores decoded samples; "tiny" (or "tiny:PATH", a folder or hub id) decodes those on the way with a tiny
            autoencoder and only the final ones in full; "none" scores latents and makes no images.
        output: "best" | "draw" | "all", see `SteeredOutput`.
        chunk: at most so many rows in the denoiser, the decoder and the reward at a time; None for all at once; "auto" halves
            that when memory runs out, and says so once.
        experts: weights of several texts a prompt, which is then a tuple of as many: their predictions are mixed at every step.
        transition: "own" is diffsteer's, with the noise that the sampler's eta says; "native" steps with the user's own
            stochastic scheduler (DDIM, DDPM, Euler ancestral, LCM, TCD, SDE-DPM-Solver++), its noise keyed.
        noise: what the sampler's eta is a share of: "eta", DDPM's posterior noise, or "quadratic", g(t) = 3 t^2 for flows.
        deterministic: bits that depend neither on the number of prompts nor on what else runs; see `Session`.
        guide: gradient guidance on the way, a `Guidance` or a method that has one (`MPGD()`), beside a sampler that selects.
            Weighted particles keep their target: their weights know what was moved.
        start: what is done to the first noise, such as `diffsteer.start.ReferenceNoise`.
        budget: what a search may spend; without one it spends what its own parameters say.
        draft: of a search: what it runs on before the best few are made in full; None is the search's own default, False none.
        looks: keep small pictures of what the reward is shown at each event, of at most so many pixels a side: `Trace.looks`.
        schedule: where to put the steps, of `diffsteer.schedules` or falling ratios sigma / alpha, in the place of the
            pipeline's own grid. All steps are then diffsteer's transition, with eta = 0 too (first order).
    """

    def __init__(
        self,
        pipe: Any,
        sampler: Sampler | Search | None = None,
        reward: Reward | RewardFunction | None = None,
        *,
        choice: Reward | RewardFunction | None = None,
        holdout: Any = None,
        decoder: str = "full",
        output: str = "best",
        chunk: Size = None,
        deterministic: bool = False,
        experts: Sequence[float] = (1.0,),
        transition: str = "own",
        noise: str = "eta",
        guide: Any = None,
        start: NoiseTransform | None = None,
        schedule: Schedule | Sequence[float] | None = None,
        budget: Budget | None = None,
        draft: Draft | bool | None = None,
        looks: int = 0,
    ) -> None:
        check_noise(noise)
        if transition not in TRANSITIONS:
            raise DiffsteerError(f"transition={transition!r} is unknown; valid: {', '.join(TRANSITIONS)}")
        if decoder not in DECODERS and not decoder.startswith("tiny:"):
            raise DiffsteerError(f"decoder={decoder!r} is unknown; valid: {', '.join(DECODERS)}")
        check_effect(transition, noise, sampler is not None)
        if decoder == "tiny" and not isinstance(pipe, CallableModel):
            from diffsteer.pipes import refuse_tiny

            refuse_tiny(pipe)
        if output not in OUTPUTS:
            raise DiffsteerError(f"output={output!r} is unknown; valid: {', '.join(OUTPUTS)}")
        if sampler is not None and (isinstance(sampler, type) or not isinstance(sampler, Sampler | Search)):
            raise DiffsteerError(f"sampler is an object, such as FeynmanKac(4), or None, not {sampler!r}")
        latent = decoder == "none" or (isinstance(pipe, CallableModel) and pipe.decode is None)
        seen = "latents" if latent else "pixels"
        self.pipe, self.sampler, self.decoder, self.output = pipe, sampler, decoder, output
        self.reward = None if reward is None else as_reward(reward, seen)
        self.choice = None if choice is None else as_reward(choice, seen)
        self.holdouts = holdouts_of(holdout, seen)
        check_size(chunk, deterministic)
        self.schedule = as_schedule(schedule)
        check_schedule(self.schedule, sampler is not None, transition)
        self.transition, self.noise, self.looks = transition, noise, looks
        self.guide, self.start = guidance_of(guide, sampler), start
        self.budget, self.draft = budget, None
        if isinstance(sampler, Search):
            if transition == "native":
                raise DiffsteerError(f"{sampler.name} goes with no solver that draws noise of its own: leave transition out")
            from diffsteer.search_run import check_search

            self.draft = draft_of(draft, sampler)
            self.reward = check_search(sampler, self.reward, self.guide, self.draft)
        elif budget is not None or draft:
            raise DiffsteerError(f"{'budget' if budget else 'draft'}= has no effect: the sampler is no search")
        if start is not None and sampler is None:
            raise DiffsteerError(
                "what begins from other noise (start=, reference_share=) wants a sampler, whose noise is keyed: "
                "BestOfN(1, eta=0) is the plain chain"
            )
        self.chunk, self.deterministic, self.experts = chunk, deterministic, tuple(experts)
        if self.reward is not None and (self.guide is not None or (sampler is not None and sampler.needs_grad)):
            check_gradient(self.reward)
        if sampler is not None and sampler.needs_reward and self.reward is None:
            raise DiffsteerError(f"the sampler {sampler.name} selects by a reward: give reward=")

    def __call__(
        self,
        prompts: str | Sequence[Any],
        *,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        ids: Sequence[int | str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        latents: Tensor | None = None,
        reward_prompts: Sequence[str] | None = None,
        watch: Callable[[Info], None] | None = None,
        **call: Any,
    ) -> SteeredOutput:
        """Generate.

        Args:
            prompts: one or P of them.
            seed: the key of all randomness; ``seed=n`` is the generator seeded with n, a list of generators is one key
                together. Without either a seed is drawn from torch's own stream.
            ids: one id a prompt, which keys its noise; default: its index. A prompt and its id give the same in any batch.
            negative_prompt: one for all, or P.
            latents: first states, (P * K, C, h, w), prompt-major, as the pipeline takes them.
            reward_prompts: P texts for the reward, where it is to ask for something else than the prompts say.
            watch: called with the `Info` of each event, or with a search's `Progress` once a round.
            call: the pipeline's own arguments (guidance_scale, height, callback_on_step_end, ...). Embedded models bring
                the guidance scale and the steps that are best for them as defaults.

        Raises:
            DiffsteerError: an argument that the pipeline does not take, and what is valid.
        """
        told: dict[str, Any] = {"num_inference_steps": num_inference_steps, "seed": seed, "generator": generator, "ids": ids}
        told |= {"negative_prompt": negative_prompt, "latents": latents, "reward_prompts": reward_prompts, "watch": watch}
        return self.begin(prompts, **told, **call)()

    def begin(
        self,
        prompts: str | Sequence[Any],
        *,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        ids: Sequence[int | str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        latents: Tensor | None = None,
        reward_prompts: Sequence[str] | None = None,
        watch: Callable[[Info], None] | None = None,
        **call: Any,
    ) -> Callable[[], SteeredOutput]:
        """As a call with the same arguments, up to the last states. What is returned decodes and scores them and gives the
        output; in another thread it can do so while this one denoises what comes next. (Not where parts of a pipeline take
        turns on a device, as with offloading, and not beside a run that decodes on its way. A search does all of its work
        here.)"""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise DiffsteerError("no prompts: give at least one")
        if len(self.experts) > 1 and (self.sampler is None or reward_prompts is None):
            raise DiffsteerError("several experts want a sampler, and reward_prompts= to tell the reward what to ask for")
        asked = prompts if reward_prompts is None else list(reward_prompts)
        if len(asked) != len(prompts):
            raise DiffsteerError(f"{len(asked)} reward_prompts for {len(prompts)} prompts; give one each")
        if seed is not None and generator is not None:
            raise DiffsteerError("give seed= or generator=, not both")
        schedule, call = explicit(self.pipe, self.schedule, call, self.sampler is not None, self.transition)
        if isinstance(schedule, Given) and num_inference_steps is None:
            num_inference_steps = len(schedule.values)
        given = {"num_inference_steps": num_inference_steps, "seed": seed}
        check_numbers("", {name: value for name, value in given.items() if value is not None})
        if num_inference_steps is not None and num_inference_steps < 1:
            raise DiffsteerError(f"num_inference_steps={num_inference_steps}; at least 1 is needed")
        if seed is not None and not 0 <= seed < 2**63:
            raise DiffsteerError(f"seed={seed}; it lies in [0, 2^63)")
        key = rng.seed_of(generator) if seed is None else seed
        options: dict[str, Any] = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
        if self.sampler is None:
            stream = torch.Generator("cpu").manual_seed(key) if generator is None else generator
            from diffsteer.plain import begin_plain

            return begin_plain(self, prompts, asked, stream, negative_prompt, latents, options | call)
        keys: dict[str, Any] = {
            "particles": self.sampler.particles,
            "seed": key,
            "ids": ids,
            "eta": self.sampler.eta,
            "chunk": self.chunk,
            "deterministic": self.deterministic,
            "experts": self.experts,
            "noise": self.noise,
            "schedule": schedule,
            "own": self.own_transition(),
        }
        if isinstance(self.sampler, Search):
            told = {"negative_prompt": negative_prompt, "call": call}
            draft = on_grid(self.draft, schedule, call)
            found = self._searched(prompts, asked, keys, options, told, draft, latents, watch)
            return lambda: found
        if isinstance(self.pipe, CallableModel):
            if call or negative_prompt is not None or latents is not None:
                extra = [
                    *call,
                    *(["negative_prompt"] if negative_prompt else []),
                    *(["latents"] if latents is not None else []),
                ]
                raise DiffsteerError(f"a CallableModel takes no argument {extra[0]!r}")
            session: Session = CallableSession(self.pipe, prompts, **options, **keys)
            session.start = self.start
            toy = (self.output, self.choice, asked, None, watch, self.guide, self.holdouts, self.looks)
            return begin(session, self.sampler, self.reward, *toy)
        from diffsteer.backend import DiffusersSession
        from diffsteer.pipes import as_images

        session = DiffusersSession(
            self.pipe,
            prompts,
            negative_prompt=negative_prompt,
            latents=latents,
            decoder=self.decoder,
            transition=self.transition,
            start=self.start,
            call=call,
            **options,
            **keys,
        )
        to_images = partial(as_images, self.pipe)
        how = (self.output, self.choice, asked, to_images, watch, self.guide, self.holdouts, self.looks)
        return begin(session, self.sampler, self.reward, *how)

    def estimate(
        self,
        prompts: int = 1,
        num_inference_steps: int | None = None,
        *,
        rehearse: str | None = None,
        **call: Any,
    ) -> Ledger:
        """What a call with so many prompts will count.

        Args:
            call: the arguments of the call that decide what it costs (guidance_scale, negative_prompt, strength); others do
                no harm. Where one ends guidance on the way (cfg_trunc_ratio, cfg_truncation), fewer evaluations are counted.
            rehearse: a prompt to run two steps with, as often as fits a block of rows, which tells seconds and memory as well;
                without it they stay empty.
        """
        from diffsteer.forecast import forecast

        return forecast(self, prompts, num_inference_steps, rehearse, call)

    def _searched(
        self,
        prompts: list[Any],
        asked: list[str],
        keys: dict[str, Any],
        options: dict[str, Any],
        told: dict[str, Any],
        draft: Draft | None,
        latents: Tensor | None,
        watch: Callable[..., None] | None,
    ) -> SteeredOutput:
        """A search, over sessions of its own."""
        from diffsteer.search_run import run_search

        search, reward = self.sampler, self.reward
        assert isinstance(search, Search) and reward is not None
        if latents is not None:
            raise DiffsteerError(f"{search.name} searches for the first noise itself: leave latents= out")

        def make(
            steps: int | None = None,
            decoder: str | None = None,
            model: Any = None,
            call: Mapping[str, Any] | None = None,
            ledger: Ledger | None = None,
        ) -> Session:
            pipe = self.pipe if model is None else model
            grid = {} if model is None else {"schedule": None}  # another model's is its own
            mine = keys | {"ledger": ledger, "own": self.own_transition(pipe)} | grid
            length = {} if steps is None and model is not None else options if steps is None else {"num_inference_steps": steps}
            if isinstance(pipe, CallableModel):
                if told["call"] or told["negative_prompt"] is not None:
                    raise DiffsteerError(f"a CallableModel takes no argument {[*told['call'], 'negative_prompt'][0]!r}")
                made = CallableSession(pipe, prompts, **length, **mine)
                made.start = self.start
                return made
            from diffsteer.backend import DiffusersSession

            arguments: dict[str, Any] = told if model is None else {"call": dict(call or {})}
            arguments = arguments | {"decoder": decoder or self.decoder, "transition": self.transition, "start": self.start}
            return DiffusersSession(pipe, prompts, **arguments, **length, **mine)

        to_images = None
        if not isinstance(self.pipe, CallableModel):
            from diffsteer.pipes import as_images

            to_images = partial(as_images, self.pipe)
        found = (search, reward, self.budget, draft, asked, self.output, self.choice)
        return run_search(make, *found, to_images=to_images, watch=watch, holdouts=self.holdouts)

    def own_transition(self, pipe: Any = None) -> bool:
        """Is the transition ours at eta = 0, too? A method with levels of its own wants single steps, and solvers that cannot
        be cut have none; a search that goes on from states on the way wants one that remembers nothing, and every search a
        deterministic one.

        Args:
            pipe: another one than the pipeline that is steered, for drafts.
        """
        pipe = self.pipe if pipe is None else pipe
        searches = isinstance(self.sampler, Search)
        if isinstance(pipe, CallableModel) or not (searches or hasattr(self.sampler, "timing")):
            return False
        from diffsteer.levels import cut_state

        cuts = isinstance(self.sampler, Search) and self.sampler.cuts
        return self.transition == "own" and (cuts or cut_state(pipe.scheduler) is None)
