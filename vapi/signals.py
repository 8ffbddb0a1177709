"""Signals and exit codes of processes that run others."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

MISTAKE = 2
"""Exit code of a mistake that the message names: another start would say the same."""
STOPPED = (os.EX_TEMPFAIL, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a process that ended because somebody asked it to."""


@contextlib.contextmanager
def handed_on(deliver: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C for this process go to ``deliver``. What it starts needs a session of its own, or they arrive there twice."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        deliver(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(returned: int) -> int:
    """A process's return code as a shell gives it: 128 and the signal's number if one ended it."""
    return returned if returned >= 0 else 128 - returned
