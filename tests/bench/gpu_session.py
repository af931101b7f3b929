"""The document's job on one GPU, measured: all of it in one go, or phase by phase, without network; results as JSON.

usage: python -m tests.bench.gpu_session CARRIED WORK RESULTS [--phases setup,timing,...] [--devices N] [--before CHECKOUT]
       [--pairs NAME,...] [--rehearse]

All phases run unless some are named; so do all pairs of locks and before. Phases with a plus between them run at the same time,
which times nothing but all of them. Two sessions on one WORK, after its setup, may run on a GPU each (CUDA_VISIBLE_DEVICES), with
results of their own.

CARRIED is what tests/bench/gpu_prepare.py made on a CPU machine. WORK is scratch that later phases find again. RESULTS is
written all the while, so that a killed session keeps what it has measured.

    setup      unpack the root, grow the product file, make the models                              GPU: minutes
    timing     the document's code and ours on the same texts, each cold: seconds to the first step, memory, seconds a step
    steps      both in turn on one loaded model: seconds a step; the logits of their adapter in plain libraries
    deployed   as-written and default on a Prefect server with a cpu worker and a cuda worker to a GPU, from the carried root;
               as-written is killed at a step of its training and run again
    small      SmolLM2-135M: losses against three runs of the document's code; recipes judged on the same answers
    alone      SmolLM2-135M: seconds of as-written and of fast with nothing else on the GPU
    versions   the same losses by each Unsloth in CARRIED/unsloth-VERSION (pip install --target)
    speed, shapes, profile, attention, correct, capped  the fast backend: tests/bench/gpu_fast.py
    devices, devices-fp8, devices-plain, devices-hf  one training on N GPUs, else all: tests/bench/gpu_devices.py
    scaling, shared                                  `bench train --devices N`; a 70B shape over all GPUs
    locks      two trainings of a Prefect server at once, one on each of two GPUs; one on both, for which one waits
    before     the code of another checkout (--before) and this one in turn, a pair to a GPU: tests/bench/gpu_before.py
    resumed    a training on all GPUs, from its half on again on two and on one: tests/bench/gpu_devices.py
    tests      pytest -m gpu

--rehearse does all of it on a CPU with a tiny model: it shows that the script runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flows.bench.shapes import SHAPES
from flows.running.gpus import visible_gpus
from tasks.caching import files
from tests.bench import gpu_devices, gpu_fast
from tests.bench.gpu_before import before
from tests.bench.gpu_handover import both_deployed
from tests.bench.gpu_locks import locks
from tests.bench.gpu_prepare import grow
from tests.bench.gpu_small import alone, small, versions
from tests.bench.gpu_timing import steps, timing

KEPT_SECONDS = 5
LLAMA3_8B = SHAPES["llama-3-8b"].settings | {"pad_token_id": 128_255}
TINY = {
    "vocab_size": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Session:
    """Where things lie, and how large everything is."""

    carried: Path
    work: Path
    rehearse: bool
    devices: int = 1
    """GPUs that one training may use."""
    before: Path | None = None
    """A checkout of the code that this one is held against."""
    pairs: frozenset[str] = frozenset()
    """Of the phases before and locks, if not all."""

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def home(self) -> Path:
        return self.work / "home"

    @property
    def llama(self) -> Path:
        return self.work / "llama-3-8b"

    @property
    def source(self) -> Path:
        return self.work / "trn.json"

    def steps(self, wanted: int) -> int:
        return min(wanted, 6) if self.rehearse else wanted

    def texts(self, wanted: int) -> int:
        return wanted // 50 if self.rehearse else wanted

    def environment(self, scratch: str) -> dict[str, str]:
        """For a process that starts cold: compiled code in a directory of its own."""
        caches = {name: str(self.work / "caches" / scratch / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        paths = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])  # wherever it is started
        return os.environ | caches | {"AMAZON_FT_HOME": str(self.home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}


def setup(session: Session, found: dict[str, Any]) -> None:
    """The carried root, the product file that it was made from, and a Llama-3-8B with random weights in NF4."""
    started = time.monotonic()
    shutil.rmtree(session.work, ignore_errors=True)
    session.home.mkdir(parents=True)
    with tarfile.open(session.carried / "root.tar.xz") as root:
        root.extractall(session.home, filter="data")
    prepared = json.loads((session.home / "prepared.json").read_text())
    grow(session.home / "products.jsonl", session.source, prepared["rows"])
    unpacked = time.monotonic()
    make_llama(session)
    found |= {"seconds_unpack": round(unpacked - started, 1), "seconds_model": round(time.monotonic() - unpacked, 1)}


def make_llama(session: Session) -> None:
    """The base model as unsloth/llama-3-8b-bnb-4bit has it, stored in NF4; the weights are random, the tokenizer is not."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tasks.training.loading import load_base

    shape = LLAMA3_8B | (TINY if session.rehearse else {})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(session.device):
        model = LlamaForCausalLM(LlamaConfig(**shape, dtype="bfloat16"))
    torch.set_default_dtype(torch.float32)
    wide = session.llama if session.rehearse else session.work / "llama-16bit"
    model.save_pretrained(wide, max_shard_size="5GB")
    del model
    if not session.rehearse:
        load_base(wide, "bfloat16", load_in_4bit=True, device="cuda").save_pretrained(session.llama, max_shard_size="5GB")
        shutil.rmtree(wide)
        torch.cuda.empty_cache()
    shutil.copytree(session.home / "tok", session.llama, dirs_exist_ok=True)


