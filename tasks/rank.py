"""One process of a training on several devices: `python -m tasks.rank FOLDER`, started by tasks/training/parallel/launch.py.

It reads FOLDER/job.json and trains as on one device; how it shares the work with the others is in tasks/training/parallel.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tasks.caching.code.loading import collect_rarely
from tasks.caching.context import observing
from tasks.caching.events import Event, StepsLogged
from tasks.caching.files import space_checked
from tasks.finetune import load_backend
from tasks.refs import home
from tasks.training.backend import Job
from tasks.training.inference.scoring import PARENT_DEATH_SIGNAL
from tasks.training.memory import training_errors_explained
from tasks.training.parallel.launch import TOLD

VISIBLE = "CUDA_VISIBLE_DEVICES"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where torchrun's agent looks for the error of a process. Source: torch.distributed.elastic.multiprocessing.errors."""


class PassedOn:
    """Writes each logged step for the process that started this one."""

    def __init__(self, told: Path) -> None:
        self._file = told.open("a", encoding="utf-8", buffering=1)

    def hear(self, event: Event) -> None:
        """Write a logged step."""
        if isinstance(event, StepsLogged):
            self._file.write(json.dumps(asdict(event)) + "\n")

    def close(self) -> None:
        """All is written."""
        self._file.close()


def train_rank(folder: Path) -> None:
    """Train as one process of several."""
    import torch.distributed as dist

    job, rank = read_job(folder), os.environ["RANK"]
    told = observing(*([PassedOn(folder / TOLD)] if rank == "0" else []))
    with told, space_checked(home()), training_errors_explained(job):
        peak = load_backend(job.config.backend).train(job)
    (folder / f"peak-{rank}.json").write_text(json.dumps(peak))
    dist.destroy_process_group()


def read_job(folder: Path) -> Job:
    """The training that the processes share."""
    return TypeAdapter(Job).validate_json((folder / "job.json").read_bytes())


def see_one_device(device: str) -> None:
    """Leave this process its own GPU alone, as if the host had no other; on a CPU its share of the cores."""
    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "cuda":
        gpus = os.environ.get(VISIBLE) or ",".join(map(str, range(ranks)))
        os.environ |= {VISIBLE: gpus.split(",")[local], "LOCAL_RANK": "0"}
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))


def make_error_handler() -> Any:
    """torch's, whose file is there once it is whole: the agent may read it, or kill this process, at any moment."""
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

    class WholeErrors(ErrorHandler):
        def record_exception(self, e: BaseException) -> None:
            target = os.environ[ERROR_FILE]
            part = Path(f"{target}.part")
            os.environ[ERROR_FILE] = str(part)
            super().record_exception(e)
            part.replace(target)

    return WholeErrors()


def run_rank(folder: Path) -> None:
    """Train, and leave torchrun's agent word of an error."""
    see_one_device(read_job(folder).resolved.device)  # before torch looks
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        record(train_rank, make_error_handler())(folder)
    except BaseException:
        os._exit(1)  # at once: the others may not come any more to where they would be waited for


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    collect_rarely()
    run_rank(Path(sys.argv[1]))
