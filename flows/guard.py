"""Processes that end with the one they work for, however that one ends.

python -m flows.guard PID prefect worker start ...      the prefect command line, ended when process PID is gone
end_with_worker()                                       in a flow run: a worker that was killed takes its run along
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable

LOOK_SECONDS = 0.5


class WorkerGone(BaseException):  # not an error of the flow's: nothing in it should catch this
    """The worker that started this flow run is gone."""


_worker_gone = threading.Event()


def when_parent_is_gone(parent: int, act: Callable[[], None]) -> None:
    """Call `act` once this process has lost its parent."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        act()

    threading.Thread(target=look, name="guard", daemon=True).start()


def end_with_worker() -> None:
    """Send this process SIGTERM, which leaves a checkpoint, once the worker that started it is gone.

    Without its worker a run can neither be cancelled nor be counted against the pool's limit. In a container the parent
    never changes, and nothing happens.
    """

    def end() -> None:
        _worker_gone.set()
        os.kill(os.getpid(), signal.SIGTERM)

    when_parent_is_gone(os.getppid(), end)


def worker_is_gone() -> bool:
    """Whether that is why a SIGTERM came."""
    return _worker_gone.is_set()


def main(parent: int, command: list[str]) -> None:
    """Run a Python module's command line until the parent is gone."""
    when_parent_is_gone(parent, lambda: os.kill(os.getpid(), signal.SIGTERM))
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
