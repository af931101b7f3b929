"""The GPUs of this host: which are there, and one training to a GPU at a time, whichever server sent it.

A work pool's limit holds on one server only; the lock here is the host's, all users' alike, and goes by the GPU's UUID.
"""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout, UnixFileLock

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
VISIBLE = "CUDA_VISIBLE_DEVICES"
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,driver_version,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Gpu:
    """A line of nvidia-smi."""

    index: str
    uuid: str
    name: str
    driver: str
    memory_mib: int | None
    """None where it shares the main memory."""


def list_gpus() -> list[Gpu]:
    """All GPUs of the host in nvidia-smi's order; none without a driver."""
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = ([field.strip() for field in line.split(",")] for line in answer.splitlines() if line.count(",") == 4)
    return [
        Gpu(index, uuid, name, driver, int(memory) if memory.isdecimal() else None) for index, uuid, name, driver, memory in rows
    ]


def visible_gpus() -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves to this process."""
    wanted = os.environ.get(VISIBLE)
    if wanted is None:
        return list_gpus()
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    return [gpu for gpu in list_gpus() if gpu.index in names or any(gpu.uuid.startswith(name) for name in names)]


@contextmanager
def one_gpu(device: str) -> Generator[None]:
    """Hold one visible GPU of the host for the block and hide the others; nothing for `cpu` or without a GPU.

    Waits while other trainings hold them all. Call it before CUDA starts.
    """
    gpus = visible_gpus() if device == "cuda" else []
    if not gpus:
        yield
        return
    before = {VISIBLE: os.environ[VISIBLE]} if VISIBLE in os.environ else {}
    gpu, lock = _first_free(gpus)
    try:
        os.environ[VISIBLE] = gpu.uuid
        yield
    finally:
        os.environ.pop(VISIBLE, None)
        os.environ.update(before)
        lock.release()


def _first_free(gpus: Sequence[Gpu]) -> tuple[Gpu, UnixFileLock]:
    told = False
    while True:
        for gpu in gpus:
            lock = _lock_of(gpu)
            with suppress(Timeout):
                lock.acquire(timeout=0)
                return gpu, lock
        if not told:
            logger.warning("waits for a GPU: another training holds %s.", ", ".join(f"GPU {gpu.index}" for gpu in gpus))
            told = True
        time.sleep(LOOK_SECONDS)


def _lock_of(gpu: Gpu) -> UnixFileLock:
    """One that every user of the host may take, whatever the umask of the first."""
    path = Path(tempfile.gettempdir()) / f"amazon-ft-{gpu.uuid}.lock"
    return UnixFileLock(path, mode=0o666, fallback_to_soft=False)
