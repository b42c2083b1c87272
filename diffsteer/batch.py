"""A batch: what is missing in a folder, done by as many processes as there are; what fails is noted, and the rest goes on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffsteer.folder import ERRORS, Folder
from diffsteer.holdout import DriftWarning
from diffsteer.prompts import Item
from diffsteer.types import DiffsteerError, FailedError, PromptError, RewardError

if TYPE_CHECKING:
    from diffsteer.run import SteeredOutput

Begin = Callable[[Sequence[Item]], Callable[[], "SteeredOutput"]]
# Failures in a row, all alike, after which a process looks elsewhere: where it has done nothing yet, and where it has.
ALIKE, MANY = 3, 25
ELSEWHERE = (0.5, 1.0)  # of what is left: in the middle, and last; where these fail, too, it tries no more
SOON, LATER = 0.1, 2.0  # seconds between looks at what others have


class InARow:
    """Failures of this process one after another, all of one kind: a broken one would fail whatever is left. A few wrong
    prompts that follow each other are told from that by trying others."""

    def __init__(self) -> None:
        self.kind, self.count = "", 0
        self.worked = False

    def done(self) -> None:
        self.worked, self.count = True, 0

    def failed(self, error: Exception) -> None:
        """One more."""
        kind = type(error).__name__
        self.kind, self.count = kind, self.count + 1 if kind == self.kind else 1

    def hopeless(self, prompts: int) -> bool:
        """Is it so?"""
        return self.count >= min(self._most + len(ELSEWHERE), prompts)

    def suspicious(self) -> bool:
        """Is it time to try others?"""
        return self.count >= self._most

    def at(self) -> float:
        """Where among what is left the next prompt is to be taken from."""
        return ELSEWHERE[min(self.count - self._most, len(ELSEWHERE) - 1)] if self.suspicious() else 0.0

    @property
    def _most(self) -> int:
        return MANY if self.worked else ALIKE


@dataclass
class Batch:
    """Some items on their way: all but what `begin` left, which `ends` does, in this thread or another."""

    items: list[Item]
    ends: Future[None]


@dataclass
class Maker:
    """What makes the items of a folder, and notes those that fail.

    While some are made, what was made before is written by another thread: at most one batch is on its way there.

    Args:
        begin: makes some items, for which the same is asked, up to their last states; what it returns decodes and scores them.
        ahead: that, too, is left to the other thread. done: see `generate`.
    """

    begin: Begin
    folder: Folder
    seed: int
    output: str
    ahead: bool
    done: Callable[[int], None] | None
    row: InARow = field(default_factory=InARow)
    before: Batch | None = None  # what is on its way
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "diffsteer writer"))

    def make(self, items: list[Item]) -> None:
        """Begin some items; end those before."""
        try:
            rest = self.begin(items)
            made = None if self.ahead else rest()
        except Exception as error:
            self.settle()
            self._failed(items, error)
        except KeyboardInterrupt:
            self._stop()
            raise
        else:
            batch = (items, rest if made is None else lambda: made)
            try:
                self.settle()
            except BaseException:
                self._send(*batch)  # it was made: it is not thrown away
                self._stop()
                raise
            self._send(*batch)
            if made is not None and made.interrupted:  # nothing more is begun
                self.settle()

    def _send(self, items: list[Item], rest: Callable[[], SteeredOutput]) -> None:
        self.before = Batch(items, self.writer.submit(self._end, items, rest))

    def _stop(self) -> None:
        """Wait for what is on its way. What fails there is tried again by the run that goes on."""
        if self.before is not None:
            wait([self.before.ends])

    def settle(self) -> bool:
        """Wait for what is on its way; was there anything?"""
        batch, self.before = self.before, None
        if batch is None:
            return False
        try:
            batch.ends.result()
        except Exception as error:
            self._failed(batch.items, error)
        else:
            self.row.done()
            self._over(batch.items)
        return True

    def _end(self, items: list[Item], rest: Callable[[], SteeredOutput]) -> None:
        out = rest()
        self.folder.add(items, out, self.seed, self.output)
        if out.interrupted:
            raise KeyboardInterrupt

    def _failed(self, items: list[Item], error: Exception) -> None:
        """Of a batch that failed each item is tried alone, and those that fail again are noted; the rest of it is given back
        where others are to be tried first.

        Raises:
            Exception: what they fail with, where nothing works in this process (any more).
        """
        for number, item in enumerate(items, 1):
            mine: Exception | None = error
            if len(items) > 1 and not _of_all(error):
                try:
                    self._end([item], self.begin([item]))
                    self.row.done()
                    mine = None
                except Exception as again:
                    mine = again
            if mine is None:
                continue
            if _of_all(mine):
                raise self._ended(mine)  # no other prompt would fare better
            self.folder.fail(item, mine)
            self.row.failed(mine)
            if self.row.hopeless(len(self.folder.items)):
                raise mine
            if self.row.suspicious():
                self.folder.leases.release(items[number:])
                return self._over(items[:number])
        self._over(items)

    def _ended(self, error: Exception) -> Exception:
        """What went well and fails now is no wrong input."""
        return FailedError(str(error)) if self.row.worked and isinstance(error, DiffsteerError) else error

    def _over(self, items: list[Item]) -> None:
        self.folder.leases.release(items)
        if self.done is not None:
            self.done(len(items))


def _of_all(error: Exception) -> bool:
    """Is it an error of the settings or the disk, not of a prompt?"""
    return isinstance(error, DiffsteerError | OSError) and not isinstance(error, RewardError | PromptError)


def generate(
    begin: Begin,
    folder: Folder,
    *,
    seed: int,
    output: str,
    batch: int = 1,
    ahead: bool = False,
    done: Callable[[int], None] | None = None,
) -> None:
    """Do what is missing in a folder, `batch` prompts at a time, and finish it. Prompts for which the same is asked run
    together. One that fails is noted, and the others go on; of a batch that fails, each is tried alone.

    Args:
        begin: makes some items, for which the same is asked, up to their last states; what it returns does the rest.
        output: as the pipeline is told. ahead: that rest is done while the next items are begun.
        done: called with the number of prompts that were just finished.

    Raises:
        FailedError: some prompts failed.
        DiffsteerError: what is wrong with more than a prompt; everything that was finished before stays, in the folder.
    """
    maker = Maker(begin, folder, seed, output, ahead, done)
    with folder.leases.renewing(), warnings.catch_warnings(), maker.writer:
        warnings.simplefilter("ignore", DriftWarning)  # the folder is looked at as a whole
        folder.start()
        for items in _claims(maker, batch):
            maker.make(items)
        maker.settle()
    folder.finish()
    if folder.failed:
        first = next(iter(folder.failed.values()))
        raise FailedError(
            f"{len(folder.failed)} of {len(folder.items)} prompts failed, see {ERRORS}; the first was {first['prompt']!r}: "
            f"{first['error']}"
        )


def _claims(maker: Maker, size: int) -> Iterator[list[Item]]:
    """Items that are ours to do, until nothing is left; where others have all of it, it is waited for: they may be gone."""
    pause = SOON
    while (items := maker.folder.claim(size, maker.row.at())) != []:
        if items is not None:
            pause = SOON
            yield items
        elif not maker.settle():
            time.sleep(pause)
            pause = min(2 * pause, LATER)
