"""Trains a tiny model in a process of its own: to be killed, or to be patched by Unsloth.

python -m tests.support.train_tiny MODEL_DIR CONFIG_JSON...   a line a training: {"adapter": Adapter, "environment": {...}}

A configuration's "model" names the directory of another model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tasks.config import FinetuneConfig, WeightsConfig
from tasks.finetune import finetune
from tasks.refs import Adapter, Artifact, Model
from tests.support.tiny import tiny_reference, tiny_tokens

QUICK: dict[str, Any] = {
    "backend": "hf",
    "gradient_checkpointing": "none",
    "optimizer": "adamw_torch",
    "learning_rate": 1e-3,
    "max_steps": 12,
    "warmup_steps": 2,
    "logging_steps": 2,
    "save_steps": 4,
}
MAX_TOKENS = 64
HELD_OUT_ROWS = 8


def inputs(model: Model, batches: Artifact, **changes: Any) -> dict[str, Any]:
    """What the finetune stage is called with."""
    weights = WeightsConfig(load_in_4bit=changes.pop("load_in_4bit", False), dtype=changes.pop("dtype", "auto"))
    device = changes.pop("device", "cpu")
    config = FinetuneConfig(**{**QUICK, **changes})
    held_out = tiny_tokens(HELD_OUT_ROWS, seed=1) if config.eval_steps else None
    asked = {"model": model, "batches": batches, "config": config, "weights": weights, "held_out": held_out}
    return {**asked, "max_tokens": MAX_TOKENS, "device": device}


def train(model: Model, batches: Artifact, **changes: Any) -> Adapter:
    """Run the stage as its Prefect task would, without the engine, on one thread."""
    import torch

    torch.set_num_threads(1)
    return finetune.execute(inputs(model, batches, **changes))


if __name__ == "__main__":
    for changes in sys.argv[2:]:
        config = json.loads(changes)
        adapter = train(tiny_reference(Path(config.pop("model", sys.argv[1]))), tiny_tokens(40), **config)
        unsloth = {name: value for name, value in os.environ.items() if name.startswith("UNSLOTH_")}
        print(json.dumps({"adapter": adapter.model_dump(), "environment": unsloth}))
