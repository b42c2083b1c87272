"""What every exported reward promises. A new one needs a line in MAKE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsteer import rewards
from diffsteer.reward import Reward
from diffsteer.types import Context

CTX = Context(done=5, steps=5)
PROMPTS = ["a red star", "two blue rings", "a red star", "a star left of a ring", "a cross"]

MAKE: dict[str, Callable[[Path, Path], Reward]] = {
    "ClipScore": lambda clip, head: rewards.ClipScore(f"local-dir:{clip}"),
    "Aesthetic": lambda clip, head: rewards.Aesthetic(str(head), f"local-dir:{clip}", None),
    "Compressibility": lambda clip, head: rewards.Compressibility(),
    "MotionCoherence": lambda clip, head: rewards.MotionCoherence(),
    "MotionConsistency": lambda clip, head: rewards.MotionConsistency(
        torch.linspace(0, 1, 4 * 3 * 24 * 24).sin().view(4, 3, 24, 24)
    ),
    "RankEnsemble": lambda clip, head: rewards.RankEnsemble(
        [rewards.ClipScore(f"local-dir:{clip}"), rewards.Compressibility()], (2.0, 1.0)
    ),
    "Program": lambda clip, head: rewards.Program("all_of(brightness() > 0.9, edges() > 0.5, area(red) > 0.5)"),
}


@pytest.mark.parametrize("exported", rewards.__all__)
def test_reward(exported: str, clip_folder: Path, head_file: Path, images: Tensor) -> None:
    reward = MAKE[exported](clip_folder, head_file)
    reward.prepare(PROMPTS, CTX)
    if reward.modality == "video":  # four frames of each
        images = torch.stack([images.roll(3 * k, -1) * (1 - 0.1 * k) for k in range(4)], 1)
    with torch.no_grad():
        scores = reward.score(images, PROMPTS, CTX)

    assert type(reward) is getattr(rewards, exported) and (reward.__doc__ or "").strip()
    assert reward.name.isidentifier() and reward.name != Reward.name and reward.input in ("pixels", "latents")
    assert reward.higher_is_better and reward.range[0] < reward.range[1] and reward.range != Reward.range
    assert (reward.licence is None) == (reward.weights is None)  # both, where a network is loaded

    assert scores.shape == (5,) and scores.dtype == torch.float32
    assert bool((reward.range[0] <= scores).all()) and bool((scores <= reward.range[1]).all())
    assert len(set(scores.tolist())) > 1

    if reward.pooled:  # a pool of each prompt's own, in which the order plays no part
        back = torch.arange(4, -1, -1)
        assert torch.equal(reward.score(images[back], [PROMPTS[i] for i in back], CTX)[back], scores)
        return
    with torch.no_grad():
        for cut in (1, 2, 4):
            parts = [reward.score(images[i], p, CTX) for i, p in ((slice(cut), PROMPTS[:cut]), (slice(cut, 5), PROMPTS[cut:]))]
            torch.testing.assert_close(torch.cat(parts), scores, rtol=1e-4, atol=1e-4)
        alone = [reward.score(images[i : i + 1], PROMPTS[i : i + 1], CTX) for i in range(5)]
        torch.testing.assert_close(torch.cat(alone), scores, rtol=1e-4, atol=1e-4)
        again, fresh = reward.score(images, PROMPTS, CTX), MAKE[exported](clip_folder, head_file).score(images, PROMPTS, CTX)
    assert reward.deterministic and torch.equal(again, scores) and torch.equal(fresh, scores)

    late = MAKE[exported](clip_folder, head_file)
    with torch.inference_mode():
        late.score(images, PROMPTS, CTX)  # loads what it needs, and gradients pass all the same
    x = images.clone().requires_grad_()
    live = reward.score(x, PROMPTS, CTX)
    torch.testing.assert_close(live.detach(), scores, rtol=1e-4, atol=1e-4)
    assert live.requires_grad == reward.differentiable
    if reward.differentiable:
        (gradient,) = torch.autograd.grad(live.sum(), x)
        assert gradient.isfinite().all() and bool(gradient.flatten(1).any(1).all())
        (again,) = torch.autograd.grad(late.score(x, PROMPTS, CTX).sum(), x)
        torch.testing.assert_close(again, gradient)

    with torch.no_grad():
        shuffled = reward.score(images, PROMPTS[::-1], CTX)
    assert torch.equal(shuffled, scores) != reward.needs_prompt


def test_every_reward_has_its_own_name() -> None:
    names = [getattr(rewards, exported).name for exported in rewards.__all__]
    assert set(MAKE) == set(rewards.__all__) and len(set(names)) == len(names)
