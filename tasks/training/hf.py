"""The hf backend: transformers loads the base model, PEFT wraps it, on the CPU or a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.config import LoraSection
from tasks.training.backend import Job, Progress
from tasks.training.loading import load_base, load_tokenizer
from tasks.training.trainer import fit


class HfBackend:
    """TRL and PEFT as they are."""

    def train(self, job: Job, progress: Progress) -> float:
        """Train with TRL; see tasks.training.backend.Backend."""
        resolved = job.resolved
        model = load_base(Path(job.model.path), resolved.dtype, load_in_4bit=resolved.load_in_4bit, device=resolved.device)
        return fit(job, wrap(model, job.config.lora), load_tokenizer(job.model), progress, settings(job))


def settings(job: Job) -> dict[str, Any]:
    """SFTConfig arguments of this backend."""
    return {
        "gradient_checkpointing": job.resolved.gradient_checkpointing == "full",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "max_length": None,
        "padding_free": job.packed,
    }


def wrap(model: Any, lora: LoraSection) -> Any:
    """The base model with a fresh adapter; the adapter's start depends on lora.random_state alone."""
    from peft import prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return add_adapter(model, lora)


def add_adapter(model: Any, lora: LoraSection) -> Any:
    """PEFT's wrapper with a fresh adapter around a model as it is."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(lora.random_state)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            bias=lora.bias,
            target_modules=list(lora.target_modules),
            use_rslora=lora.use_rslora,
            task_type="CAUSAL_LM",
        ),
    )
