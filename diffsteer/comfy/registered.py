"""The nodes that come of the registry: one a sampler, a reward and a schedule, with their own fields as widgets."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from diffsteer.algebra import NOISES
from diffsteer.comfy import fields
from diffsteer.comfy.host import HOST, Host
from diffsteer.comfy.node import REWARD, STEERING, Input, Node
from diffsteer.comfy.session import path_of
from diffsteer.comfy.steering import Steering, build
from diffsteer.reward import Reward
from diffsteer.types import DiffsteerError

HIGHEST_RATIO = 1e3  # of a grid on a flow, whose first level has no signal at all

PROMPT = Input(
    "prompt", "STRING", "What the reward is asked for; usually the text of the positive condition.", "", {"multiline": True}
)
CHUNK = Input(
    "chunk",
    "INT",
    "At most so many rows in the model at a time, to save memory (0: all of them).",
    0,
    {"min": 0, "max": 4096},
)
VAE = Input("vae", "VAE", "Decodes what the reward looks at.", optional=True)
EACH = Input(
    "particles",
    "INT",
    "Particles an image. 0: the whole latent batch are particles of one image.",
    0,
    {"min": 0, "max": 4096},
)


def title(cls: type[Any]) -> str:
    """The name of a class in words."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__)


def sampler_node(name: str, cls: type[Any], host: Host = HOST) -> Node:
    """A method as a SAMPLER, with the steering that the selector asks for its records."""

    def steering(
        vae: Any, reward: Reward | None, prompt: str, particles: int, noise: str, chunk: int, given: dict[str, Any]
    ) -> Any:
        options = fields.values(cls, given)
        return Steering(cls, options, particles, reward, prompt, vae, noise, chunk or None, host)

    def run(
        prompt: str, particles: int, noise: str, chunk: int, vae: Any = None, reward: Reward | None = None, **given: Any
    ) -> tuple[Any, Steering]:
        made: Steering = steering(vae, reward, prompt, particles, noise, chunk, given)
        made.make(particles or None)
        return host.sampler(made), made

    def check(particles: int = 0, **given: Any) -> None:
        build(cls, fields.values(cls, given), particles or None)

    kind = "Exact as particles grow." if cls.exact else "A heuristic."
    return Node(
        id=f"DiffsteerSampler_{name}",
        title=f"{title(cls)} sampler ({name})",
        description=f"{fields.summary(cls)} {kind} {cls.source}",
        inputs=(
            Input("reward", REWARD, "What the particles are chosen by.", optional=not cls.needs_reward),
            VAE,
            PROMPT,
            EACH,
            *fields.widgets(cls, leave_out=("particles",)),
            Input("noise", "COMBO", "What eta is a share of; quadratic is for flow models.", "eta", choices=tuple(NOISES)),
            CHUNK,
        ),
        outputs=(("SAMPLER", "sampler"), (STEERING, "steering")),
        run=run,
        check=check,
        checked=fields.names(cls),
    )


def reward_node(name: str, cls: type[Any]) -> Node:
    """A reward."""

    def run(**given: Any) -> tuple[Reward]:
        with torch.inference_mode(False):  # what it loads is to let gradients pass
            return (cls(**fields.values(cls, given)),)

    licence = f" Weights: {cls.weights}; licence: {cls.licence}." if cls.weights else ""
    gradient = "It has a gradient." if cls.differentiable else "It has no gradient."
    return Node(
        id=f"DiffsteerReward_{name}",
        title=f"{title(cls)} (reward)",
        description=f"{fields.summary(cls)} {gradient}{licence}",
        inputs=fields.widgets(cls),
        outputs=((REWARD, "reward"),),
        run=run,
        check=lambda **given: cls(**fields.values(cls, given)),
        checked=fields.names(cls),
    )


def schedule_node(name: str, cls: type[Any]) -> Node:
    """A schedule as SIGMAS for the model at hand."""

    def run(model: Any, steps: int, denoise: float, **given: Any) -> tuple[Tensor]:
        schedule = cls(**fields.values(cls, given))
        return (sigmas_of(schedule, model.get_model_object("model_sampling"), steps, denoise),)

    return Node(
        id=f"DiffsteerSchedule_{name}",
        title=f"{title(cls)} schedule",
        description=f"{fields.summary(cls)} {cls.source}",
        inputs=(
            Input("model", "MODEL", "Whose range of noise is covered."),
            Input("steps", "INT", "", 20, {"min": 1, "max": 10000}),
            Input(
                "denoise", "FLOAT", "Below 1: the last steps of a longer grid.", 1.0, {"min": 0.01, "max": 1.0, "step": 0.01}
            ),
            *fields.widgets(cls),
        ),
        outputs=(("SIGMAS", "sigmas"),),
        run=run,
        check=lambda **given: cls(**fields.values(cls, given)),
        checked=fields.names(cls),
    )


def sigmas_of(schedule: Any, model_sampling: Any, steps: int, denoise: float = 1.0) -> Tensor:
    """A schedule's grid in a model's own sigmas, (steps + 1,), the last one 0.

    Raises:
        DiffsteerError: a grid that does not fall.
    """
    flow = path_of(model_sampling) == "flow"
    high, low = (float(s) for s in (model_sampling.sigma_max, model_sampling.sigma_min))
    top, bottom = (s / max(1 - s, 1 / (HIGHEST_RATIO + 1)) if flow else s for s in (high, low))
    whole = int(steps / denoise)
    ratios = schedule.ratios(whole, top, bottom)
    sigmas = ratios / (1 + ratios) if flow else ratios
    sigmas = torch.cat([sigmas, torch.zeros(1, dtype=sigmas.dtype)])
    sigmas[0] = high  # where a flow has nothing but noise
    if bool((sigmas[1:] >= sigmas[:-1]).any()):
        raise DiffsteerError(f"the schedule {schedule.name} has steps that do not fall: ask for fewer than {whole}")
    return sigmas[-(steps + 1) :].float()
