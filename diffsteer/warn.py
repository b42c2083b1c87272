"""Warnings that name the line of whoever called the library, not one of its own."""

from __future__ import annotations

import sys
import warnings

OURS = __name__.partition(".")[0]


class Notice(UserWarning):
    """What a run has to say to whoever called it."""


def warn(message: str) -> None:
    """Warn at the nearest line outside of this package. Python shows a text once a line: say numbers in it, if it is to be seen
    again."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, Notice, stacklevel=level)
