"""The fast backend on a GPU: its speed beside the document's code, how near it is to float32, and how little memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any, TypeVar

from flows.running.gpus import VISIBLE, visible_gpus
from tests.bench.gpu_small import make_model

if TYPE_CHECKING:
    from tests.bench.gpu_session import Session

Job = TypeVar("Job")
SIDES = {1: ("fp8", "fp8-backward"), 3: ("fp8", "fp8-backward", "plain")}
"""{turns of a conversation: how the base model is held}; the document's code runs beside them."""
SHAPES = ("llama-3-8b", "gemma-2-9b", "qwen2.5-7b", "mistral-7b-v0.3", "llama-3.1-8b")
CAPS_GIB = (12.0, 24.0)


def speed(session: Session, found: dict[str, Any]) -> None:
    """`amazon-ft bench train --against document` on the carried packs and texts of one turn and of three."""
    for turns, sides in SIDES.items():
        data, target = session.home / "speed" / f"turns-{turns}", session.work / f"speed-{turns}.json"
        options = [word for side in (("plain",) if session.rehearse else sides) for word in ("--held", side)]
        options += ["--model", str(session.llama), "--data", str(data), "--json", str(target)]
        called(session, f"speed-{turns}", "flows.cli", "bench", "train", "--against", "document", *options)
        found[f"turns_{turns}"] = json.loads(target.read_text())


def shapes(session: Session, found: dict[str, Any]) -> None:
    """`amazon-ft bench train --shape` of each, on random weights; at once, as far as there are GPUs, one on each."""

    def measure(name: str, gpu: str | None) -> None:
        target = session.work / f"shape-{name}.json"
        words = ["--model", str(session.home / "tok"), "--shape", name, "--held", "fp8", "--held", "plain"]
        words = ["--model", str(session.llama), "--held", "plain"] if session.rehearse else words
        words += ["--data", str(session.home / "speed" / "turns-3"), "--json", str(target)]
        called(session, f"shape-{name}", "flows.cli", "bench", "train", *words, visible=gpu)
        found[name] = json.loads(target.read_text())

    each_on_a_gpu(SHAPES[:1] if session.rehearse else SHAPES, measure)


def each_on_a_gpu(jobs: Sequence[Job], do: Callable[[Job, str | None], None]) -> None:
    """Do all jobs, as many at once as there are GPUs; each is told its own, or None where there is none."""
    free = Queue[str | None]()
    for index in [gpu.index for gpu in visible_gpus()] or [None]:
        free.put(index)

    def done(job: Job) -> None:
        gpu = free.get()
        try:
            do(job, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(free.qsize()) as pool:
        list(pool.map(done, jobs))


def profile(session: Session, found: dict[str, Any]) -> None:
    """Which kernels a step of fp8 and of bf16 spends its time in."""
    for held in ("plain",) if session.rehearse else ("fp8", "fp8-backward", "plain"):
        found[held] = worker(session, f"profile-{held}", "profile", held)


def attention(session: Session, found: dict[str, Any]) -> None:
    """What it saves to tell attention the true sizes of each pack."""
    if session.rehearse:
        found["skipped"] = "kernels of a GPU are timed, and there is none"
        return
    found |= worker(session, "attention", "attention")


def correct(session: Session, found: dict[str, Any]) -> None:
    """Logits and gradients against float32, row by row: SmolLM2's weights, and two layers of Llama-3-8B's width."""
    found |= worker(session, "correct", "correct")


def capped(session: Session, found: dict[str, Any]) -> None:
    """Trainings with a cap on the GPU memory of the process, and what the driver saw at most."""
    if session.rehearse:
        found["skipped"] = "the memory of a GPU is capped, and there is none"
        return
    for gib in CAPS_GIB:
        found[f"{gib:g}_gib"] = worker(session, f"capped-{gib:g}", "capped", str(gib))


def worker(session: Session, name: str, kind: str, *arguments: str) -> dict[str, Any]:
    """What tests/bench/gpu_fast_worker.py prints in a process of its own."""
    model = make_model(session) if kind == "correct" else session.llama
    data = session.home / "speed" / "turns-3"
    told = called(session, name, "tests.bench.gpu_fast_worker", kind, str(model), str(data), session.device, *arguments)
    return json.loads(told.splitlines()[-1].removeprefix("RESULT "))


def called(
    session: Session, name: str, module: str, *arguments: str, visible: str | None = None, checkout: Path | None = None
) -> str:
    """What a program prints that sees all GPUs or those; of a checkout, if one is given, which all share what they compile.

    Raises:
        RuntimeError: with the end of its log, when it fails.
    """
    log, environment = session.work / f"{name}.log", session.environment("checkouts" if checkout else name)
    environment |= {VISIBLE: visible} if visible else {}
    if checkout:
        environment["PYTHONPATH"] = f"{checkout}{os.pathsep}{environment['PYTHONPATH']}"
    with log.open("w") as errors:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{name}: exit code {done.returncode}\n{done.stdout[-1000:]}\n{log.read_text()[-3000:]}")
    return done.stdout


PHASES: dict[str, Callable[[Session, dict[str, Any]], None]] = {
    "speed": speed,
    "shapes": shapes,
    "profile": profile,
    "attention": attention,
    "correct": correct,
    "capped": capped,
}

__all__ = ["PHASES"]
