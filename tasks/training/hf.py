"""The hf backend: transformers loads the base model, PEFT wraps it, on the CPU or a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.config import LoraSection
from tasks.training.backend import Job
from tasks.training.loading import attach_fresh_adapter, load_base, load_tokenizer
from tasks.training.trainer import train_with_trl


class HfBackend:
    """TRL and PEFT as they are."""

    def train(self, job: Job) -> float:
        """Train with TRL; see tasks.training.backend.Backend."""
        resolved = job.resolved
        model = load_base(Path(job.model.path), resolved.dtype, load_in_4bit=resolved.load_in_4bit, device=resolved.device)
        return train_with_trl(job, attach_adapter(model, job.config.lora), load_tokenizer(job.model), hf_arguments(job))


def hf_arguments(job: Job) -> dict[str, Any]:
    """SFTConfig arguments of this backend."""
    return {
        "gradient_checkpointing": job.resolved.gradient_checkpointing == "full",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "max_length": None,
        "padding_free": job.packed,
    }


def attach_adapter(model: Any, lora: LoraSection) -> Any:
    """The base model with a fresh adapter; the adapter's start depends on lora.random_state alone."""
    from peft import prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return attach_fresh_adapter(model, lora)
