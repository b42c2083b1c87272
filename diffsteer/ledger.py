"""What a run costs: counted while it runs, and estimated before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


@dataclass
class Ledger:
    """Counts and seconds of a run.

    Attributes:
        evaluations: rows that went through the denoiser (with classifier-free guidance a particle's step is two).
        padding: of further rows that only filled up a block of fixed size (`deterministic`).
        forwards: calls of the denoiser.
        backwards: rows whose gradient went back through the denoiser.
        decodes: latents decoded. tiny_decodes: by a tiny decoder. reward_calls: samples scored. held_out_calls: samples scored
            by each reward that only looks on.
        skipped: updates of gradient guidance that were left out, since their gradients were no numbers.
        seconds: wall time by stage: denoiser, decode, reward, held-out, select, and total.
        peak_memory: bytes, the most at any time of the run: allocated on the accelerator where there is one, else held by the
            whole process (on systems other than Linux since it began).
    """

    evaluations: int = 0
    padding: int = 0
    forwards: int = 0
    backwards: int = 0
    decodes: int = 0
    tiny_decodes: int = 0
    reward_calls: int = 0
    held_out_calls: int = 0
    skipped: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0

    COUNTS = (
        "evaluations",
        "padding",
        "forwards",
        "backwards",
        "decodes",
        "tiny_decodes",
        "reward_calls",
        "held_out_calls",
        "skipped",
    )

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage; an accelerator is waited for, or its work would count elsewhere."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        """Add time to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def open(self) -> Ledger:
        """A run begins: the peak memory is measured from here."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):  # Linux: the high-water mark begins anew
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def close(self) -> None:
        """Note the peak memory."""
        if torch.cuda.is_available():
            self.peak_memory = torch.cuda.max_memory_allocated()
        else:
            self.peak_memory = _high_water()

    @property
    def counts(self) -> dict[str, int]:
        """The counts alone, which are the same on every machine."""
        return {name: getattr(self, name) for name in self.COUNTS}

    def as_dict(self) -> dict[str, object]:
        """Counts, seconds by stage and peak memory."""
        return asdict(self)

    def __str__(self) -> str:
        # a drop-in scheduler never sees the denoiser
        unseen = () if self.forwards else ("evaluations", "forwards")
        rare = ("padding", "backwards", "tiny_decodes", "held_out_calls", "skipped")
        shown = {k: v for k, v in self.counts.items() if k not in unseen and (v or k not in rare)}
        said = [f"{v} {k.replace('_', ' ')}" for k, v in shown.items()]
        spent = ", ".join((["denoiser not counted"] if unseen else []) + said)
        seconds = ", ".join(f"{k} {v:.2f} s" for k, v in self.seconds.items())
        return spent + (f" ({seconds})" if seconds else "")


def _high_water() -> int:
    """The most memory of this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import psutil

        now = psutil.Process().memory_info()
        return int(getattr(now, "peak_wset", now.rss))
