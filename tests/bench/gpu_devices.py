"""One training on several GPUs beside the same on one: speed, and how far 50 steps' losses are apart; two runs on one differ too.

    python -m tests.bench.gpu_devices MODEL_DIR DATA_DIR DEVICE SIDE DEVICES STEP_PACKS STEPS WORK

That is one training in a process of its own; it prints a line `RESULT {...}`. It goes on from a checkpoint in WORK, and leaves
one at half of its steps. DATA_DIR holds packs.arrow. SIDE is how `fast` holds the base matrices, as "fp8" or "fp8 shared", or
`hf`, which trains the rows of the packs unpacked.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.training.watch import LOG

if TYPE_CHECKING:
    from tests.bench.gpu_session import Session

SIDES = ("fp8", "plain", "hf")
STEPS, WARM = 50, 15
"""Of a training, and how many of them are not timed: they compile. One of the windows after them writes a checkpoint."""
LOGGING_STEPS = 5
RESUMED_STEPS = 20
RESUMED = {"two": "0,1", "one": "2", "again": "3"}
"""Which GPUs each training gets that goes on where that on all was at its half."""
SHARED_LAYERS: dict[str, tuple[str, ...]] = {"cuda": (), "cpu": ("3",)}
"""Of the model that is shared out: all, or on a CPU a few, narrow ones."""
HF_ROWS = 4
"""Rows of a step of `hf` for each pack of one of `fast`."""


def devices(session: Session, found: dict[str, Any], sides: tuple[str, ...] = SIDES) -> None:
    """Each side on one GPU, on one again, and on all."""
    from tests.bench.gpu_fast import called

    data = session.home / "speed" / "turns-3"
    for side in ("plain", "hf") if session.rehearse else sides:
        runs: dict[str, Any] = {}
        for name, count in (("one", 1), ("again", 1), ("all", session.devices)):
            work = session.work / "devices" / f"{side}-{name}"
            sizes = map(str, (count, session.devices, session.steps(STEPS), work))
            words = (str(session.llama), str(data), session.device, side, *sizes)
            told = called(session, f"devices-{side}-{name}", "tests.bench.gpu_devices", *words)
            runs[name] = json.loads(told.splitlines()[-1].removeprefix("RESULT "))
            found[side] = {"devices": session.devices, **runs}
        found[side] |= {
            "times_one": round(runs["all"]["tokens_per_second"] / runs["one"]["tokens_per_second"], 3),
            "apart": {name: apart(runs["one"], runs[name]) for name in ("again", "all")},
        }


def scaling(session: Session, found: dict[str, Any]) -> None:
    """`amazon-ft bench train --devices N`, of fp8 and of bf16."""
    from tests.bench.gpu_fast import called

    target = session.work / "scaling.json"
    words = ["--model", str(session.llama), "--data", str(session.home / "speed" / "turns-3"), "--json", str(target)]
    words += [word for side in (("plain",) if session.rehearse else ("fp8", "plain")) for word in ("--held", side)]
    called(session, "scaling", "flows.cli", "bench", "train", "--devices", str(session.devices), *words)
    found |= json.loads(target.read_text())


def shared(session: Session, found: dict[str, Any]) -> None:
    """A model that one GPU can't train, over all of them: tests/bench/gpu_shared.py."""
    from tests.bench.gpu_fast import called

    model, device = session.work / "llama-3-70b", session.device
    called(
        session, "make-shared", "tests.bench.gpu_shared", "make", str(session.home / "tok"), str(model), *SHARED_LAYERS[device]
    )
    for held in ("plain",) if session.rehearse else ("fp8", "nf4"):
        words = (
            str(model),
            str(session.home / "speed" / "turns-3"),
            device,
            held,
            str(session.devices),
            str(session.work / held),
        )
        told = called(session, f"shared-{held}", "tests.bench.gpu_shared", "train", *words)
        found[held] = json.loads(told.splitlines()[-1].removeprefix("RESULT "))


