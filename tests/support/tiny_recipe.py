"""Settings of a training of seconds on a tiny model."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "device": "cpu",
    "sample": {"rows": 30, "eval_rows": 6},
    "tokenize": {"max_tokens": 512},
    "model": {"load_in_4bit": False, "dtype": "float32"},
    "finetune": {
        "backend": "hf",
        "max_steps": 4,
        "warmup_steps": 1,
        "batch_size": 4,
        "gradient_accumulation": 1,
        "learning_rate": 1e-2,
        "optimizer": "adamw_torch",
        "gradient_checkpointing": "none",
        "logging_steps": 2,
        "save_steps": 4,
    },
    "evaluate": {"generations": 2, "max_new_tokens": 4, "batch_size": 6},
}
