"""The unsloth backend: Unsloth loads, wraps and speeds up; the document's own library. Runs on its CPU mode too.

Unsloth patches transformers, TRL and PEFT when it is imported, so it is imported before them.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks.config import LoraSection
from tasks.refs import ConfigError, home
from tasks.training.backend import Job
from tasks.training.trainer import prints_to_stderr, train_with_trl


class UnslothBackend:
    """Unsloth's FastLanguageModel with TRL's trainer as Unsloth patches it."""

    def train(self, job: Job) -> float:
        """Train with Unsloth; see tasks.training.backend.Backend."""
        with prints_to_stderr():
            model, tokenizer = load(job)
            model = attach_unsloth_adapter(model, job.config.lora, job.resolved.gradient_checkpointing)
            return train_with_trl(job, model, tokenizer, {"max_length": job.max_tokens})


def load(job: Job) -> tuple[Any, Any]:
    """Base model and tokenizer by the document's arguments, from an absolute local path."""
    library = import_unsloth()
    import torch

    model, tokenizer = library.FastLanguageModel.from_pretrained(
        model_name=str(Path(job.model.path).absolute()),
        max_seq_length=job.max_tokens,
        dtype=getattr(torch, job.resolved.dtype),
        load_in_4bit=job.resolved.load_in_4bit,
        local_files_only=True,
    )
    return model, tokenizer


def attach_unsloth_adapter(model: Any, lora: LoraSection, gradient_checkpointing: str) -> Any:
    """The base model with a fresh adapter, by the document's arguments."""
    library = import_unsloth()
    return library.FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        target_modules=list(lora.target_modules),
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        use_gradient_checkpointing={"unsloth": "unsloth", "full": True, "none": False}[gradient_checkpointing],
        random_state=lora.random_state,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) or None,
    )


def import_unsloth() -> Any:
    """The library, with its compiled code under AMAZON_FT_HOME, its statistics off and the Hub left alone.

    Raises:
        ConfigError: without a GPU, for releases before 2026.10.9, the first with a CPU mode.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(home() / "unsloth_compiled"))
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import unsloth
    except NotImplementedError as error:
        raise ConfigError(
            f"finetune.backend: Unsloth {version('unsloth')} does not run here: got {error}; expected a GPU, or Unsloth "
            "2026.10.9, which trains on a CPU too. Install that, or set finetune.backend=hf finetune.gradient_checkpointing=full."
        ) from error
    return unsloth
