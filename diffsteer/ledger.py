"""What a run costs: counted while it runs, and estimated before."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch


@dataclass
class Ledger:
    """Counts and seconds of a run.

    Attributes:
        evaluations: rows that went through the denoiser (with classifier-free guidance a particle's step is two).
        padding: of further rows that only filled up a block of fixed size (`deterministic`).
        forwards: calls of the denoiser.
        decodes: latents decoded. reward_calls: samples scored.
        seconds: wall time by stage: denoiser, decode, reward, select, and total.
        peak_memory: bytes; of the accelerator where there is one, else of the process.
    """

    evaluations: int = 0
    padding: int = 0
    forwards: int = 0
    decodes: int = 0
    reward_calls: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0

    COUNTS = ("evaluations", "padding", "forwards", "decodes", "reward_calls")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage; an accelerator is waited for, or its work would count elsewhere."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def close(self) -> None:
        """Note the peak memory."""
        if torch.cuda.is_available():
            self.peak_memory = torch.cuda.max_memory_allocated()
        else:
            self.peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def counts(self) -> dict[str, int]:
        """The counts alone, which are the same on every machine."""
        return {name: getattr(self, name) for name in self.COUNTS}

    def as_dict(self) -> dict[str, object]:
        """Counts, seconds by stage and peak memory."""
        return asdict(self)

    def __str__(self) -> str:
        spent = ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in self.counts.items() if v or k != "padding")
        seconds = ", ".join(f"{k} {v:.2f} s" for k, v in self.seconds.items())
        return spent + (f" ({seconds})" if seconds else "")
