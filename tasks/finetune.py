"""Fine-tune: a base model and tokenized rows to a LoRA adapter.

The training lives in a work directory named by the stage's key: its checkpoints, its log, and resolved.json, which pins what
the request came to on the first machine. A killed training goes on from its newest intact checkpoint; on one machine and
thread count that equals an uninterrupted one to the bit. The adapter is always taken from a checkpoint, the last or the best
on held-out rows, so a training that had come to its end is only published.

    adapter/         adapter_model.safetensors, adapter_config.json        (PEFT's format)
    training-log/    train_log.jsonl: step, loss, grad_norm, learning_rate, tokens, seconds,
                     memory_gib, held_out_loss; resolved.json
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tasks.caching import files, locks, store
from tasks.caching.stage import current_key, stage
from tasks.config import FinetuneConfig, WeightsConfig
from tasks.reading.model_files import adapter_config
from tasks.refs import Adapter, Artifact, InputError, Model, home
from tasks.training.backend import Backend, Job, Resolved
from tasks.training.checkpoints import damage_of, drop_from, is_last, newest_intact, resumable, step_of
from tasks.training.memory import training_errors_explained
from tasks.training.parallel.launch import train_on
from tasks.training.validation import best_step, has_stopped_improving
from tasks.training.watch import LOG, StepRecord, read_log

logger = logging.getLogger(__name__)

BACKENDS = {"fast": "tasks.training.fast.backend", "hf": "tasks.training.hf", "unsloth": "tasks.training.unsloth"}
"""{finetune.backend: its module}; of these only the chosen one counts for a training's identity."""
RESOLVED = "resolved.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def summarize(records: Sequence[StepRecord], window: int) -> dict[str, float]:
    """First and last mean loss over a logging window, what was seen, and the best loss on held-out rows if any was measured."""
    first, last = records[:window], records[-window:]
    best = best_step(records)
    losses = [record.held_out_loss for record in records if record.step == best and record.held_out_loss is not None]
    return {
        "first_loss": round(sum(record.loss for record in first) / len(first), 4),
        "last_loss": round(sum(record.loss for record in last) / len(last), 4),
        "steps": float(records[-1].step),
        "tokens": float(sum(record.tokens for record in records)),
        **({"best_held_out_loss": round(losses[0], 4)} if losses else {}),
    }


def load_backend(name: str) -> Backend:
    """The backend of that name; its library is imported when it trains."""
    if name == "fast":
        from tasks.training.fast.backend import FastBackend

        return FastBackend()
    if name == "hf":
        from tasks.training.hf import HfBackend

        return HfBackend()
    from tasks.training.unsloth import UnslothBackend

    return UnslothBackend()


def left_behind(key: str) -> str | None:
    """Say what an unfinished training with that key left, such as `resumable from step 50`."""
    return resumable(home() / "work" / key[:32])


def prepare_training(model: Model, config: FinetuneConfig, weights: WeightsConfig, device: str, longest: int) -> Resolved:
    """Decide what the request leaves open, of rows or packs of at most `longest` tokens; refuse what can't work.

    Raises:
        ConfigError: for what the model, the backend or the machine can't do.
        InputError: when the least memory that it takes exceeds what the GPU has free.
    """
    from tasks.training import hardware, loading, memory, model_shape
    from tasks.training.fast import memory_plan

    hardware.check_model(model)
    resolved = hardware.resolve(config, weights, device)
    if config.backend == "fast":
        memory_plan.check_supported(Path(model.path), resolved.dtype)
    shape, free = model_shape.read_shape(Path(model.path)), hardware.free_gib(device)
    if shape is None:
        return resolved
    model_shape.check_targets(shape, config)
    tokens = config.batch_size * longest
    if config.backend == "fast":
        resolved = memory_plan.choose(config, resolved, shape, tokens, free, devices=hardware.count_devices(config, device))
    loaded = resolved.model_copy(update={"load_in_4bit": resolved.load_in_4bit or loading.is_in_4bit(Path(model.path))})
    estimate = resolved.estimated_gib or memory.estimate_gib(shape, config, loaded, tokens)
    if free is not None:
        memory.check_memory(estimate, free, config)
    return resolved.model_copy(update={"estimated_gib": estimate, "free_gib": free})


def _prepare(model: Model, batches: Artifact, config: FinetuneConfig, weights: WeightsConfig, device: str) -> Resolved:
    """Refuse early what can't work, and decide what the request leaves open."""
    if not batches.rows:
        raise InputError(
            f"finetune: no rows to train on: got {batches.kind} with 0 rows; expected at least 1. Lower what drops them."
        )
    return prepare_training(model, config, weights, device, _longest_row(_rows(batches)))


def _rows(batches: Artifact) -> Path:
    return batches / f"{batches.kind}.arrow"


