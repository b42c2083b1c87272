"""Who is doing what in a folder that several processes share: leases on prompts, which run out when their holder is gone.

No process waits for another one and none is the first: each takes the next prompts that nobody has. A holder that is slow keeps
what it has and holds up nothing else; one that was killed loses it, at once where it ran on this machine, else when its lease
was not renewed for some time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from diffsteer.prompts import Item

FOLDER, LOCK = ".leases", "lock"
LEASE = 120.0  # seconds after which a lease that was not renewed is anybody's
BEAT = LEASE / 6  # seconds between renewals


class Leases:
    """The leases of one process on the prompts of a folder.

    Args:
        path: the folder of results; a folder of leases is made in there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / FOLDER
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path / LOCK)  # whoever reads and writes what is shared holds it; it may be taken again
        self.held: set[Path] = set()
        me = psutil.Process()
        self.me = {"host": socket.gethostname(), "pid": me.pid, "born": me.create_time()}

    def claim(self, items: Sequence[Item]) -> list[Item]:
        """Those of the items that nobody has; they are ours from here."""
        with self.lock:
            mine = [item for item in items if not self._taken(self._file(item))]
            for item in mine:
                self._file(item).write_text(json.dumps(self.me))
                self.held.add(self._file(item))
        return mine

    def release(self, items: Sequence[Item]) -> None:
        """Give items back, done or not."""
        for item in items:
            self.held.discard(self._file(item))
            self._file(item).unlink(missing_ok=True)

    def others(self) -> bool:
        """Is another process at work here?"""
        return any(self._taken(file) for file in self.path.glob("*.json") if file not in self.held)

    @contextlib.contextmanager
    def renewing(self) -> Iterator[None]:
        """Renew what is held from time to time, and give all of it back at the end."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT):
                for file in list(self.held):
                    with contextlib.suppress(OSError):
                        os.utime(file)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            for file in list(self.held):
                file.unlink(missing_ok=True)
            self.held.clear()

    def _file(self, item: Item) -> Path:
        return self.path / f"{item.index}.json"

    def _taken(self, file: Path) -> bool:
        """Is there a lease whose holder is alive, as far as can be known?"""
        try:
            age = time.time() - file.stat().st_mtime
            holder: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError):  # none, or one that was being written when its holder was killed
            return False
        if not isinstance(holder, dict) or age > LEASE:
            return False
        elsewhere = bool(holder.get("host") != self.me["host"])
        return elsewhere or _lives(holder)


def _lives(holder: dict[str, Any]) -> bool:
    """Is it that process, and no other one with its number?"""
    try:
        born: float = psutil.Process(int(holder["pid"])).create_time()
        return abs(born - float(holder["born"])) < 2
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def rank() -> tuple[int, int]:
    """Which process this is of how many, as torchrun and accelerate say it; (0, 1) for one alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_device() -> str:
    """The accelerator of this process, one for each on a machine; the CPU without any."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    own = os.environ.get("LOCAL_RANK")
    return "cuda" if own is None else f"cuda:{int(own) % torch.cuda.device_count()}"
