"""The fast backend on given packs, as the stage finetune calls it; ends with one line of JSON.

usage: python -m flows.bench.train_ours MODEL_JSON PACKS_ARROW DEVICE HELD STEPS WINDOWS

MODEL_JSON is a reference (tasks/refs.py), HELD a value of finetune.frozen_weights.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from datasets import Dataset

from flows.bench.train import bench_config
from tasks.config import WeightsConfig
from tasks.finetune import load_backend
from tasks.refs import Model
from tasks.training import hardware, memory
from tasks.training.backend import Job, Report
from tasks.training.fast import memory_plan as choice
from tasks.training.fast.backend import measure

STARTED = psutil.Process().create_time()


class Windows:
    """Notes the speed of each logged window, and when it was known."""

    def __init__(self) -> None:
        self.speeds: list[float] = []
        self.times: list[float] = []

    def report(self, report: Report) -> None:
        """A window has ended."""
        self.speeds.append(report.tokens_per_second)
        self.times.append(time.time())

    def close(self) -> None:
        """Nothing is left to do."""


def run(model: Model, packs: Path, device: str, held: str, steps: int, windows: int) -> dict[str, Any]:
    """Train and time."""
    config, told = bench_config(held, steps, windows), Windows()
    resolved = hardware.resolve(config, WeightsConfig(load_in_4bit=False), device)
    shape, free = memory.read_shape(Path(model.path)), hardware.free_gib(device)
    assert shape is not None
    longest = measure(Dataset.from_file(str(packs))).pack
    with TemporaryDirectory() as work:
        chosen = choice.choose(config, resolved, shape, longest, free)
        job = Job(model, packs, True, config, longest, chosen, Path(work))
        peak = load_backend("fast").train(job, told)
    a_step = (told.times[-1] - told.times[0]) / (steps * windows)
    return {
        "windows": [round(speed, 1) for speed in told.speeds[1:]],
        "peak_gib": peak,
        "seconds_to_first_step": round(told.times[0] - STARTED - (steps - 1) * a_step, 1),
        "seconds_a_step": round(a_step, 4),
        "resolved": chosen.model_dump(exclude={"versions"}),
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    model_json, packs, device, held, steps, windows = sys.argv[1:]
    found = run(Model.model_validate_json(model_json), Path(packs), device, held, int(steps), int(windows))
    sys.stdout.write(json.dumps(found) + "\n")
