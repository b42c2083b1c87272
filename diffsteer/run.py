"""The loop: a sampler over a session, event by event, and what comes out of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsteer import media
from diffsteer.diversity import Diversity, diversity, features_of
from diffsteer.files import finite_all
from diffsteer.guidance import Guidance
from diffsteer.guided import GuidedWalk
from diffsteer.holdout import HeldOut, Selected, warn_of_drift
from diffsteer.ledger import Ledger
from diffsteer.reward import Reward, prepare
from diffsteer.selection import Scorer, Selection, check_inputs, choose
from diffsteer.session import Session
from diffsteer.timed import TimedWalk
from diffsteer.timing import Timing
from diffsteer.types import Context, DiffsteerError, Info, Problem, Sampler, Trace

OUTPUTS = ("best", "draw", "all")


@dataclass(frozen=True)
class SteeredOutput:
    """The result of a run over P prompts with K particles each.

    Attributes:
        samples: every particle, decoded, (P, K, ...); images are (3, H, W) in [0, 1]. Latents without a decoder.
        latents: every particle before decoding, (P, K, ...).
        rewards: of the samples, (P, K), by the reward that steered.
        log_weights: (P, K), summing to one in each group: together with `samples` the estimate of the target.
        log_z: (P,), log of the mean potential.
        chosen: the particle chosen for each prompt, (P,).
        images: PIL images, one a prompt, or with output="all" all of them, prompt-major; a video is a list of frames, a sound a
            `diffsteer.media.Sound`. None where nothing is decoded.
        trace, ledger: events, and cost.
        selected: what selection did to the reward, by prompt, and held_out: the rewards that looked on, by name; both only
            where there are some.
    """

    prompts: list[str]
    samples: Tensor
    latents: Tensor
    rewards: Tensor
    log_weights: Tensor
    log_z: Tensor
    chosen: Tensor
    images: list[Any] | None
    trace: Trace
    ledger: Ledger
    selected: Selected | None = None
    held_out: dict[str, HeldOut] = field(default_factory=dict)

    @property
    def interrupted(self) -> bool:
        """Is it the best so far of a search that Ctrl-C ended?"""
        return any(found.stopped == "interrupted" for found in self.trace.searches)

    @property
    def diversity(self) -> list[Diversity]:
        """Of each prompt's samples: how far apart they are, and how many different ones they amount to. Of pictures by their
        colours on a coarse grid (`diffsteer.diversity.features_of`)."""
        return [diversity(features_of(group)) for group in self.samples]

    def save(self, folder: str | Path, video: str = "gif") -> Path:
        """Write images (or videos, as GIF or MP4, or sounds), weights and trace into a folder (made if missing); return it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for i, made in enumerate(self.images or []):
            media.save(made, folder / f"{i:03d}{media.kind(made, video)[1]}")
        torch.save({"samples": self.samples, "latents": self.latents, "log_weights": self.log_weights}, folder / "particles.pt")
        record = {
            "prompts": self.prompts,
            "rewards": finite_all(self.rewards),
            "log_weights": finite_all(self.log_weights),
            "log_z": finite_all(self.log_z),
            "chosen": self.chosen.tolist(),
            "events": [
                {
                    "done": e.done,
                    "rewards": finite_all(e.rewards),
                    "ess": finite_all(e.ess),
                    "ancestors": e.ancestors.tolist(),
                    "resampled": e.resampled.tolist(),
                    "exponent": finite_all(e.exponent),
                }
                for e in self.trace.events
            ],
            "diversity": [d._asdict() for d in self.diversity],
            "searches": [found.facts() for found in self.trace.searches],
            "held_out": {name: told_of(h, self.selected) for name, h in self.held_out.items()},
            "ledger": self.ledger.as_dict(),
        }
        (folder / "run.json").write_text(json.dumps(record, indent=1, allow_nan=False))
        return folder


def told_aside(steered: Selected, aside: Mapping[str, Selected], scores: Mapping[str, Tensor]) -> dict[str, Any]:
    """What an output says of rewards that looked on; with a warning where the choice did them harm."""
    if not aside:
        return {}
    warn_of_drift(steered, aside)
    return {"selected": steered, "held_out": {name: HeldOut(scores[name], one) for name, one in aside.items()}}


def told_of(held: HeldOut, steered: Selected | None) -> dict[str, Any]:
    """What a record keeps of a reward that looked on."""
    told = {"scores": finite_all(held.scores), "gains": finite_all(held.selected.gains)}
    return told | ({} if steered is None else {"gains_of_the_reward": finite_all(steered.gains)})


def timing_of(sampler: Sampler | None, guide: Guidance | None) -> Timing | None:
    """The timing of a method that has one.

    Raises:
        DiffsteerError: gradient guidance beside it.
    """
    timing: Timing | None = getattr(sampler, "timing", None)
    if timing is not None and guide is not None:
        raise DiffsteerError(f"{getattr(sampler, 'name', 'the sampler')} goes with no gradient guidance: leave guide out")
    return timing


