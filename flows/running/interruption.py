"""Ctrl-C, SIGTERM and a terminal that is closed end this process soon, wherever it is; a second Ctrl-C at once.

A training hears of them first and writes a checkpoint (tasks/training/trainer.py), a flow of SIGTERM, by Prefect, and tells
its server; both then let the signal do what it does here.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TWICE_SECONDS = 0.5
"""`timeout` and others that pass signals on send them to a process and to its group: the same one twice."""


class Interrupted(BaseException):
    """A signal told this process to end; no error of what it did, so nothing in there should catch this."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def be_interruptible() -> None:
    """Let the first signal raise Interrupted, and SIGINT after it end the process as it is: what is kept is kept by then.

    SIGINT counts where a shell started this in the background, too; SIGHUP not under `nohup`.
    """
    first: list[float] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            raise Interrupted(number)
        if number == signal.SIGINT and time.monotonic() - first[0] > TWICE_SECONDS:
            os._exit(128 + number)

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)
