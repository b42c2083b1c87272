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
import uuid
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
        self.me = {"host": _host(), "pid": os.getpid(), "born": _born(os.getpid())}
        self.presence = self.path / f"at-{uuid.uuid4().hex}.json"

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
            self._drop(self._file(item))

    def others(self, here: bool = False) -> bool:
        """Is another process at work, as far as can be known? `here`: on this machine, of which it is known."""
        files = [file for file in self.path.glob("at-*.json") if file != self.presence]
        holders = [(file, _holder(file)) for file in files]
        return any(self._taken(f) for f, who in holders if not here or (who and who.get("host") == self.me["host"]))

    @contextlib.contextmanager
    def renewing(self) -> Iterator[None]:
        """Be at work here: renew what is held from time to time, and give all of it back at the end."""
        self.presence.write_text(json.dumps(self.me))
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT):
                for file in [self.presence, *self.held]:
                    with contextlib.suppress(OSError):
                        if self._ours(file):
                            os.utime(file)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            for file in [self.presence, *self.held]:
                self._drop(file)

    def _file(self, item: Item) -> Path:
        return self.path / f"{item.index}.json"

    def _drop(self, file: Path) -> None:
        """Give up a lease, if it is still ours: it may have run out while this process was stopped."""
        self.held.discard(file)
        with self.lock:
            if self._ours(file):
                file.unlink(missing_ok=True)

    def _ours(self, file: Path) -> bool:
        return _holder(file) == self.me

    def _taken(self, file: Path) -> bool:
        """Is there a lease whose holder is alive, as far as can be known? On this machine it is known; of others the lease runs
        out."""
        holder = _holder(file)
        if holder is None:
            return False
        if holder.get("host") == self.me["host"]:
            return _lives(holder)
        try:
            return self._now() - file.stat().st_mtime < LEASE
        except OSError:
            return False

    def _now(self) -> float:
        """The time by the clock that dates the leases: of who keeps the files, which may be another machine."""
        clock = self.path / "clock"
        clock.touch()
        return clock.stat().st_mtime


def _holder(file: Path) -> dict[str, Any] | None:
    """Who has a lease; None of none, or of one that was being written when its holder was killed."""
    try:
        told = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def _host() -> str:
    """This machine since it was started, and where its processes are numbered: containers may share a name."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _born(pid: int) -> float:
    """When a process began: in ticks since the machine did, where that is told, since clocks are put right now and then."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return float(psutil.Process(pid).create_time())


def _lives(holder: dict[str, Any]) -> bool:
    """Is it that process, and no other one with its number?"""
    try:
        process = psutil.Process(int(holder["pid"]))
        dead = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)  # nobody has asked how it ended yet
        return not dead and abs(_born(process.pid) - float(holder["born"])) < 2
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def rank() -> tuple[int, int]:
    """Which process this is of how many, as torchrun and accelerate say it; (0, 1) for one alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def has_spare_cores() -> bool:
    """Does this machine have more cores for this process than torch computes with?"""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.get_num_threads()


def local_device() -> str:
    """The accelerator of this process, one for each on a machine; the CPU without any."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    own = os.environ.get("LOCAL_RANK")
    return "cuda" if own is None else f"cuda:{int(own) % torch.cuda.device_count()}"