def run(session: Session, sampler: Sampler, reward: Reward | None, *how: Any, **more: Any) -> SteeredOutput:
    """Carry all rows from noise to clean, selecting at the sampler's events, and choose: `begin`, and what it returns."""
    return begin(session, sampler, reward, *how, **more)()


def begin(
    session: Session,
    sampler: Sampler,
    reward: Reward | None,
    output: str = "best",
    choice: Reward | None = None,
    asked: Sequence[str] | None = None,
    to_images: Callable[[Tensor], list[Any] | None] | None = None,
    watch: Callable[[Info], None] | None = None,
    guide: Guidance | None = None,
    holdouts: Mapping[str, Reward] | None = None,
    looks: int = 0,
) -> Callable[[], SteeredOutput]:
    """Carry all rows from noise to clean, selecting at the sampler's events but the last. What is returned does the rest: it
    decodes and scores what came of it and chooses, for which the denoiser is not needed, so that it may be done in another
    thread.

    Args:
        output: "best" by reward, "draw" from the weights, or "all" (then `chosen` is the best).
        choice: another reward that makes the final choice; the weights stay those of `reward`.
        asked: what the rewards are told instead of the session's prompts, P texts.
        to_images: from samples (N, ...) to PIL images.
        watch: called with each event's `Info`.
        guide: moves the rows by the gradient of `reward`, on their way; default: the sampler's own, if it has one.
        holdouts: rewards that look on, by name. looks: keep small pictures of what the reward is shown, of so many pixels.

    Raises:
        DiffsteerError: an unknown `output`, or what the reward refuses.
        RewardError: a reward raised, or returned what is no reward.
    """
    if output not in OUTPUTS:
        raise DiffsteerError(f"output={output!r} is unknown; valid: {', '.join(OUTPUTS)}")
    ledger, started = session.ledger, time.perf_counter()
    texts = session.prompts if asked is None else list(asked)
    aside = dict(holdouts or {})
    check_inputs(session.decoder is not None, reward, choice, *aside.values(), makes=session.makes)
    for r in (reward, choice, *aside.values()):
        if r is not None:
            prepare(r, texts, Context(0, session.steps, session.embedded))
    problem = Problem(len(session.prompts), session.steps, session.last_noise, session.seed, session.ids)
    scorer = Scorer(reward, session.decoder, texts, ledger, session.embedded, session.cut, session.tiny_decoder, aside, looks)
    select = Selection(sampler, problem, scorer, watch)
    select.later = True
    guide = guide or getattr(sampler, "guidance", None)
    timing = timing_of(sampler, guide)
    shifts: tuple[Any, ...] = ()
    if timing is not None:
        walk = TimedWalk(session, timing)
        x, shifts = walk(select), tuple(walk.shifts)
    elif guide is None:
        x = session.walk(select)
    else:
        if reward is None:
            raise DiffsteerError("guidance follows the gradient of a reward: give reward=")
        x = GuidedWalk(session, guide, reward, texts, weighed=sampler.exact)(select)
    ledger.add("total", time.perf_counter() - started)

    def finish() -> SteeredOutput:
        with torch.no_grad():
            return _finished(session, select, x, shifts, output, choice, to_images)

    return finish


def _finished(
    session: Session,
    select: Selection,
    x: Tensor,
    shifts: tuple[Any, ...],
    output: str,
    choice: Reward | None,
    to_images: Callable[[Tensor], list[Any] | None] | None,
) -> SteeredOutput:
    """The last event, and the output."""
    started, ledger = time.perf_counter(), session.ledger
    x = select.finish(x)
    scorer, problem = select.scorer, select.problem
    assert select.samples is not None
    rewards, log_weights = select.infos[-1].rewards, select.state.log_weights
    held = dict(scorer.aside_scores)
    deciding = rewards if choice is None else scorer.score(select.samples, problem.steps, problem.steps, choice)
    chosen = choose(output, deciding, log_weights, session.seed, session.ids)
    select.note(rewards, chosen[:, None])
    groups = (problem.groups, session.particles)
    samples = select.samples.view(*groups, *select.samples.shape[1:])
    shown = samples.flatten(0, 1) if output == "all" else samples[torch.arange(problem.groups), chosen]
    images = to_images(shown) if to_images is not None and session.decoder is not None else None
    ledger.add("total", time.perf_counter() - started)
    ledger.close()
    return SteeredOutput(
        prompts=session.prompts,
        samples=samples,
        latents=x.view(*groups, *x.shape[1:]),
        rewards=rewards,
        log_weights=log_weights,
        log_z=select.state.log_z,
        chosen=chosen,
        images=images,
        trace=replace(select.trace, shifts=shifts),
        ledger=ledger,
        **told_aside(select.selected, select.selected_aside, held),
    )
