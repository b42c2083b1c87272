"""LTX-2 steps its sound with a deep copy of its scheduler: picture and sound of a particle stay together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families.test_families import PROMPTS, built, level_of
from families.toys import TOYS
from torch import Tensor

from diffsteer import SteeredPipeline, UnsupportedError, steered
from diffsteer.control import Follower
from diffsteer.pipes import decoder_of
from diffsteer.samplers import MPGD, FeynmanKac
from diffsteer.scheduler import SteeringMixin

NAME, STEPS = "LTX2Pipeline", 6
SELECTING = FeynmanKac(3, scale=300.0, target_ess=None, trigger="always", resampling="multinomial", events=(0.5,))


def call() -> dict[str, Any]:
    return {**TOYS[NAME].call, "num_inference_steps": STEPS}


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[bool, list[Tensor]]:
    """What every step made: False, of the picture; True, of the sound."""
    made: dict[bool, list[Tensor]] = {False: [], True: []}
    step = SteeringMixin.step

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = step(self, *args, **kwargs)
        made[isinstance(self._control, Follower)].append(out[0].clone())
        return out

    monkeypatch.setattr(SteeringMixin, "step", spy)
    return made


def run(streams: dict[bool, list[Tensor]], sampler: FeynmanKac, **given: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
    for made in streams.values():
        made.clear()
    keys = given or {"seed": 0}
    out = SteeredPipeline(built(NAME), sampler, level_of, output="all")(PROMPTS, **keys, **call())
    picture, sound = (made[-STEPS:] for made in (streams[False], streams[True]))
    return out, picture, sound


def test_sound_follows_the_ancestors_of_the_picture(streams: dict[bool, list[Tensor]]) -> None:
    _, free_picture, free_sound = run(streams, FeynmanKac(3, scale=0.0, events=(0.5,)))
    out, picture, sound = run(streams, SELECTING)
    ancestors = out.trace.ancestors[0]
    assert bool(ancestors.ne(torch.arange(3)).any()), "somebody must be replaced"
    rows = (ancestors + 3 * torch.arange(2)[:, None]).flatten()
    at = STEPS // 2 - 1
    for free, kept in ((free_picture, picture), (free_sound, sound)):
        assert torch.equal(free[at - 1], kept[at - 1])
        assert torch.equal(free[at][rows], kept[at]) and not torch.equal(free[at], kept[at])
    last = sound[-1].view(2, 3, -1)
    assert all(not torch.equal(last[p, i], last[p, j]) for p in range(2) for i, j in ((0, 1), (0, 2), (1, 2))), "copies part"


def test_the_drop_in_form_returns_the_chosen_picture_with_its_sound(streams: dict[bool, list[Tensor]]) -> None:
    _, picture, sound = run(streams, SELECTING)
    noise = torch.Generator().manual_seed(5)
    first = {
        "latents": torch.randn(picture[0].shape, generator=noise),
        "audio_latents": torch.randn(sound[0].shape, generator=noise),
    }
    pipe = copy.copy(built(NAME))
    decode = decoder_of(pipe, **TOYS[NAME].call)
    pipe.scheduler = steered(pipe.scheduler, SELECTING, reward=level_of, decoder=decode, prompts=PROMPTS)
    torch.manual_seed(3)
    pipe(PROMPTS, num_videos_per_prompt=3, output_type="latent", **first, **call())
    steering, shown, heard = pipe.scheduler.steering, streams[False][-1], streams[True][-1]
    assert steering.rewards.argmax(1).tolist() == [0, 0]
    _, picture, sound = run(streams, SELECTING, seed=steering.seed, **first)
    found = torch.cdist(shown.flatten(1), picture[-1].flatten(1)).argmin(1).tolist()
    assert sorted(found) == list(range(6)) and found != list(range(6)), "the chosen ones come first"
    torch.testing.assert_close(shown, picture[-1][found], rtol=0, atol=0.1)  # texts encoded in another batch
    torch.testing.assert_close(heard, sound[-1][found], rtol=0, atol=0.1)


def test_a_deep_copy_is_no_second_pipeline() -> None:
    pipe = copy.copy(built("StableDiffusionPipeline"))
    pipe.scheduler = steered(pipe.scheduler, FeynmanKac(2), reward=level_of, decoder=pipe, prompts=PROMPTS)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    with pytest.raises(UnsupportedError, match="follows it step by step"):
        pipe(PROMPTS, num_images_per_prompt=2, num_inference_steps=4)


def test_gradient_guidance_is_refused_since_it_takes_single_steps() -> None:
    with pytest.raises(UnsupportedError, match="this pipeline cannot be cut, since its sound is a second stream"):
        SteeredPipeline(built(NAME), MPGD(2), level_of)(PROMPTS, seed=0, **call())
