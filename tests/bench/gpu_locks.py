"""Trainings of one Prefect server that share two GPUs: two at once, one on each; then one on both, for which another waits.

Phase `locks` of tests/bench/gpu_session.py; its model is a small one with random weights, so that little is computed.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from flows.running.gpus import VISIBLE
from tasks.training.watch import LOG
from tests.bench.gpu_handover import logs_of, runs_since, served, start, steps_of

if TYPE_CHECKING:
    from tests.bench.gpu_session import Session

HOST = "0,1"
RECIPE = "default"
STEPS = 200
PAIRS = {"one GPU each": (1, 1), "one GPU after both": (2, 1)}
"""GPUs of either training."""
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
TOLD = ("waits for a GPU: another training holds", "holds GPU")


def locks(session: Session, found: dict[str, Any]) -> None:
    """Both pairs of trainings to their ends: when each step was, GPUs in use meanwhile, and what one was told that waited."""
    os.environ.setdefault(VISIBLE, HOST)
    model = make_small(session)
    with served(session) as environment:
        for name, devices in PAIRS.items():
            if name in (session.pairs or PAIRS):
                found[name] = dict[str, Any]()
                pair(session, environment, model, devices, found[name])


def make_small(session: Session) -> Path:
    """A model directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.bench.gpu_session import LLAMA3_8B

    target = session.work / "small-llama"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA3_8B | SMALL, dtype="bfloat16"))
    model.to(torch.bfloat16).save_pretrained(target)
    for file in (session.home / "tok").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def pair(session: Session, environment: dict[str, str], model: Path, devices: tuple[int, int], found: dict[str, Any]) -> None:
    """Two deployed runs on so many GPUs, the second begun when the first trains; adds what is seen while it is seen.

    Raises:
        RuntimeError: when one of them fails.
    """
    begun, work, logs = time.time(), session.home / "work", set[Path]()
    before = set(work.glob(f"*/{LOG}"))
    runs = [started(session, environment, model, devices, 0)]
    seen = found["seconds, then steps and GPUs of each training"] = list[list[Any]]()
    while any(run.poll() is None for run in runs):
        logs |= set(work.glob(f"*/{LOG}")) - before
        if logs and len(runs) == 1:
            runs.append(started(session, environment, model, devices, 1))
        now = [[len(steps_of(log)), gpus_of(log.parent.with_suffix(".lock"))] for log in sorted(logs)]
        if not seen or seen[-1][1:] != now:
            seen.append([round(time.time() - begun), *now])
        time.sleep(0.5)
    if len(runs) == 1 or any(run.returncode for run in runs):
        raise RuntimeError(f"exit codes {[run.returncode for run in runs]}\n{logs_of(session)}")
    children = [run for run in runs_since(session, begun, RECIPE) if any(entry["name"] == "finetune" for entry in run["stages"])]
    told = "".join(file.read_text() for file in (session.home / "logs").glob("*.log"))
    found |= {
        "devices": devices,
        "seconds": round(time.time() - begun, 1),
        "states": [{entry["name"]: entry["state"] for entry in run["stages"]} for run in children],
        "told": [line[-160:] for line in told.splitlines() if any(words in line for words in TOLD)],
    }


def gpus_of(lock: Path) -> list[str]:
    """Which GPUs the processes compute on that hold a training's lock."""
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        holder = psutil.Process(int(lock.read_text().split()[1]))
        holders = {str(process.pid) for process in (holder, *holder.children(recursive=True))}
    except (OSError, subprocess.CalledProcessError, psutil.NoSuchProcess, IndexError):
        return []
    return sorted({uuid.strip()[:12] for pid, _, uuid in (line.partition(",") for line in lines) if pid in holders})


def started(
    session: Session, environment: dict[str, str], model: Path, devices: tuple[int, int], which: int
) -> subprocess.Popen[bytes]:
    """A run of one of two trainings; a seed of its own lets it train, for the number of GPUs does not count."""
    steps = session.steps(STEPS)
    settings = [
        f"ingest.sources={session.home / 'products.jsonl'}",
        f"model.id={model}",
        "model.load_in_4bit=false",
        "sample.rows=500",
        "sample.eval_rows=4",
        "tokenize.max_affected_share=1.0",
        "finetune.backend=hf",
        "finetune.gradient_checkpointing=none",
        f"finetune.max_steps={steps}",
        f"finetune.save_steps={steps}",
        f"finetune.logging_steps={min(10, steps)}",
        f"finetune.warmup_steps={min(10, steps)}",
        f"finetune.devices={devices[which]}",
        f"finetune.seed={10 * sum(devices) + which}",
        *(["device=cpu", "model.dtype=float32"] if session.rehearse else []),
    ]
    return start(environment, RECIPE, settings, session.work / f"locks-{sum(devices)}-{which}.log", until="finetune")


__all__ = ["locks"]
