"""Where the embedded models lie, and what was found best for them. Imports neither torch nor diffusers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).resolve().parent / "weights"
MODELS = {"shapes": WEIGHTS / "sd"}
CLIP = WEIGHTS / "clip"


@functools.cache
def _defaults() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((WEIGHTS / "defaults.json").read_text())
    return loaded


def is_embedded(pipe: Any) -> bool:
    """Was this pipeline loaded from the package's own weights?"""
    name = getattr(getattr(pipe, "config", None), "_name_or_path", None)
    return bool(name) and Path(str(name)).resolve() in [path.resolve() for path in MODELS.values()]


def recommended(pipe: Any) -> dict[str, Any]:
    """Call arguments chosen for an embedded model on development captions (guidance scale, steps); {} for any other."""
    return dict(_defaults()) if is_embedded(pipe) else {}
