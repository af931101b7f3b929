"""`amazon-ft bench train`: the fast backend against the document's own code on the same texts, on the machine at hand.

Each side is a process of its own that prints one line of JSON: flows/bench/train_ours.py, flows/bench/train_document.py. A
token counts if it carries text. After a first window of steps, which compiles and warms up, three windows are timed and the
median counts.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.bench.data import machine
from flows.bench.processes import module, run_process
from flows.recipes import load_recipe
from flows.running.gpus import held_gpus
from tasks.caching.versions import package_versions
from tasks.config import FinetuneConfig
from tasks.refs import InputError, Model
from tasks.training import hardware
from tasks.training.fast import memory_plan

WINDOWS = 3
GPU_STEPS, CPU_STEPS = (8, 5), (2, 1)
"""Steps of a window, ours and the document's: about 3 and 15 s on an H100."""
FLOP_PER_WEIGHT = 4
"""For each token: two forward, two for the gradient of the input; frozen weights have none of their own."""


def bench_train(
    model: Model, data: Path, *, held: Sequence[str], against_document: bool, devices: int = 1, console: Console
) -> dict[str, Any]:
    """Measure on one GPU, or on several beside one, held meanwhile, and print; all numbers, with machine and versions.

    `data` holds packs.arrow and texts.json, a list of the texts that the packs are made of.

    Raises:
        ConfigError: when the fast backend can't train the model.
        InputError: when the document's code is asked for and Unsloth is not installed.
    """
    if against_document and find_spec("unsloth") is None:
        raise InputError("bench train: --against document: got no package unsloth; expected it. pip install unsloth unsloth_zoo")
    with held_gpus("cuda", devices):
        return measure_sides(model, data, [*held, *(["document"] if against_document else [])], devices, console)


def measure_sides(model: Model, data: Path, sides: Sequence[str], devices: int, console: Console) -> dict[str, Any]:
    """Measure on GPUs that are held already, and print; see bench_train."""
    device = device_here()
    memory_plan.check_supported(Path(model.path), hardware.resolve_dtype("auto", device))
    if device == "cpu":
        console.print("No GPU here: a tiny model on the CPU, which shows that both sides run and says nothing of a GPU's speed.")
    limit, flop = matmul_limit(device), linear_weights(model) * FLOP_PER_WEIGHT
    measured: dict[str, Any] = {}
    for side in sides:
        for count in (1,) if side == "document" or devices == 1 else (1, devices):
            found = measure_training_side(side, model, data, device, used=count, step_packs=devices)
            found["tflops"] = round(found["tokens_per_second"] * flop / 1e12, 6)
            found["share_of_limit"] = round(found["tokens_per_second"] * flop / limit / count, 3)
            measured[name := side if count == 1 else f"{side} x{count}"] = found
            console.print(f"{name}: {json.dumps(found)}", highlight=False)
    console.print(speed_table(measured))
    for name, times in device_speedups(measured).items():
        console.print(f"{name}: {times} times one device", highlight=False)
    return {
        "device": hardware.device_name(device),
        "machine": machine(),
        "versions": package_versions(hardware.LIBRARIES),
        "matmul_limit_tflops": round(limit / 1e12, 3),
        "model": model.name,
        "flop_per_token": flop,
        "sides": measured,
        "ratio": training_speedups(measured),
        "times_one_device": device_speedups(measured),
    }


def measure_training_side(
    side: str, model: Model, data: Path, device: str, *, used: int = 1, step_packs: int = 1
) -> dict[str, Any]:
    """One side in a process of its own: tokens_per_second (median), windows, peak_gib, seconds_to_first_step, resolved.

    Ours trains on `used` devices, in steps of `step_packs` packs.
    """
    ours, document = GPU_STEPS if device == "cuda" else CPU_STEPS
    with tempfile.TemporaryDirectory() as scratch:
        if side == "document":
            command = module("flows.bench.train_document", model.path, data / "texts.json", device, document, WINDOWS)
        else:
            sizes = (ours, WINDOWS, used, step_packs)
            command = module("flows.bench.train_ours", model.model_dump_json(), data / "packs.arrow", device, side, *sizes)
        cost = run_process(command, Path(scratch), os.environ | {"HF_HUB_OFFLINE": "1", "AMAZON_FT_HOME": scratch})
    found: dict[str, Any] = json.loads(cost.output.splitlines()[-1])
    return {
        "tokens_per_second": round(statistics.median(found["windows"]), 1),
        **found,
        "process_seconds": round(cost.seconds, 1),
    }


def training_speedups(measured: dict[str, Any]) -> dict[str, float]:
    """{side of ours: how many times as fast as the document's code}.

    >>> training_speedups({"fp8": {"tokens_per_second": 20.0}, "document": {"tokens_per_second": 2.0}})
    {'fp8': 10.0}
    """
    if "document" not in measured:
        return {}
    base = measured["document"]["tokens_per_second"]
    return {side: round(found["tokens_per_second"] / base, 2) for side, found in measured.items() if side != "document"}


def device_speedups(measured: dict[str, Any]) -> dict[str, float]:
    """{side on several devices: how many times as fast as on one}.

    >>> device_speedups({"fp8": {"tokens_per_second": 20.0}, "fp8 x2": {"tokens_per_second": 39.0}})
    {'fp8 x2': 1.95}
    """
    several = {name: name.partition(" x")[0] for name in measured if " x" in name}
    return {
        name: round(measured[name]["tokens_per_second"] / measured[one]["tokens_per_second"], 3) for name, one in several.items()
    }


def speed_table(measured: dict[str, Any]) -> Table:
    """A row for each side: speed, share of the limit, memory, time to the first step."""
    ratio = training_speedups(measured)
    shown = Table("", "tokens/s", "of the bf16 matmul limit", "peak memory", "to the first step", "times the document", box=None)
    for side, found in measured.items():
        cells = [
            f"{found['tokens_per_second']:,.0f}",
            f"{found['share_of_limit']:.1%}",
            f"{found['peak_gib']:.1f} GiB",
            f"{found['seconds_to_first_step']:.1f} s",
        ]
        shown.add_row(side, *cells, f"{ratio[side]}" if side in ratio else "")
    return shown


def device_here() -> str:
    """`cuda` where torch sees a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def matmul_limit(device: str) -> float:
    """FLOP/s of a large matrix product here, in bfloat16 on a GPU and float32 on the CPU; the best of a few."""
    import time

    import torch

    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds: list[float] = []
    for _ in range(20):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # fetching a number waits for the product
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def linear_weights(model: Model) -> int:
    """Weights of the model's matrices, the output matrix included."""
    from tasks.training.model_shape import read_shape

    shape = read_shape(Path(model.path))
    assert shape is not None, "the fast backend refuses other architectures before"
    return shape.layers * shape.layer_parameters + shape.vocabulary * shape.hidden


def bench_config(held: str, steps: int, windows: int, *, devices: int = 1, step_packs: int = 1) -> FinetuneConfig:
    """Recipe `fast`'s training, one window more than is timed, logged once a window."""
    total = steps * (windows + 1)
    changes = {"frozen_weights": held, "max_steps": total, "logging_steps": steps, "save_steps": total, "warmup_steps": 2}
    changes |= {"devices": devices, "gradient_accumulation": step_packs}
    return FinetuneConfig.model_validate(load_recipe("fast").finetune.model_dump() | changes)
