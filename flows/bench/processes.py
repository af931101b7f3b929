"""Run a command as a whole process and say what it took: seconds, and the most memory of the process tree."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from tasks.refs import PipelineError

SAMPLE_SECONDS = 0.05
FIELDS = ("VmRSS", "RssAnon")


class Cost(NamedTuple):
    """Time and memory that a process tree took; memory is sampled, and is the largest sum over the tree."""

    seconds: float
    cpu_seconds: float
    """Of all cores; tells more than `seconds` does where other work is going on."""
    peak_rss_bytes: int
    """Pages of mapped files included, which the kernel takes back when it needs them."""
    peak_anonymous_bytes: int
    output: str


def run_process(command: list[str], directory: Path, environment: Mapping[str, str]) -> Cost:
    """Run it to its end, in a directory.

    Raises:
        PipelineError: with the end of its log, when it fails.
    """
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    process = subprocess.Popen(
        command, cwd=directory, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ended, peaks = threading.Event(), dict.fromkeys(FIELDS, 0)
    watcher = threading.Thread(target=_watch, args=(process.pid, ended, peaks))
    watcher.start()
    try:
        output, log = process.communicate()
    finally:
        ended.set()
        watcher.join()
    if process.returncode:
        raise PipelineError(f"{' '.join(command)}: exit code {process.returncode}; expected 0.\n{log[-2000:]}")
    return Cost(time.perf_counter() - started, _cpu_seconds() - cpu_started, peaks["VmRSS"], peaks["RssAnon"], output)


def _cpu_seconds() -> float:
    """Of all children that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watch(pid: int, ended: threading.Event, peaks: dict[str, int]) -> None:
    while not ended.wait(SAMPLE_SECONDS):
        sizes = [_memory(member) for member in _tree(pid)]
        for name in FIELDS:
            peaks[name] = max(peaks[name], sum(size[name] for size in sizes))


def _tree(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _memory(pid: int) -> dict[str, int]:
    """Bytes of a process by kind. Source: proc_pid_status(5)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        lines = list[str]()
    found = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(found.get(name, "0 kB").split()[0]) for name in FIELDS}


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs a module with this Python."""
    return [sys.executable, "-m", name, *map(str, arguments)]
