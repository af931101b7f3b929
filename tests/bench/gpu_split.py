"""Where a step of one training on several GPUs spends its time: kernels, exchange, waiting for the slowest process, nothing.

    python -m tests.bench.gpu_split MODEL_DIR DATA_DIR DEVICE SIDE DEVICES STEP_PACKS STEPS WORK

The same training as tests/bench/gpu_devices.py makes, each process under torch's profiler for its last steps; prints a line
`RESULT {...}`, milliseconds a step.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

PROFILED = 10
"""The last steps of a training."""
EXCHANGE = "nccl"
"""How the names of kernels begin that exchange gradients; they also wait for the other processes."""


def split(
    model: Path, data: Path, device: str, side: str, devices: int, step_packs: int, steps: int, work: Path
) -> dict[str, Any]:
    """Train, and put together what the processes saw."""
    from tasks.training.parallel import launch
    from tasks.training.watch import LOG, read_log
    from tests.bench.gpu_devices import WARM, train_on_some

    os.environ |= {"PROFILED_UNTIL": str(steps), "PROFILED_INTO": str(work)}
    launch.PROCESS = "tests.bench.gpu_split"
    with profiled("0") if devices == 1 else nullcontext():
        train_on_some(model, data, device, side, devices, step_packs, steps, work)
    timed = read_log(work / LOG)[WARM - 1 : -PROFILED]
    seen = [json.loads((work / f"split-{rank}.json").read_text()) for rank in range(devices)]
    exchange = min(rank["exchange_and_waiting"] for rank in seen)
    return {
        "tokens_per_second": round(sum(step.tokens for step in timed[1:]) / (timed[-1].seconds - timed[0].seconds), 1),
        "step": max(rank["step"] for rank in seen),
        "kernels": [rank["kernels"] for rank in seen],
        "exchange": exchange,
        "waiting": [round(rank["exchange_and_waiting"] - exchange, 2) for rank in seen],
        "nothing": [rank["nothing"] for rank in seen],
    }


def shares(kernels: Iterable[tuple[str, int, int]], steps: int) -> dict[str, float]:
    """Milliseconds a step of (name, start, end) in nanoseconds: when kernels ran, when only an exchange did, when nothing did.

    >>> shares([("matmul", 0, 4_000_000), ("ncclAllReduce", 3_000_000, 6_000_000), ("add", 8_000_000, 10_000_000)], 1)
    {'step': 10.0, 'kernels': 6.0, 'exchange_and_waiting': 2.0, 'nothing': 2.0}
    """
    ordered = sorted(kernels, key=lambda kernel: kernel[1])
    wall = max(end for _, _, end in ordered) - ordered[0][1]
    computing = covered([kernel for kernel in ordered if not kernel[0].startswith(EXCHANGE)])
    busy = covered(ordered)
    parts = {"step": wall, "kernels": computing, "exchange_and_waiting": busy - computing, "nothing": wall - busy}
    return {name: round(value / 1e6 / steps, 2) for name, value in parts.items()}


def covered(ordered: Sequence[tuple[str, int, int]]) -> int:
    """Nanoseconds in which at least one of the kernels ran."""
    total, until = 0, 0
    for _, start, end in ordered:
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


@contextmanager
def profiled(rank: str) -> Iterator[None]:
    """Write split-RANK.json of the last steps of the training in this process."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from tasks.training.watch import Watch

    kind, wait = ("CUDA", torch.cuda.synchronize) if torch.cuda.is_available() else ("CPU", lambda: None)
    last, profiler, step_ended = (
        int(os.environ["PROFILED_UNTIL"]),
        profile(activities=[getattr(ProfilerActivity, kind)]),
        Watch.step_ended,
    )

    def watched(watch: Watch, step: int, held_out_loss: float | None) -> None:
        step_ended(watch, step, held_out_loss)
        if step in (last - PROFILED, last):
            wait()
            profiler.start() if step < last else profiler.stop()

    Watch.step_ended = watched
    try:
        yield
    finally:
        Watch.step_ended = step_ended
    events = profiler.profiler.kineto_results.events()
    kernels = [(event.name(), event.start_ns(), event.end_ns()) for event in events if str(event.device_type()).endswith(kind)]
    Path(os.environ["PROFILED_INTO"], f"split-{rank}.json").write_text(json.dumps(shares(kernels, PROFILED)))


def profile_rank(folder: Path) -> None:
    """Train as one process of several, its last steps profiled."""
    from tasks.rank import read_job, see_one_device, train_rank

    see_one_device(read_job(folder).resolved.device)  # before torch looks
    with profiled(os.environ["RANK"]):
        train_rank(folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if "RANK" in os.environ:
        profile_rank(Path(sys.argv[1]))
    else:
        model_dir, data_dir, device, held, *sizes, scratch = sys.argv[1:]
        count, packs, total = map(int, sizes)
        print("RESULT", json.dumps(split(Path(model_dir), Path(data_dir), device, held, count, packs, total, Path(scratch))))
