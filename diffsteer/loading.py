"""`load_pipeline`: what ships with diffsteer by name, and anything that diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffsteer.callable import pixel_model
from diffsteer.types import DiffsteerError


def load_pipeline(name: str | Path = "shapes", **kwargs: Any) -> Any:
    """Load a pipeline. What ships with diffsteer: "shapes", a miniature Stable Diffusion; "shapes-flow", the same of rectified
    flow; "shapes-motion", the first with a motion module, for clips of 8 frames; "shapes-pixels", 32 x 32 pixels without
    captions, a `CallableModel`. Anything else is a folder or a hub id.

    Keyword arguments go to `DiffusionPipeline.from_pretrained` (torch_dtype, revision, ...).

    Raises:
        DiffsteerError: nothing can be loaded from there.
    """
    from diffusers import DiffusionPipeline

    from diffsteer.embedded import load_embedded, load_pixels
    from diffsteer.shapes.models import MODELS

    if name in MODELS:
        return load_embedded(str(name), **kwargs)
    if name == "shapes-pixels":
        return pixel_model(*load_pixels())
    try:
        fetching = {
            k: v for k, v in kwargs.items() if k in ("revision", "token", "cache_dir", "local_files_only", "force_download")
        }
        index = DiffusionPipeline.load_config(name, **fetching)
        # what was saved as missing: some pipelines (a Stable Diffusion 3 without its T5) want to be told so
        absent = {part: None for part, kind in index.items() if kind == [None, None]}
        return DiffusionPipeline.from_pretrained(name, **absent | kwargs)
    except (OSError, ValueError) as error:
        embedded = ", ".join([*MODELS, "shapes-pixels"])
        first = str(error).strip().split("\n")[0]
        raise DiffsteerError(f"no pipeline could be loaded from {str(name)!r} ({first}); embedded: {embedded}") from error
