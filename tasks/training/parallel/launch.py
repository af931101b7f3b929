"""Starts a training's processes, one a device, by torchrun's agent, and shows them as one training.

    this process: torchrun's agent -> python -m tasks.rank FOLDER, once a device
    FOLDER/job.json         what to train
    FOLDER/told.jsonl       the logged steps, which the first process tells; passed on here
    FOLDER/peak-RANK.json   the most memory that a process used
    FOLDER/RUN/...          what the processes say, the first one's words apart, and the error of one that failed

The kernel ends the processes when this one dies. SIGTERM is passed on to them: each leaves as it would alone, all after the same
step.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tasks.caching.events import StepsLogged
from tasks.refs import ConfigError, DivergedError, InputError, NoSpaceError, PipelineError
from tasks.training.backend import Job
from tasks.training.checkpoints import describe_kept
from tasks.training.watch import tell_steps

logger = logging.getLogger(__name__)

PROCESS = "tasks.rank"
"""The module that each process runs."""
FOLDER, TOLD = "ranks", "told.jsonl"
LOOK_SECONDS = 0.2
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that torchrun's agent takes over. Source: torch/distributed/launcher/api.py, LaunchConfig.signals_to_handle."""
LOST_PEER = ("Connection", "NCCL", "nccl", "Gloo", "gloo")
"""Words of a library's error when another process is gone."""
LATE_SIGNALS = {"SIGABRT": 3, "SIGTERM": 4}
"""How much weight a signal has that also comes when another process is gone: from NCCL, and from torchrun's agent."""
AT_ONCE_SECONDS = 5
"""Of processes that ended so soon after the first, each may have begun it; the agent kills what is left after 30."""
ERRORS: Mapping[str, type[PipelineError]] = {
    kind.__name__: kind for kind in (PipelineError, ConfigError, InputError, NoSpaceError, DivergedError)
}


def train_on(devices: int, job: Job) -> float:
    """Train on so many devices; the peak of memory in GiB of the fullest.

    Raises:
        PipelineError: what one of the processes raised, or that it was killed.
    """
    folder = job.work / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "job.json").write_bytes(TypeAdapter(Job).dump_json(job))
    logger.info("finetune trains on %d devices.", devices)
    with _passing_on(folder / TOLD):
        start_ranks(devices, job, folder)
    peaks = [json.loads((folder / f"peak-{rank}.json").read_bytes()) for rank in range(devices)]
    logger.info("finetune used at most %s GiB on its devices.", ", ".join(f"{peak:.1f}" for peak in peaks))
    return max(peaks)


def start_ranks(devices: int, job: Job, folder: Path) -> None:
    """Run the processes to their end.

    Raises:
        PipelineError: for the one whose end began it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        with _own_signals():
            launch(devices, folder)
    except ChildFailedError as failed:
        reasons = {rank: Reason.of(failure) for rank, failure in failed.failures.items()}
        raise explain(job, folder, devices, reasons) from None
    except SignalException as received:
        os.kill(os.getpid(), received.sigval)  # now for whoever cares for it here
        raise


def launch(devices: int, folder: Path) -> None:
    """Start the processes and wait for them, as `torchrun --standalone` does."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("agent.server.api", "agent.server.local_elastic_agent", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)  # said once, by `explain`
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=dict.fromkeys(range(1, devices), Std.ALL)),
    )
    elastic_launch(config, sys.executable)("-m", PROCESS, str(folder))


@dataclass(frozen=True)
class Reason:
    """Why a process ended."""

    kind: str
    """The error's class, or the signal's name."""
    text: str
    at: int
    """Seconds of the clock."""
    weight: int
    """The less, the more likely it is what began it: our own errors, a kill, others, those that tell of a lost process."""

    @classmethod
    def of(cls, failure: Any) -> Reason:
        """Of torchrun's ProcessFailure."""
        if failure.exitcode < 0:
            return cls(name := failure.signal_name(), "", failure.timestamp, LATE_SIGNALS.get(name, 1))
        if isinstance(failure.message, str):
            return cls(f"exit code {failure.exitcode}", "", failure.timestamp, 3)
        kind, _, text = failure.message["message"].partition(": ")
        lost = any(word in text for word in LOST_PEER)
        return cls(kind, text, failure.timestamp, 0 if kind in ERRORS else 3 if lost else 2)


def explain(job: Job, folder: Path, devices: int, reasons: Mapping[int, Reason]) -> PipelineError:
    """The error of a training, by the process whose end began it: one that lost another fails too, or is killed in the end."""
    latest = min(reason.at for reason in reasons.values()) + AT_ONCE_SECONDS
    rank, reason = min(
        ((rank, reason) for rank, reason in reasons.items() if reason.at <= latest), key=lambda item: item[1].weight
    )
    if reason.kind == DivergedError.__name__:
        return DivergedError(reason.text)  # of the whole step
    where = f"process {rank} of {devices}"
    if kind := ERRORS.get(reason.kind):
        return kind(f"{reason.text} That was {where}.")
    got = next(iter(f"{reason.kind}: {reason.text}".rstrip(": ").splitlines()))
    memory = " The kernel kills so when the main memory runs out." if reason.kind == "SIGKILL" else ""
    return PipelineError(
        f"finetune: {where} ended early: got {got}; expected it to train to the end.{memory} {describe_kept(job.work)} "
        f"Run again to go on from there; what the processes said is in {folder}."
    )


@contextmanager
def _own_signals() -> Generator[None]:
    """Give the signals back to whom they belonged, for the agent takes them for good."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _passing_on(told: Path) -> Generator[None]:
    """Tell here, meanwhile, what the first process tells."""
    told.touch()
    over = threading.Event()
    thread = threading.Thread(target=copy_context().run, args=(_follow, told, over), name="ranks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _follow(told: Path, over: threading.Event) -> None:
    with told.open(encoding="utf-8") as file:
        begun = ""
        while True:
            is_last = over.wait(LOOK_SECONDS)
            *lines, begun = (begun + file.read()).split("\n")
            for line in lines:
                tell_steps(StepsLogged(**json.loads(line)))
            if is_last:
                return
