"""The fast backend on given packs, as the stage finetune calls it; ends with one line of JSON.

usage: python -m flows.bench.train_ours MODEL_JSON PACKS_ARROW DEVICE HELD STEPS WINDOWS DEVICES STEP_PACKS

MODEL_JSON is a reference (tasks/refs.py), HELD a value of finetune.frozen_weights, STEP_PACKS the packs of a step.
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
from tasks.caching.context import observing
from tasks.caching.events import Event, StepsLogged
from tasks.config import FinetuneConfig, WeightsConfig
from tasks.finetune import train_job
from tasks.refs import Model
from tasks.training import hardware, model_shape
from tasks.training.backend import Job
from tasks.training.fast import memory_plan
from tasks.training.fast.backend import max_lengths

STARTED = psutil.Process().create_time()


class Windows:
    """Notes the speed of each logged window, and when it was known."""

    def __init__(self) -> None:
        self.speeds: list[float] = []
        self.times: list[float] = []

    def hear(self, event: Event) -> None:
        """Note the end of a window."""
        if isinstance(event, StepsLogged):
            self.speeds.append(event.tokens_per_second)
            self.times.append(time.time())

    def close(self) -> None:
        """Nothing is left to do."""


def time_training(model: Model, packs: Path, device: str, config: FinetuneConfig) -> dict[str, Any]:
    """Train and time."""
    told, steps = Windows(), config.logging_steps
    resolved = hardware.resolve(config, WeightsConfig(load_in_4bit=False), device)
    shape, free = model_shape.read_shape(Path(model.path)), hardware.free_gib(device)
    assert shape is not None
    longest = max_lengths(Dataset.from_file(str(packs))).pack
    with TemporaryDirectory() as work, observing(told):
        chosen = memory_plan.choose(config, resolved, shape, longest, free, devices=hardware.count_devices(config, device))
        job = Job(model, packs, True, config, longest, chosen, Path(work))
        peak = train_job(job)
    a_step = (told.times[-1] - told.times[0]) / (steps * (len(told.times) - 1))
    return {
        "windows": [round(speed, 1) for speed in told.speeds[1:]],
        "peak_gib": peak,
        "estimated_gib": (chosen.estimated_gib or {}).get("total"),
        "seconds_to_first_step": round(told.times[0] - STARTED - (steps - 1) * a_step, 1),
        "seconds_a_step": round(a_step, 4),
        "resolved": chosen.model_dump(exclude={"versions"}),
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    model_json, packs, device, held, *sizes = sys.argv[1:]
    steps, windows, devices, step_packs = map(int, sizes)
    config = bench_config(held, steps, windows, devices=devices, step_packs=step_packs)
    found = time_training(Model.model_validate_json(model_json), Path(packs), device, config)
    sys.stdout.write(json.dumps(found) + "\n")
