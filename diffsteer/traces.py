"""What becomes of a prompt's particles on their way, as files: numbers of every event, and one picture of all that was seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffsteer.files import finite, finite_all, replacing

if TYPE_CHECKING:
    from PIL import Image

    from diffsteer.run import SteeredOutput

FOLDER = "trace"
SIDE = 96  # pixels of a small picture, at most


def write_trace(folder: Path, name: str, out: SteeredOutput, p: int) -> None:
    """Write ``trace/NAME.json`` and, where looks were kept, ``trace/NAME.png``: a row an event, a column a particle. Nothing of
    a run without events."""
    if not out.trace.events:
        return
    (folder / FOLDER).mkdir(exist_ok=True)
    events = [
        {
            "done": e.done,
            "rewards": finite_all(e.rewards[p]),
            "log_weights": finite_all(e.log_weights[p]),
            "ess": finite(e.ess[p]),
            "ancestors": e.ancestors[p].tolist(),
            "resampled": bool(e.resampled[p]),
            "exponent": finite(e.exponent[p]),
        }
        for e in out.trace.events
    ]
    looks = [seen[p] for seen in out.trace.looks]
    told: dict[str, Any] = {"steps": events[-1]["done"], "chosen": int(out.chosen[p]), "events": events}
    if looks:
        told["look"] = [looks[0].shape[-1], looks[0].shape[-2]]
        with replacing(folder / FOLDER / f"{name}.png") as part:
            _sprite(looks).save(part, format="PNG")
    with replacing(folder / FOLDER / f"{name}.json") as part:
        part.write_text(json.dumps(told, allow_nan=False))


def read_trace(folder: Path, name: str) -> tuple[dict[str, Any] | None, Image.Image | None]:
    """What `write_trace` wrote; None where there is nothing, or nothing whole."""
    from PIL import Image

    try:
        told: dict[str, Any] = json.loads((folder / FOLDER / f"{name}.json").read_text())
        chosen, counts = int(told["chosen"]), {len(e["ancestors"]) for e in told["events"]}
        whole = [(float(e["done"] + 0), e["ess"], len(e["rewards"]), len(e["log_weights"])) for e in told["events"]]
        ancestors = [int(a) for e in told["events"] for a in e["ancestors"]]
        (k,) = counts
        if not whole or not all(0 <= a < k for a in [chosen, *ancestors]) or any(w[2:] != (k, k) for w in whole):
            return None, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None
    try:
        with Image.open(folder / FOLDER / f"{name}.png") as picture:
            return told, picture.convert("RGB")
    except (OSError, ValueError):
        return told, None


def _sprite(looks: list[Tensor]) -> Image.Image:
    """Bytes (K, 3, h, w) an event, as one picture."""
    import torch
    from PIL import Image

    rows = [torch.cat(list(seen), -1) for seen in looks]  # (3, h, K w)
    return Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy())
