"""A batch: what is missing in a folder, done by as many processes as there are; what fails is noted, and the rest goes on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from diffsteer.folder import ERRORS, Folder
from diffsteer.holdout import DriftWarning
from diffsteer.prompts import Item
from diffsteer.types import DiffsteerError, FailedError, PromptError, RewardError

if TYPE_CHECKING:
    from diffsteer.run import SteeredOutput

# Failures in a row, all alike, after which a process tries no more: where it has done nothing yet, and where it has.
ALIKE, MANY = 3, 25
SOON, LATER = 0.1, 2.0  # seconds between looks at what others have


class InARow:
    """Failures of this process since it did something, all of one kind: a broken one would fail whatever is left."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.worked = False

    def done(self) -> None:
        self.worked, self.kinds = True, []

    def hopeless(self, error: Exception, prompts: int) -> bool:
        """Is it so, after one more?"""
        self.kinds.append(type(error).__name__)
        return len(set(self.kinds)) == 1 and len(self.kinds) >= (MANY if self.worked else min(ALIKE, prompts))


def generate(
    run: Callable[[Sequence[Item]], SteeredOutput],
    folder: Folder,
    *,
    seed: int,
    output: str,
    batch: int = 1,
    done: Callable[[int], None] | None = None,
) -> None:
    """Do what is missing in a folder, `batch` prompts at a time, and finish it. Prompts for which the same is asked run
    together. One that fails is noted, and the others go on; of a batch that fails, each is tried alone.

    Args:
        run: makes some items, for which the same is asked. output: as the pipeline is told.
        done: called with the number of prompts that were just finished.

    Raises:
        FailedError: some prompts failed.
        DiffsteerError: what is wrong with more than a prompt; everything that was finished before stays, in the folder.
    """
    row = InARow()
    with folder.leases.renewing():
        folder.start()
        for items in _claims(folder, batch):
            try:
                _one(run, folder, items, seed, output)
                row.done()
            except (DiffsteerError, OSError) as error:
                if not isinstance(error, RewardError | PromptError):
                    raise  # no other prompt would fare better
                _alone(run, folder, items, seed, output, error, row)
            except Exception as error:
                _alone(run, folder, items, seed, output, error, row)
            folder.leases.release(items)
            if done is not None:
                done(len(items))
    folder.finish()
    if folder.failed:
        first = next(iter(folder.failed.values()))
        raise FailedError(
            f"{len(folder.failed)} of {len(folder.items)} prompts failed, see {ERRORS}; the first was {first['prompt']!r}: "
            f"{first['error']}"
        )


def _claims(folder: Folder, size: int) -> Iterator[list[Item]]:
    """Items that are ours to do, until nothing is left; where others have all of it, it is waited for: they may be gone."""
    pause = SOON
    while (items := folder.claim(size)) != []:
        if items is None:
            time.sleep(pause)
            pause = min(2 * pause, LATER)
        else:
            pause = SOON
            yield items


def _one(run: Callable[[Sequence[Item]], SteeredOutput], folder: Folder, items: list[Item], seed: int, output: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)  # the folder is looked at as a whole
        out = run(items)
    folder.add(items, out, seed, output)
    if any(found.stopped == "interrupted" for found in out.trace.searches):
        raise KeyboardInterrupt


def _alone(
    run: Callable[[Sequence[Item]], SteeredOutput],
    folder: Folder,
    items: list[Item],
    seed: int,
    output: str,
    error: Exception,
    row: InARow,
) -> None:
    """Items of a batch that failed, each by itself; those that fail again are noted.

    Args:
        row: the errors since something was done.

    Raises:
        Exception: what they fail with, where nothing works in this process (any more).
    """
    for item in items:
        mine = error
        if len(items) > 1:
            try:
                _one(run, folder, [item], seed, output)
                row.done()
                continue
            except (DiffsteerError, OSError) as again:
                if not isinstance(again, RewardError | PromptError):
                    raise
                mine = again
            except Exception as again:
                mine = again
        folder.fail(item, mine)
        if row.hopeless(mine, len(folder.items)):
            raise mine