def resumed(session: Session, found: dict[str, Any]) -> None:
    """A training on all GPUs; from its half on, again on two, on one, and on another one, all three at once."""
    from tests.bench.gpu_fast import called

    def train(name: str, count: int, visible: str | None = None) -> dict[str, Any]:
        sizes = map(str, (count, session.devices, 2 * half, works / name))
        words = (
            str(session.llama),
            str(session.home / "speed" / "turns-3"),
            session.device,
            "plain" if session.rehearse else "fp8",
        )
        told = called(session, f"resumed-{name}", "tests.bench.gpu_devices", *words, *sizes, visible=visible)
        return json.loads(told.splitlines()[-1].removeprefix("RESULT "))

    works, half = session.work / "resumed", session.steps(RESUMED_STEPS) // 2
    found["all"] = train("all", session.devices)
    for name in RESUMED:
        shutil.copytree(works / "all" / f"checkpoint-{half}", works / name / f"checkpoint-{half}")
        shutil.copy(works / "all" / LOG, works / name / LOG)
    with ThreadPoolExecutor() as pool:
        parts = pool.map(train, RESUMED, (visible.count(",") + 1 for visible in RESUMED.values()), RESUMED.values())
        found |= dict(zip(RESUMED, parts, strict=True))
    found["apart"] = {name: apart(found["all"], found[name]) for name in RESUMED} | {
        "one, again": apart(found["one"], found["again"])
    }


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The largest differences of two trainings' steps, and whether they were made of as many tokens."""
    return {name: max(abs(a - b) for a, b in zip(one[name], other[name], strict=True)) for name in ("losses", "grad_norms")} | {
        "same_tokens": one["tokens"] == other["tokens"]
    }


def train_on_some(
    model: Path, data: Path, device: str, side: str, count: int, step_packs: int, steps: int, work: Path
) -> dict[str, Any]:
    """What a training lost, and how fast it was."""
    from datasets import Dataset

    from flows.recipes import load_recipe
    from tasks.config import FinetuneConfig, WeightsConfig
    from tasks.finetune import train_job
    from tasks.reading.model_files import directory_model
    from tasks.training import hardware, model_shape
    from tasks.training.backend import Job
    from tasks.training.checkpoints import newest_intact
    from tasks.training.fast import memory_plan
    from tasks.training.fast.backend import max_lengths
    from tasks.training.watch import read_log

    work.mkdir(parents=True, exist_ok=True)
    packed, logged = side != "hf", min(LOGGING_STEPS, steps // 2)
    changes: dict[str, Any] = {
        "max_steps": steps,
        "logging_steps": logged,
        "save_steps": steps // 2 // logged * logged,
        "warmup_steps": 2,
    }
    changes |= {"devices": count, "gradient_accumulation": step_packs}
    held, _, shared = side.partition(" ")
    if packed:
        changes |= {"frozen_weights": held, "sharded": bool(shared)}
    else:
        changes |= {"backend": "hf", "gradient_checkpointing": "full", "batch_size": HF_ROWS}
    config = FinetuneConfig.model_validate(load_recipe("fast").finetune.model_dump() | changes)
    rows = data / "packs.arrow" if packed else unpack(data / "packs.arrow", work / "tokens.arrow")
    longest = max_lengths(Dataset.from_file(str(rows))).pack
    resolved = hardware.resolve(config, WeightsConfig(load_in_4bit=False), device)
    if packed:
        shape = model_shape.read_shape(model)
        assert shape is not None
        resolved = memory_plan.choose(config, resolved, shape, longest, hardware.free_gib(device), devices=count)
    job = Job(directory_model(model, name=model.name), rows, packed, config, longest, resolved, work, resume=newest_intact(work))
    peak = train_job(job)
    records = read_log(work / LOG)
    ends = range(min(WARM, steps - logged), steps, logged)
    windows = [
        round(
            sum(record.tokens for record in records[end : end + logged])
            / (records[end + logged - 1].seconds - records[end - 1].seconds),
            1,
        )
        for end in ends
    ]
    return {
        "tokens_per_second": statistics.median(windows),
        "windows": windows,
        "peak_gib": peak,
        "memory_gib": records[-1].memory_gib,
        "losses": [record.loss for record in records],
        "grad_norms": [record.grad_norm for record in records],
        "tokens": [record.tokens for record in records],
        "resolved": resolved.model_dump(),
    }


def unpack(packs: Path, target: Path) -> Path:
    """The rows of packs, each by itself."""
    import pyarrow as pa

    with pa.memory_map(str(packs)) as source, pa.ipc.open_stream(source) as reader:
        table = reader.read_all().to_pylist()
    rows = [
        {"uids": pack["uids"][:1], "input_ids": pack["input_ids"][start:end], "labels": pack["labels"][start:end]}
        for pack in table
        for start, end in pairwise(accumulate(pack["seq_lengths"], initial=0))
    ]
    kinds = {"uids": pa.list_(pa.string()), "input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())}
    made = pa.Table.from_pylist(rows, pa.schema(kinds))
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
        writer.write_table(made)
    return target


PHASES: dict[str, Callable[[Session, dict[str, Any]], None]] = {
    "devices": devices,
    "resumed": resumed,
    "scaling": scaling,
    "shared": shared,
    **{f"devices-{side}": partial(devices, sides=(side,)) for side in SIDES},
}

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    model, data, device, side, count, step_packs, steps, work = sys.argv[1:]
    sizes = (int(count), int(step_packs), int(steps))
    print("RESULT", json.dumps(train_on_some(Path(model), Path(data), device, side, *sizes, Path(work))))
