"""Warnings that name the line of whoever called the library, not one of its own."""

from __future__ import annotations

import sys
import traceback
import warnings

OURS = __name__.partition(".")[0]


class Notice(UserWarning):
    """What a run has to say to whoever called it."""


def warn(message: str, category: type[UserWarning] = Notice) -> None:
    """Warn at the line that called this package, also where a pipeline stands between (it calls a scheduler of ours). Python
    shows a text once a line: say numbers in it, if it is to be seen again."""
    frames = [frame for frame, _ in traceback.walk_stack(sys._getframe())]  # this one first
    ours = [i for i, f in enumerate(frames, 1) if f.f_globals.get("__name__", "").partition(".")[0] == OURS]
    warnings.warn(message, category, stacklevel=ours[-1] + 1)
