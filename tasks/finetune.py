"""Fine-tune: a base model and tokenized rows to a LoRA adapter.

The training lives in a work directory named by the stage's key: its checkpoints, its log, and resolved.json, which pins what
the request came to on the first machine. A killed training goes on from its newest intact checkpoint; on one machine and
thread count that equals an uninterrupted one to the bit. The adapter is always taken from the last checkpoint, so a training
that had come to its end is only published.

    adapter/         adapter_model.safetensors, adapter_config.json        (PEFT's format)
    training-log/    train_log.jsonl: step, loss, grad_norm, learning_rate, tokens; resolved.json
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import files, locks, store
from tasks.backends import Job, Resolved, load_backend
from tasks.backends.checkpoints import is_last, newest_intact, resumable, step_of
from tasks.backends.memory import training_errors_explained
from tasks.backends.progress import announced
from tasks.config import FinetuneConfig, WeightsConfig
from tasks.refs import Adapter, Artifact, InputError, Model, home
from tasks.stage import current_key, stage

if TYPE_CHECKING:
    from tasks.backends.watch import StepRecord

logger = logging.getLogger(__name__)

RESOLVED = "resolved.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def adapter_config(config: Mapping[str, Any], base: str) -> bytes:
    """PEFT's adapter_config.json with equal bytes for equal settings, naming the base model as the user does.

    >>> print(adapter_config({"r": 4, "base_model_name_or_path": "/tmp/x", "target_modules": ["v", "q"]}, "org/model").decode())
    {
      "base_model_name_or_path": "org/model",
      "r": 4,
      "target_modules": [
        "q",
        "v"
      ]
    }
    """
    portable = {**config, "base_model_name_or_path": base}
    if isinstance(modules := portable.get("target_modules"), list):
        portable["target_modules"] = sorted(modules)  # PEFT writes a set, in any order
    return json.dumps(portable, indent=2, sort_keys=True).encode()


def summarize(records: Sequence[StepRecord], window: int) -> dict[str, float]:
    """First and last mean loss over a logging window, and what was seen."""
    first, last = records[:window], records[-window:]
    return {
        "first_loss": round(sum(record.loss for record in first) / len(first), 4),
        "last_loss": round(sum(record.loss for record in last) / len(last), 4),
        "steps": float(records[-1].step),
        "tokens": float(sum(record.tokens for record in records)),
    }


def left_behind(key: str) -> str | None:
    """What an unfinished training with that key left, such as `resumable from step 50`."""
    return resumable(home() / "work" / key[:32])


def _prepare(model: Model, batches: Artifact, config: FinetuneConfig, weights: WeightsConfig, device: str) -> Resolved:
    """Refuse early what can't work, and decide what the request leaves open."""
    from tasks.backends import hardware, memory

    if not batches.rows:
        raise InputError(
            f"finetune: no rows to train on: got {batches.kind} with 0 rows; expected at least 1. Lower what drops them."
        )
    hardware.check_model(model)
    resolved = hardware.resolve(config, weights, device)
    shape, free = memory.read_shape(Path(model.path)), hardware.free_gib(device)
    if shape is None:
        return resolved
    tokens = config.batch_size * _longest_row(_rows(batches))
    if config.backend == "fast":
        from tasks.backends import choice

        resolved = choice.choose(config, resolved, shape, tokens, free)
    estimate = resolved.estimated_gib or memory.estimate_gib(shape, config, resolved, tokens)
    if free is not None:
        memory.check_memory(estimate, free, config)
    return resolved.model_copy(update={"estimated_gib": estimate, "free_gib": free})


def _rows(batches: Artifact) -> Path:
    return batches / f"{batches.kind}.arrow"


def _longest_row(path: Path) -> int:
    """Tokens of the longest row."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return max((int(batch["input_ids"].value_lengths().to_numpy().max(initial=0)) for batch in reader), default=0)


def _pin(path: Path, resolved: Resolved) -> Resolved:
    """What the training began with, if it began before; else what was resolved now, from now on."""
    if not path.is_file():
        files.write_atomic(path, resolved.model_dump_json(indent=1).encode())
        return resolved
    pinned = Resolved.model_validate_json(path.read_bytes())
    if pinned.dtype == "bfloat16" and resolved.dtype == "float16":
        raise InputError(
            f"finetune: {path} was begun in bfloat16: got {resolved.device_name}, which has none; expected a GPU like "
            f"{pinned.device_name}. Resume there, or delete the directory to begin anew."
        )
    return pinned


def _publish(job: Job, last: Path, peak_gib: float | None) -> Adapter:
    """The adapter of the last checkpoint and the training's log as artifacts."""
    from tasks.backends.watch import LOG, read_log

    records = read_log(job.work / LOG)
    with store.publish("adapter", need_bytes=(last / ADAPTER_FILES[0]).stat().st_size) as draft:
        shutil.copyfile(last / ADAPTER_FILES[0], draft / ADAPTER_FILES[0])
        config = json.loads((last / ADAPTER_FILES[1]).read_text())
        (draft / ADAPTER_FILES[1]).write_bytes(adapter_config(config, job.model.name))
    with store.publish("training-log") as log:
        shutil.copyfile(job.work / LOG, log / LOG)
        (log / RESOLVED).write_text(json.dumps({**job.resolved.model_dump(), "peak_gib": peak_gib}, indent=1))
        log.rows = len(records)
    return Adapter(
        data=draft.artifact, log=log.artifact, steps=step_of(last), summary=summarize(records, job.config.logging_steps)
    )


def _wait_for(holder: str) -> None:
    logger.warning("finetune waits: %s is training the same; its result will be used.", holder)


@stage(version=1, chosen=lambda inputs: (f"tasks.backends.{inputs['config'].backend}",), progress=left_behind)
def finetune(
    model: Model, batches: Artifact, config: FinetuneConfig, weights: WeightsConfig, max_tokens: int, device: str
) -> Adapter:
    """Train a LoRA adapter on tokens.arrow or packs.arrow; `device` is cpu or cuda."""
    with locks.work_directory(current_key(), waiting=_wait_for) as work:
        newest, peak_gib = newest_intact(work), None
        resolved = _pin(work / RESOLVED, _prepare(model, batches, config, weights, device))
        job = Job(model, _rows(batches), batches.kind == "packs", config, max_tokens, resolved, work, newest)
        if newest is None or not is_last(newest):
            if newest is not None:
                logger.info("finetune goes on from step %d.", step_of(newest))
            with announced() as progress, training_errors_explained(job):
                peak_gib = load_backend(config.backend).train(job, progress)
            newest = newest_intact(work)
        assert newest is not None, "a training that ends without an error leaves its last checkpoint"
        return _publish(job, newest, peak_gib)
