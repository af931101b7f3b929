"""The GPUs of this host: which are there, and each for one training at a time, whichever server sent it.

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

from tasks.config import FinetuneConfig
from tasks.refs import ConfigError

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


def gpus_wanted(config: FinetuneConfig) -> int:
    """How many GPUs a training is to have: of `auto` all that are visible, as far as a step has rows for them."""
    if config.devices == "auto":
        return max(1, min(len(visible_gpus()), config.step_rows))
    return config.devices


@contextmanager
def held_gpus(device: str, count: int = 1) -> Generator[None]:
    """Hold so many visible GPUs of the host for the block and hide the others; nothing for `cpu` or without a GPU.

    Waits while other trainings hold too many of them. Call it before CUDA starts.

    Raises:
        ConfigError: when there are not as many.
    """
    gpus = visible_gpus() if device == "cuda" else []
    if not gpus:
        yield
        return
    if count > len(gpus):
        raise ConfigError(
            f"finetune.devices: too few GPUs here: got {count}; expected at most {len(gpus)}, or auto. "
            "Lower it, or run on a machine with more."
        )
    before = {VISIBLE: os.environ[VISIBLE]} if VISIBLE in os.environ else {}
    held = _wait_for(gpus, count)
    logger.info("holds %s.", ", ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in held))
    try:
        os.environ[VISIBLE] = ",".join(gpu.uuid for gpu in held)
        yield
    finally:
        os.environ.pop(VISIBLE, None)
        os.environ.update(before)
        for lock in held.values():
            lock.release()


def _wait_for(gpus: Sequence[Gpu], count: int) -> dict[Gpu, UnixFileLock]:
    told = False
    while True:
        held = _free(gpus, count)
        if len(held) == count:
            return held
        for lock in held.values():
            lock.release()
        if not told:
            taken = ", ".join(f"GPU {gpu.index}" for gpu in gpus if gpu not in held)
            logger.warning("waits for %s: another training holds %s.", "a GPU" if count == 1 else f"{count} GPUs", taken)
            told = True
        time.sleep(LOOK_SECONDS)


def _free(gpus: Sequence[Gpu], count: int) -> dict[Gpu, UnixFileLock]:
    """At most so many GPUs that nobody else holds.

    One training at a time looks for them: two that each want two could else take one each, for ever.
    """
    held: dict[Gpu, UnixFileLock] = {}
    with _lock_of("gpus"):
        for gpu in gpus:
            lock = _lock_of(gpu.uuid)
            with suppress(Timeout):
                lock.acquire(timeout=0)
                held[gpu] = lock
            if len(held) == count:
                break
    return held


def _lock_of(name: str) -> UnixFileLock:
    """One that every user of the host may take, whatever the umask of the first."""
    path = Path(tempfile.gettempdir()) / f"amazon-ft-{name}.lock"
    return UnixFileLock(path, mode=0o666, fallback_to_soft=False)
