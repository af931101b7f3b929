"""Processes that end with the one they work for, however that one ends, and that let flow runs end first.

    python -m flows.running.supervisor PID prefect ...         Prefect's command line, until process PID is gone or SIGTERM comes
    python -m flows.running.supervisor container prefect ...   the same in a container, where SIGTERM comes to this process alone
    python -m flows.running.supervisor PID inner uvicorn ...   a module's command line in this very process, until PID is gone
    end_with_worker()                                          in a flow run: a worker that was killed takes its run along

Prefect's process worker kills its flow runs when it is told to end. Here they get SIGTERM and time before the worker does:
a training writes a checkpoint, and every run reports how it ended.

This is the only place that watches a parent. One more process ends with its own, tasks/training/inference/scoring.py: stages
know nothing of flows, and have nothing to let end first, so there the kernel is asked to kill it (prctl, PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

import psutil

from flows.running.quiet import log_briefly
from tasks.caching.code.loading import collect_rarely

LOOK_SECONDS = 0.5
RUN_SECONDS = 40
"""For flow runs to end in."""
END_SECONDS = 10
"""For Prefect's own process, after them."""
INNER, CONTAINER = "inner", "container"


class WorkerGone(BaseException):
    """The worker that started this flow run is gone; no error of the flow's, so nothing in it should catch this."""


_worker_gone = threading.Event()


def guarded(*command: str) -> list[str]:
    """The command line of a module, such as `prefect server start`, that ends with this process."""
    return [sys.executable, "-m", "flows.running.supervisor", str(os.getpid()), *command]


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


def supervise(parent: int, command: Sequence[str]) -> int:
    """Run Prefect's command line until it ends, the parent is gone, or SIGTERM or SIGINT comes; its exit code, 0 if told."""
    told = threading.Event()

    def tell(_signal: int, _frame: FrameType | None) -> None:
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)
    when_parent_is_gone(parent, told.set)
    process = psutil.Popen(guarded(INNER, *command), start_new_session=True)
    while process.poll() is None:
        if told.wait(LOOK_SECONDS):
            _end_runs_first(process)
            return 0
    return process.returncode


def _end_runs_first(process: psutil.Process) -> None:
    try:
        with suppress(psutil.NoSuchProcess):
            end_processes(process.children(recursive=True), RUN_SECONDS)
    finally:
        end_processes([process], END_SECONDS)


def end_processes(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Ask processes to end and wait for them; kill what is left after so many seconds."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, seconds)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, END_SECONDS)


def _run_inner(parent: int, command: Sequence[str]) -> None:
    """Be a module's command line; without the parent it gets SIGTERM, and no more than END_SECONDS."""

    def end() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(END_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    when_parent_is_gone(parent, end)
    log_briefly()
    collect_rarely()
    sys.argv = [*command]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if sys.argv[2] == INNER:
        _run_inner(int(sys.argv[1]), sys.argv[3:])
    else:
        sys.exit(supervise(os.getppid() if sys.argv[1] == CONTAINER else int(sys.argv[1]), sys.argv[2:]))
