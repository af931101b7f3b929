"""Processes that end with the one they work for, however that one ends, and that let flow runs end first.

    python -m flows.running.supervisor PID prefect ...    Prefect's command line, until process PID is gone or SIGTERM comes
    end_with_worker()                                     in a flow run: a worker that was killed takes its run along

Prefect's process worker kills its flow runs when it is told to end. Here they get SIGTERM and time before the worker does:
a training writes a checkpoint, and every run reports how it ended.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import psutil

LOOK_SECONDS = 0.5
RUN_SECONDS = 40
"""For flow runs to end in."""
END_SECONDS = 10
"""For Prefect's own process, after them."""
INNER = "inner"


class WorkerGone(BaseException):
    """The worker that started this flow run is gone; no error of the flow's, so nothing in it should catch this."""


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


def supervise(parent: int, command: list[str]) -> int:
    """Run Prefect's command line until it ends, the parent is gone, or SIGTERM or SIGINT comes; its exit code."""
    asked = threading.Event()

    def ask(_signal: int, _frame: FrameType | None) -> None:
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    inner = [sys.executable, "-m", "flows.running.supervisor", str(os.getpid()), INNER, *command]
    process = subprocess.Popen(inner, start_new_session=True)
    while process.poll() is None:
        if asked.wait(LOOK_SECONDS) or os.getppid() != parent:
            _end(psutil.Process(process.pid))
    return process.returncode


def _end(process: psutil.Process) -> None:
    """First the flow runs, then the process itself; each is asked, then killed."""
    try:
        _ask(process.children(recursive=True), RUN_SECONDS)
    finally:
        _ask([process], END_SECONDS)


def _ask(processes: list[psutil.Process], seconds: float) -> None:
    for process in processes:
        process.terminate()
    _, left = psutil.wait_procs(processes, seconds)
    for process in left:
        process.kill()
    psutil.wait_procs(left, END_SECONDS)


def _run_inner(parent: int, command: list[str]) -> None:
    when_parent_is_gone(parent, lambda: os.kill(os.getpid(), signal.SIGTERM))
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if sys.argv[2] == INNER:
        _run_inner(int(sys.argv[1]), sys.argv[3:])
    else:
        sys.exit(supervise(int(sys.argv[1]), sys.argv[2:]))
