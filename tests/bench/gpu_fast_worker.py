"""One measurement of the fast backend in a process of its own; ends with a line `RESULT {...}`.

python -m tests.bench.gpu_fast_worker profile|attention|correct|capped MODEL_DIR DATA_DIR DEVICE [HELD|GIB]
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tasks.training.fast.packed import Collator
from tests.bench.gpu_session import LLAMA3_8B
from tests.support.nearness import Rows, adapter_of, gradients, packed, relative, row_by_row

WARM, PROFILED = 6, 4
"""Steps before the profile, and in it."""
KERNELS = 40
"""Named in a profile."""
DRIVER_GIB = 0.6
"""Of a card's memory, what CUDA itself takes beside what torch allocates."""
STEPS, WINDOWS = 4, 3
TEXTS, TOKENS = 8, 512
"""Of the comparison with float32."""
LAYERS = 2
"""Of Llama-3-8B, in that comparison."""
PACKS = 20
"""Whose attention is timed."""


def profile(model: Path, data: Path, device: str, held: str) -> dict[str, Any]:
    """Milliseconds of a step by kernel, the largest first, and of all of them."""
    from transformers import TrainerCallback

    from flows.bench import train_ours
    from flows.bench.train import bench_config

    activities = [torch.profiler.ProfilerActivity.CPU if device == "cpu" else torch.profiler.ProfilerActivity.CUDA]
    profiler = torch.profiler.profile(activities=activities)

    class Profiling(TrainerCallback):
        def on_step_end(self, *args: Any, **_: Any) -> None:
            step = args[1].global_step
            if step == WARM:
                profiler.start()
            if step == WARM + PROFILED:
                if device == "cuda":
                    torch.cuda.synchronize()
                profiler.stop()

    from tasks.training import trainer
    from tasks.training.fast import backend as fast

    def watched(job: Any, made: Any) -> float:
        made.add_callback(Profiling())
        return trainer.run_trainer(job, made)

    with patch.object(fast, "run_trainer", watched):
        told = train_ours.time_training(reference(model), data / "packs.arrow", device, bench_config(held, WARM + PROFILED, 1))
    rows = [
        (event.key, event.self_device_time_total if device == "cuda" else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
    ]
    rows.sort(key=lambda row: -row[1])
    kind = str(torch.device(device).type).upper()
    events = [event for event in profiler.profiler.kineto_results.events() if str(event.device_type()).endswith(kind)]
    idle = gaps((event.name(), event.start_ns(), event.end_ns()) for event in events)
    return {
        "ms_of_all_kernels_a_step": round(sum(row[1] for row in rows) / 1000 / PROFILED, 2),
        "ms_idle_a_step": round(sum(ns for _, ns, _ in idle) / 1e6 / PROFILED, 2),
        "idle_before": [[name[:120], round(ns / 1e6 / PROFILED, 3), count / PROFILED] for name, ns, count in idle[:KERNELS]],
        "kernels": [[name[:120], round(us / 1000 / PROFILED, 3), count / PROFILED] for name, us, count in rows[:KERNELS]],
        "trained": told,
    }


def gaps(kernels: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """(name, nanoseconds in which nothing ran before a kernel of that name, how often), the longest first.

    >>> gaps([("matmul", 0, 4), ("add", 7, 8), ("copy", 3, 5), ("add", 9, 10)])
    [('add', 3, 2)]
    """
    until, found = 0, dict[str, tuple[int, int]]()
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        if until and start > until:
            nanoseconds, count = found.get(name, (0, 0))
            found[name] = (nanoseconds + start - until, count + 1)
        until = max(until, end)
    return sorted(((name, *of_name) for name, of_name in found.items()), key=lambda row: -row[1])


def attention(model: Path, data: Path, device: str) -> dict[str, Any]:
    """Milliseconds of a layer's attention, forward and backward, when told the true sizes of a pack and the largest of all.

    By FlashAttention-4 too, where that is installed.
    """
    from datasets import Dataset
    from triton.testing import do_bench

    from tasks.training.fast.attention import flash4_kernels
    from tasks.training.fast.backend import gpu_collator, max_lengths

    packs: Any = Dataset.from_file(str(data / "packs.arrow"))
    most = max_lengths(packs)
    collate = gpu_collator(most, 1, packed=True)
    heads, groups = LLAMA3_8B["num_attention_heads"], LLAMA3_8B["num_key_value_heads"]
    size = LLAMA3_8B["hidden_size"] // heads
    told: dict[str, Any] = {"largest": [collate.rows, most.row], "sizes": [], "ms_true": [], "ms_largest": []}
    if flash4_kernels() is not None:
        told["ms_flash4"] = []
    for pack in packs.select(range(PACKS)):
        batch = collate([pack])
        flash4 = [("ms_flash4", batch["sizes"])] if "ms_flash4" in told else []
        shapes = [(collate.tokens, some, size) for some in (heads, groups, groups)]
        parts = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        bounds, grad = batch["bounds"].to(device), torch.randn(shapes[0], device=device, dtype=torch.bfloat16)
        for name, sizes in (("ms_true", batch["sizes"]), ("ms_largest", told["largest"]), *flash4):
            step = partial(attend_and_back, parts, grad, bounds, torch.tensor(sizes), name.endswith("flash4"))
            told[name].append(round(do_bench(step, warmup=20, rep=100, grad_to_none=parts, return_mode="median"), 4))
        told["sizes"].append(list(batch["sizes"]))
    return told | {f"median_{name}": sorted(times)[PACKS // 2] for name, times in told.items() if name.startswith("ms_")}


def attend_and_back(
    parts: list[torch.Tensor], grad: torch.Tensor, bounds: torch.Tensor, sizes: torch.Tensor, flash4: bool
) -> None:
    """What is timed."""
    from tasks.training.fast.attention import attend

    attend(*parts, bounds, sizes, flash4=flash4).backward(grad)


def correct(model: Path, data: Path, device: str) -> dict[str, Any]:
    """Each way to train on real texts against float32: the largest distance of logits, the relative one of gradients."""
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = some_rows(model, data)
    ways = [
        "transformers float32",
        "packed float32",
        "transformers bf16",
        "packed bf16",
        *(["packed fp8", "packed fp8-backward"] if device == "cuda" else []),
    ]
    return {
        "rows": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "SmolLM2-135M, 30 layers": compared(lambda dtype: loaded(model, dtype, device), rows, ways, device),
        "Llama-3-8B's width, 2 layers, random weights": compared(
            lambda dtype: wide(dtype, device, len(rows)), rows, ways, device
        ),
    }


def compared(make: Any, rows: Rows, ways: list[str], device: str) -> dict[str, Any]:
    """{way: {loss, gradients, logits}}, the last two as distances from the first way."""
    told: dict[str, Any] = {}
    wanted: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None
    for way in ways:
        kind, number = way.split()
        wrapped = make(torch.float32 if number == "float32" else torch.bfloat16)
        if kind == "transformers":
            loss, logits = row_by_row(wrapped, rows)
        else:
            compiled, kind = device == "cuda" and number != "float32", number if number.startswith("fp8") else "plain"
            loss, logits = packed(wrapped, rows, kind=kind, collate=collator(rows, device), compiled=compiled)
        found = {name: grad.float().cpu() for name, grad in gradients(wrapped).items()}
        wanted = wanted or (logits.float().cpu(), found)
        told[way] = {
            "loss": round(loss, 6),
            "gradients_relative": relative(found, wanted[1]),
            "logits_max_abs": float((logits.float().cpu() - wanted[0]).abs().max()),
            "largest_logit": float(wanted[0].abs().max()),
        }
        del wrapped, logits
    return told


def collator(rows: Rows, device: str) -> Collator:
    """Sizes as a GPU likes them."""
    return Collator(tokens=1024, longest=TOKENS, rows=len(rows) + 2) if device == "cuda" else Collator()


def some_rows(model: Path, data: Path) -> Rows:
    """The first texts as rows of tokens, all but the first tokens of each labelled."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    texts = json.loads((data / "texts.json").read_text())[:TEXTS]
    rows = [tokenizer(text)["input_ids"][:TOKENS] for text in texts]
    return [{"input_ids": ids, "labels": [-100] * 32 + ids[32:]} for ids in rows]


def loaded(model: Path, dtype: torch.dtype, device: str) -> Any:
    """The model with an adapter that is not zero; its weights are bfloat16 numbers in either type."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.bfloat16, attn_implementation="sdpa").to(device)
    return with_adapter(base.to(dtype))


def wide(dtype: torch.dtype, device: str, seed: int) -> Any:
    """The first layers of Llama-3-8B's shape, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):  # drawn there: on the CPU it takes a minute
        base = LlamaForCausalLM(LlamaConfig(**LLAMA3_8B | {"num_hidden_layers": LAYERS}, attn_implementation="sdpa"))
    return with_adapter(base.to(torch.bfloat16).to(dtype))


def with_adapter(base: Any) -> Any:
    from tasks.config import LoraSection
    from tasks.training.loading import attach_fresh_adapter

    wrapped = attach_fresh_adapter(base, LoraSection())
    draw = torch.Generator().manual_seed(1)
    for name, parameter in adapter_of(wrapped).items():
        value = torch.randn(parameter.shape, generator=draw) * 0.02 if "lora_B" in name else parameter.data.cpu()
        parameter.data = value.to(parameter.device, torch.float32)
    return wrapped


def capped(model: Path, data: Path, device: str, gib: str) -> dict[str, Any]:
    """A training in so much memory: what was chosen, how fast it was, and the most that torch and the driver saw in use."""
    from flows.bench import train_ours
    from flows.bench.train import bench_config
    from tasks.training import hardware

    room = float(gib) - DRIVER_GIB
    torch.cuda.set_per_process_memory_fraction(room * hardware.GIB / torch.cuda.get_device_properties(0).total_memory)
    with patch.object(hardware, "free_gib", lambda _: room), driver_peak() as seen:
        told = train_ours.time_training(reference(model), data / "packs.arrow", device, bench_config("auto", STEPS, WINDOWS))
    reserved = round(torch.cuda.max_memory_reserved() / hardware.GIB, 3)
    return {"cap_gib": float(gib), "reserved_gib": reserved, "driver_gib": round(max(seen) / hardware.GIB, 3), **told}


@contextmanager
def driver_peak() -> Iterator[list[int]]:
    """Bytes in use on the GPU as the driver counts them, looked at every tenth of a second; whoever uses it."""
    seen, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            free, total = torch.cuda.mem_get_info()
            seen.append(total - free)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def reference(model: Path) -> Any:
    from tasks.reading.model_files import directory_model

    return directory_model(model, name=model.name)


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    kind, model, data, device, *rest = sys.argv[1:]
    began = time.monotonic()
    found = {"profile": profile, "attention": attention, "correct": correct, "capped": capped}[kind](
        Path(model), Path(data), device, *rest
    )
    print("RESULT", json.dumps(found | {"process_seconds": round(time.monotonic() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