def gpu_tests(session: Session, found: dict[str, Any]) -> None:
    """`pytest -m gpu`, of the files that have such tests: others import what a GPU machine may lack."""
    tests = (file for room in ("flows", "tasks") for file in Path("tests", room).rglob("test_*.py"))
    files = sorted(str(file) for file in tests if "pytest.mark.gpu" in file.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-W", "default", *files]
    environment = session.environment("tests") | {"AMAZON_FT_REQUIRE_UNSLOTH": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    found |= {"exit_code": done.returncode, "told": done.stdout.splitlines()[-40:]}
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}\n{done.stdout[-6000:]}")


PHASES: dict[str, Callable[[Session, dict[str, Any]], None]] = {
    "setup": setup,
    "timing": timing,
    "steps": steps,
    "deployed": both_deployed,
    "alone": alone,
    "small": small,
    "versions": versions,
    **gpu_fast.PHASES,
    **gpu_devices.PHASES,
    "locks": locks,
    "before": before,
    "tests": gpu_tests,
}


def run(session: Session, phase: str, found: dict[str, Any]) -> None:
    """Let a phase add what it finds, as far as it comes."""
    began = time.monotonic()
    try:
        PHASES[phase](session, found)
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    found["seconds_of_phase"] = round(time.monotonic() - began, 1)
    print(phase, found.get("failed", "done")[-4000:], found["seconds_of_phase"], "s", flush=True)


@contextmanager
def kept(results: dict[str, Any], target: Path) -> Iterator[None]:
    """Write the results every few seconds and at the end."""
    over = threading.Event()

    def write() -> None:
        files.write_atomic(target, json.dumps(results, indent=1, ensure_ascii=False, default=str).encode())

    def keep() -> None:
        while not over.wait(KEPT_SECONDS):
            with suppress(RuntimeError):  # changed while it is written: next time
                write()

    target.parent.mkdir(parents=True, exist_ok=True)
    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        write()


def machine(session: Session) -> dict[str, Any]:
    """Where and with what this was measured."""
    import torch

    found: dict[str, str] = {}
    for name in (
        "torch",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "unsloth",
        "unsloth_zoo",
        "torchao",
        "triton",
        "xformers",
        "prefect",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if not session.rehearse else "none: a rehearsal, its numbers mean nothing"
    return {
        "gpu": gpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": found,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("carried", "work", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument(
        "--phases", default="setup,timing,steps,speed,capped,alone,small+versions+tests+correct,deployed,attention,profile"
    )
    parser.add_argument("--devices", type=int, default=max(2, len(visible_gpus())), help="of the phase devices")
    parser.add_argument("--before", type=Path, help="a checkout: of the phase before")
    parser.add_argument("--pairs", default="", help="of the phases before and locks, if not all: 'bench fp8,profile fp8'")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    groups = [group.split("+") for group in options.phases.split(",")]
    other = options.before and options.before.resolve()
    pairs = frozenset(filter(None, options.pairs.split(",")))
    session = Session(options.carried.resolve(), options.work.resolve(), options.rehearse, options.devices, other, pairs)
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    results |= {"machine": machine(session)}
    with kept(results, options.results):
        for phases in groups:
            results.update({phase: dict[str, Any]() for phase in phases})
            with ThreadPoolExecutor(len(phases)) as pool:
                list(pool.map(run, [session] * len(phases), phases, [results[phase] for phase in phases]))
    failed = any("failed" in results[phase] for phases in groups for phase in phases)
    print(json.dumps({name: short(value) for name, value in results.items()}, indent=1)[-8000:])
    sys.exit(failed)


def short(found: Any) -> Any:
    """The same without long lists."""
    if isinstance(found, dict):
        return {name: short(value) for name, value in found.items()}
    if isinstance(found, list) and len(found) > 8:
        return f"{len(found)} values"
    return found[:80] if isinstance(found, str) else found


if __name__ == "__main__":
    main()
