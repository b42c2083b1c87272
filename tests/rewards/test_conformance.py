"""What every registered reward promises, installed plug-ins included. One that needs arguments needs a line in MAKE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import models_of_others
import pytest
import torch
from torch import Tensor

from diffsteer import rewards
from diffsteer.conformance import check_reward, five_images
from diffsteer.registry import registered
from diffsteer.reward import Reward
from diffsteer.types import Context, DiffsteerError

MAKE: dict[str, Callable[[Path], Reward]] = {
    "clip": lambda of: rewards.ClipScore(f"local-dir:{of / 'clip'}"),
    "clip2": lambda of: rewards.SecondClip(f"local-dir:{of / 'clip'}"),
    "aesthetic": lambda of: rewards.Aesthetic(str(of / "head.pth"), f"local-dir:{of / 'clip'}", None),
    "stability": lambda of: rewards.Stability(model_name=f"local-dir:{of / 'clip'}"),
    "hps": lambda of: rewards.HumanPreference(str(of / "clip" / "open_clip_model.safetensors"), f"local-dir:{of / 'clip'}"),
    "pick_score": lambda of: rewards.PickScore(str(of / "pick"), str(of / "pick")),
    "image_reward": lambda of: rewards.ImageReward(str(of / "ImageReward.pt"), str(of / "bert")),
    "vqa_score": lambda of: rewards.VqaScore(str(of / "vqa")),
    "classifier": lambda of: rewards.Classifier(str(of / "linear.safetensors"), 2, model_name=f"local-dir:{of / 'clip'}"),
    "remote_judge": lambda of: rewards.RemoteJudge((of / "url").read_text(), "a-judge"),
    "motion_consistency": lambda of: rewards.MotionConsistency(torch.linspace(0, 1, 4 * 3 * 24 * 24).sin().view(4, 3, 24, 24)),
    "rank_ensemble": lambda of: rewards.RankEnsemble(
        [rewards.ClipScore(f"local-dir:{of / 'clip'}"), rewards.Compressibility()], (2.0, 1.0)
    ),
    "program": lambda of: rewards.Program("all_of(brightness() > 0.9, edges() > 0.5, area(red) > 0.5)"),
}


@pytest.mark.parametrize("name", sorted(registered("reward")))
def test_reward(name: str, others: Path) -> None:
    cls: Any = registered("reward")[name]
    check_reward(lambda: MAKE[name](others) if name in MAKE else cls())


def test_every_exported_reward_is_registered_by_its_own_name() -> None:
    exported = [getattr(rewards, name) for name in rewards.__all__]
    assert len({cls.name for cls in exported}) == len(exported)
    assert {cls.name for cls in exported} <= set(registered("reward")) and set(MAKE) <= set(registered("reward"))


class Good(Reward):
    """The mean red."""

    name: ClassVar[str] = "good"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    differentiable: ClassVar[bool] = True

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        return samples[:, 0].mean((1, 2))


def broken(**changed: Any) -> Callable[[], Reward]:
    def score(self: Reward, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        scores: Tensor = changed["score"](samples, prompts)
        return scores

    body = {"__doc__": "Broken.", **changed} | ({"score": score} if "score" in changed else {})
    return type("Broken", (Good,), body)


def changing(x: Tensor, p: Sequence[str]) -> Tensor:
    scores = x[:, 0].mean((1, 2))
    x.detach().clamp_(0.2, 0.8)
    return scores


count = iter(range(10**6))
BROKEN = [
    ({"name": "reward"}, "none of its own"),
    ({"name": "two words"}, "no word"),
    ({"__doc__": ""}, "no docstring"),
    ({"input": "sound"}, "input='sound'"),
    ({"modality": "smell"}, "modality='smell'"),
    ({"range": Reward.range}, "what scores lie between"),
    ({"higher_is_better": False}, "score the negative"),
    ({"licence": "MIT"}, "come together"),
    ({"weights_bytes": 5}, "weights_bytes without weights"),
    ({"input": "latents"}, "samples= of its own"),
    ({"score": lambda x, p: x[:, 0].mean((1, 2)).double()}, "float64"),
    ({"score": lambda x, p: x[:, 0].mean(1)}, r"\[5, 40\]"),
    ({"score": lambda x, p: x[:, 0].mean((1, 2)) + 1}, "leave its range"),
    ({"score": lambda x, p: 0 * x[:, 0].mean((1, 2))}, "one score"),
    ({"score": lambda x, p: x[:, 0].mean((1, 2)) / 2 + 1e-3 * (next(count) % 2)}, "the second time"),
    ({"score": lambda x, p: (x[:, 0].mean((1, 2)) - x.mean() / 2).clamp(0, 1)}, "chunks of 1"),
    ({"score": lambda x, p: x[:, 0].mean((1, 2)) * (1 + torch.arange(len(x))) / 9}, "the order of samples"),
    ({"score": lambda x, p: x[:, 0].mean((1, 2)) / torch.tensor([float(len(t)) for t in p])}, "needs_prompt is False"),
    ({"needs_prompt": True}, "no prompt matters"),
    ({"differentiable": False}, "differentiable=False is not so"),
    ({"deterministic": False, "differentiable": False}, "differentiable=False is not so"),
    ({"score": changing}, "changes the samples"),
    ({"score": lambda x, p: x[:, 0].mean((1, 2)) * (0.5 + torch.rand(1) / 2)}, "the second time|random state"),
    ({"score": lambda x, p: x.detach()[:, 0].mean((1, 2))}, "differentiable=True is not so"),
    ({"score": lambda x, p: (x[:, 0].mean((1, 2)) - 0.5).relu()}, "a gradient is zero"),
    ({"image_features": lambda self, x, ctx: x.mean((1, 2, 3))}, "one row a sample"),
    ({"image_features": lambda self, x, ctx: x.flatten(1) / 0}, "features are no numbers"),
    ({"image_features": lambda self, x, ctx: (x - x.mean(0)).flatten(1)}, "what is shown beside it"),
    ({"image_features": lambda self, x, ctx: torch.ones(len(x), 2)}, "of different samples are the same"),
    ({"pooled": True, "score": lambda x, p: x[:, 0].mean((1, 2)) * (1 + torch.arange(len(x))) / 9}, "the order of a pool"),
]


class Prepared(Good):
    """The mean red, once it was prepared."""

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        self.weight = torch.ones(3)

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        return samples[:, 0].mean((1, 2)) * self.weight[0]


def test_a_reward_that_keeps_its_promises_passes() -> None:
    check_reward(Good)
    check_reward(Prepared)
    check_reward(lambda: Good(), five_images()[:, :, :8], ["a"] * 5)


@pytest.mark.parametrize(("changed", "said"), BROKEN, ids=[said for _, said in BROKEN])
def test_every_broken_promise_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(DiffsteerError, match=said):
        check_reward(broken(**changed))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path, v2_state: dict[str, Tensor]) -> Iterator[Path]:
    """Checkpoints of other people's layouts, tiny, and a judge that answers."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "clip").symlink_to(clip_folder)
    torch.save(v2_state, folder / "head.pth")
    models_of_others.make(folder)
    with models_of_others.judge() as url:
        (folder / "url").write_text(url)
        yield folder
