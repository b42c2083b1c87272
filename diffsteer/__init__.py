"""Inference-time guidance and search for diffusion pipelines: no training, no fork.

The names below are imported when first used, so that ``import diffsteer`` costs next to nothing and does not import diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsteer.budget import Budget as Budget
    from diffsteer.callable import CallableModel as CallableModel
    from diffsteer.draft import Draft as Draft
    from diffsteer.dropin import steered as steered
    from diffsteer.pipeline import SteeredPipeline as SteeredPipeline
    from diffsteer.pipeline import load_pipeline as load_pipeline
    from diffsteer.pipes import decoder_of as decoder_of
    from diffsteer.reward import Reward as Reward
    from diffsteer.run import SteeredOutput as SteeredOutput
    from diffsteer.search_run import maximise as maximise
    from diffsteer.types import DiffsteerError as DiffsteerError
    from diffsteer.types import RewardError as RewardError
    from diffsteer.types import UnsupportedError as UnsupportedError

__version__ = "0.1.0"

_HOMES = {
    "Budget": "diffsteer.budget",
    "Draft": "diffsteer.draft",
    "maximise": "diffsteer.search_run",
    "CallableModel": "diffsteer.callable",
    "steered": "diffsteer.dropin",
    "SteeredPipeline": "diffsteer.pipeline",
    "decoder_of": "diffsteer.pipes",
    "load_pipeline": "diffsteer.pipeline",
    "Reward": "diffsteer.reward",
    "SteeredOutput": "diffsteer.run",
    "DiffsteerError": "diffsteer.types",
    "RewardError": "diffsteer.types",
    "UnsupportedError": "diffsteer.types",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffsteer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
