"""Warnings that name the line of whoever called the library, not one of its own."""

from __future__ import annotations

import sys
import warnings

OURS = __name__.partition(".")[0]


class Notice(UserWarning):
    """What a run has to say to whoever called it."""


def warn(message: str, category: type[UserWarning] = Notice) -> None:
    """Warn at the line that called this package, also where a pipeline stands between (it calls a scheduler of ours). Python
    shows a text once a line: say numbers in it, if it is to be seen again."""
    level, depth, frame = 1, 1, sys._getframe()
    while frame.f_back is not None:
        ours = frame.f_globals.get("__name__", "").partition(".")[0] == OURS
        frame, depth = frame.f_back, depth + 1
        level = depth if ours else level
    warnings.warn(message, category, stacklevel=level)
