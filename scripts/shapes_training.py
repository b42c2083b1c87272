"""What the stages of `train_shapes.py` share: the training loop with its checkpoints, and words as token ids."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffsteer.shapes.tokenizer import CONTEXT


@functools.cache
def load_tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def tokenize(folder: Path, captions: list[str]) -> Tensor:
    batch = load_tokenizer(folder)(captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    return batch.input_ids


def train(
    name: str, work: Path, model: nn.Module, loss_of: Callable[[int], Tensor], steps: int, lr: float, decay: float = 0.999
) -> nn.Module:
    """AdamW with a one-cycle rate; returns the weights averaged (exponentially) over the second half."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    average, path = copy.deepcopy(model), work / f"{name}.ckpt"
    start, seconds = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start, seconds = saved["step"], saved["seconds"]
    model.train()
    clock, recent, saved_at = time.time() - seconds, [], time.time()
    for step in range(start, steps):
        torch.manual_seed(step)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            keep = decay if step > steps // 2 else 0.0
            for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                a.lerp_(b, 1 - keep) if a.is_floating_point() else a.copy_(b)
        recent = [*recent[-99:], loss.item()]
        if step % 100 == 99 or step + 1 == steps:
            print(f"{name} {step + 1}/{steps} loss {np.mean(recent):.4f} {time.time() - clock:.0f} s", flush=True)
        if time.time() - saved_at > 120 or step + 1 == steps:
            saved_at = time.time()
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "step": step + 1,
                "seconds": time.time() - clock,
            }
            torch.save(
                state | {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, path.with_suffix(".new")
            )
            path.with_suffix(".new").replace(path)
    return average.eval()


def pixels(images: list[np.ndarray] | np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).float() / 255
