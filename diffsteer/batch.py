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

ALIKE = 3  # failures, all alike and nothing done yet, after which the rest is not tried
SOON, LATER = 0.1, 2.0  # seconds between looks at what others have


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
    folder.start()
    kinds: set[str] = set()
    with folder.leases.renewing():
        for items in _claims(folder, batch):
            try:
                _one(run, folder, items, seed, output)
            except (DiffsteerError, OSError) as error:
                if not isinstance(error, RewardError | PromptError):
                    raise  # no other prompt would fare better
                _alone(run, folder, items, seed, output, error, kinds)
            except Exception as error:
                _alone(run, folder, items, seed, output, error, kinds)
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
    kinds: set[str],
) -> None:
    """Items of a batch that failed, each by itself; those that fail again are noted.

    Args:
        kinds: of errors that there were before.

    Raises:
        Exception: what they fail with, where nothing works at all.
    """
    for item in items:
        mine = error
        if len(items) > 1:
            try:
                _one(run, folder, [item], seed, output)
                continue
            except (DiffsteerError, OSError) as again:
                if not isinstance(again, RewardError | PromptError):
                    raise
                mine = again
            except Exception as again:
                mine = again
        folder.fail(item, mine)
        hopeless = len(folder.failed) >= min(ALIKE, len(folder.items)) and not folder.entries
        if hopeless and len({type(mine).__name__, *kinds}) == 1:
            raise mine
        kinds.add(type(mine).__name__)
