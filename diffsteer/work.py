"""What is done with a configuration: pipeline objects and calls, prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffsteer import rng
from diffsteer.config import EXPRESSION, build
from diffsteer.folder import batches
from diffsteer.ledger import Ledger
from diffsteer.pipeline import SteeredPipeline
from diffsteer.prompts import Item
from diffsteer.reward import Reward
from diffsteer.run import SteeredOutput
from diffsteer.told import call_of, steered_of, told_reward
from diffsteer.types import DiffsteerError, Sampler

CALLED = ("negative_prompt", "guidance_scale", "num_inference_steps", "width", "height")  # of a prompt's own, to the pipeline


def wished(config: DictConfig, item: Item) -> Reward:
    """The reward with the arguments of a prompt's own.

    Raises:
        DiffsteerError: there is none that takes some, or what `build` refuses.
    """
    if OmegaConf.is_missing(config, "reward") or config.reward.get("name") == EXPRESSION:
        raise DiffsteerError(f"prompt {item.id!r} has arguments for a reward, and there is not one alone to take them")
    merged = OmegaConf.merge(told_reward(config), dict(item.overrides["reward"]))
    assert isinstance(merged, DictConfig)
    reward: Reward = build("reward", merged)
    return reward


@dataclass
class Work:
    """What makes the items of a folder: the pipeline object that a configuration describes, and others where one prompt's line
    asks for something else."""

    config: DictConfig
    pipe: Any
    sampler: Sampler | None
    reward: Reward | None
    objects: dict[str, Any]
    watch: Callable[..., None] | None = None
    _made: dict[str, SteeredPipeline] = field(default_factory=dict)

    def steered(self, item: Item) -> SteeredPipeline:
        """The pipeline object for an item, its reward with the arguments of the item's own."""
        given = item.overrides.get("reward", {})
        key = json.dumps(given, sort_keys=True, default=str)
        if key not in self._made:
            reward = wished(self.config, item) if given else self.reward
            self._made[key] = steered_of(self.config, self.pipe, self.sampler, reward, **self.objects)
        return self._made[key]

    def call(self, item: Item) -> dict[str, Any]:
        """The arguments of a call for an item."""
        whole = {"num_inference_steps": self.config.num_inference_steps, "negative_prompt": self.config.negative_prompt}
        mine = {key: item.overrides[key] for key in CALLED if key in item.overrides}
        return whole | call_of(self.config) | mine

    def begin(self, items: Sequence[Item]) -> Callable[[], SteeredOutput]:
        """Make items for which the same is asked, up to the last states; what is returned does the rest."""
        first, seed = items[0], items[0].overrides.get("seed", self.config.seed)
        steered, call = self.steered(first), self.call(first)
        prompts = [item.prompt for item in items]
        if self.sampler is not None:
            return steered.begin(prompts, seed=seed, ids=[i.id for i in items], watch=self.watch, **call)
        if first.id == 0:  # a single prompt is the plain pipeline with this seed, also once others have joined it
            return steered.begin(prompts, seed=seed, **call)
        return steered.begin(prompts, generator=rng.generator(seed, first.id), **call)

    def estimate(self, items: Sequence[Item]) -> Ledger:
        """What items will cost, those for which the same is asked together."""
        total = Ledger()
        alike = [replace(i, overrides={k: v for k, v in i.overrides.items() if k != "seed"}) for i in items]
        for group in batches(sorted(alike, key=lambda i: i.asked), len(items)):
            call = self.call(group[0])
            cost = self.steered(group[0]).estimate(len(group), call.pop("num_inference_steps"), **call)
            for name, number in cost.counts.items():
                setattr(total, name, getattr(total, name) + number)
        return total