def _longest_row(path: Path) -> int:
    """Tokens of the longest row."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return max((int(batch["input_ids"].value_lengths().to_numpy().max(initial=0)) for batch in reader), default=0)


def _pin(path: Path, resolved: Resolved, config: FinetuneConfig) -> Resolved:
    """Return what the training began with, if it began before; else what was resolved now, from now on.

    Raises:
        InputError: when it began in a way that the GPU at hand can't go on in.
    """
    from tasks.training import memory
    from tasks.training.fast import memory_plan

    if not path.is_file():
        files.write_atomic(path, resolved.model_dump_json(indent=1).encode())
        return resolved
    pinned = Resolved.model_validate_json(path.read_bytes())
    fp8 = memory_plan.is_fp8(pinned.frozen_weights)
    missing = [
        *(["bfloat16"] if pinned.dtype == "bfloat16" and resolved.dtype == "float16" else []),
        *(["fp8"] if fp8 and memory_plan.compute_capability(resolved.device) < memory_plan.FP8_CAPABILITY else []),
    ]
    if missing:
        raise InputError(
            f"finetune: {path} was begun in {missing[0]}: got {resolved.device_name}, which has none; expected a GPU like "
            f"{pinned.device_name}. Resume there, or delete the directory to begin anew."
        )
    if pinned.estimated_gib is not None and resolved.free_gib is not None:
        memory.check_memory(pinned.estimated_gib, resolved.free_gib, config)
    return pinned


def _records(work: Path, until: Path | None) -> list[StepRecord]:
    """The log's steps up to a checkpoint's."""
    log = work / LOG
    return [record for record in read_log(log) if record.step <= step_of(until)] if until and log.is_file() else []


def _newest(work: Path, config: FinetuneConfig) -> Path | None:
    """The checkpoint to go on from: the newest intact one; one before the best if all is trained and the best is not intact."""
    newest = newest_intact(work)
    best = best_step(_records(work, newest)) if config.keep == "best" else None
    if best is None or not _has_ended(newest, work, config) or damage_of(work / f"checkpoint-{best}") is None:
        return newest
    logger.warning("checkpoint-%d, the best on held-out rows, is damaged or missing; it is trained again.", best)
    drop_from(work, best)
    return newest_intact(work)


def _has_ended(newest: Path | None, work: Path, config: FinetuneConfig) -> bool:
    """Whether nothing is left to train after the checkpoint."""
    if newest is None:
        return False
    return is_last(newest) or has_stopped_improving(_records(work, newest), config.early_stopping)


def _publish(job: Job, last: Path, peak_gib: float | None) -> Adapter:
    """The adapter of the last or the best checkpoint, and the training's log, as artifacts."""
    records = _records(job.work, last)
    best = best_step(records) if job.config.keep == "best" else None
    kept = last if best is None else job.work / f"checkpoint-{best}"
    with store.publish("adapter", need_bytes=(kept / ADAPTER_FILES[0]).stat().st_size) as draft:
        shutil.copyfile(kept / ADAPTER_FILES[0], draft / ADAPTER_FILES[0])
        config = json.loads((kept / ADAPTER_FILES[1]).read_text(encoding="utf-8"))
        (draft / ADAPTER_FILES[1]).write_bytes(adapter_config(config, job.model.name))
    with store.publish("training-log") as log:
        shutil.copyfile(job.work / LOG, log / LOG)
        (log / RESOLVED).write_text(json.dumps({**job.resolved.model_dump(), "peak_gib": peak_gib}, indent=1))
        log.rows = len(records)
    return Adapter(
        data=draft.artifact, log=log.artifact, steps=step_of(kept), summary=summarize(records, job.config.logging_steps)
    )


def _train(job: Job) -> float:
    """Train to the end; the peak of memory in GiB."""
    if job.resume is not None:
        logger.info("finetune goes on from step %d.", step_of(job.resume))
    with training_errors_explained(job):
        return train_job(job)


def train_job(job: Job) -> float:
    """Train in this process, or on several devices in one each; the peak of memory in GiB."""
    from tasks.training import hardware

    devices = hardware.count_devices(job.config, job.resolved.device)
    return train_on(devices, job) if devices > 1 else load_backend(job.config.backend).train(job)


def _wait_for(holder: str) -> None:
    logger.warning("finetune waits: %s is training the same; its result will be used.", holder)


@stage(
    version=1,
    alternatives=BACKENDS.values(),
    chosen=lambda inputs: (BACKENDS[inputs["config"].backend],),
    unfinished=left_behind,
)
def finetune(
    model: Model,
    batches: Artifact,
    config: FinetuneConfig,
    weights: WeightsConfig,
    max_tokens: int,
    device: str,
    held_out: Artifact | None,
) -> Adapter:
    """Train a LoRA adapter on tokens.arrow or packs.arrow; `device` is cpu or cuda.

    `held_out` is the tokens.arrow whose loss is looked at every config.eval_steps; None without them.
    """
    with locks.work_directory(current_key(), waiting=_wait_for) as work:
        resolved, peak_gib = _pin(work / RESOLVED, _prepare(model, batches, config, weights, device), config), None
        looked_at = _rows(held_out) if held_out and held_out.rows else None
        job = Job(model, _rows(batches), batches.kind == "packs", config, max_tokens, resolved, work, held_out=looked_at)
        for _ in range(2):  # the second time if the best step's checkpoint turns out to be gone
            newest = _newest(work, config)
            if _has_ended(newest, work, config):
                break
            peak_gib = _train(replace(job, resume=newest))
        last = newest_intact(work)
        assert last is not None, "a training that ends without an error leaves its last checkpoint"
        return _publish(job, last, peak_gib)
