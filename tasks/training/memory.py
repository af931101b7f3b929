"""How much memory a training takes, and what to say when there is too little."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from tasks.config import FinetuneConfig
from tasks.refs import InputError, PipelineError
from tasks.training.backend import Job, Resolved
from tasks.training.checkpoints import describe_kept
from tasks.training.errors import first_line, is_out_of_memory
from tasks.training.hardware import GIB
from tasks.training.model_shape import ModelShape

BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
NF4_BYTES = 0.53
"""A weight in NF4 with doubly quantized scales. Source: bitsandbytes, blocks of 64 and 256."""
OPTIMIZER_BYTES = {"adamw_8bit": 2, "adamw_torch": 8, "adamw_torch_fused": 8}
"""Two moments for each trained parameter."""
GATHERED_LAYERS = 2
"""Of a model that is shared out: the one that is computed, and the next."""
LOSS_TOKENS = 1024
"""Tokens whose logits are in memory at once: both backends take the loss in chunks."""


def estimate_gib(shape: ModelShape, config: FinetuneConfig, resolved: Resolved, tokens: int, shares: int = 1) -> dict[str, float]:
    """The least memory that a training step of so many tokens takes, in GiB: weights, adapter, optimizer, activations, total.

    On one of so many devices that share out the layers' matrices.
    """
    size = BYTES[resolved.dtype]
    held = shape.layers if shares == 1 else shape.layers / shares + GATHERED_LAYERS
    linear = held * shape.layer_parameters * (NF4_BYTES if resolved.load_in_4bit else size)
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2) * size
    targets = [shape.linear[name] for name in config.lora.target_modules if name in shape.linear]
    trained = shape.layers * config.lora.r * sum(inputs + outputs for inputs, outputs in targets)
    trained += shape.vocabulary * shape.hidden * len({"embed_tokens", "lm_head"} & set(config.lora.modules_to_save))
    layer = (sum(outputs for _, outputs in shape.linear.values()) + 2 * shape.hidden) * size
    kept = {"none": shape.layers * layer, "full": shape.layers * shape.hidden * size + layer, "unsloth": layer}
    logits = min(tokens, LOSS_TOKENS) * shape.vocabulary * 4
    parts = {
        "weights": linear + embeddings,
        "adapter": trained * (4 + 4),
        "optimizer": trained * OPTIMIZER_BYTES[resolved.optimizer],
        "activations": tokens * kept[resolved.gradient_checkpointing] + logits,
    }
    return {name: round(value / GIB, 4) for name, value in (parts | {"total": sum(parts.values())}).items()}


def check_memory(estimate: dict[str, float], free_gib: float, config: FinetuneConfig) -> None:
    """Refuse a training whose least memory exceeds what the GPU has free.

    Raises:
        InputError: with the estimate, part by part, and the settings to change.
    """
    if estimate["total"] <= free_gib:
        return
    parts = ", ".join(f"{name} {value:.1f}" for name, value in estimate.items() if name != "total")
    raise InputError(
        f"device: too little GPU memory: got {free_gib:.1f} GiB free; expected at least {estimate['total']:.1f} GiB ({parts}). "
        f"{memory_advice(config)}"
    )


def memory_advice(config: FinetuneConfig) -> str:
    """The settings that save memory and can still go down, with values to try.

    >>> memory_advice(FinetuneConfig(backend="hf", batch_size=1, gradient_checkpointing="full"))
    'Lower tokenize.max_tokens (pack.tokens when packing) or finetune.lora.r (now 16).'
    """
    lighter = "unsloth" if config.backend == "unsloth" else "full"
    halved = f"{config.batch_size // 2} with twice the gradient_accumulation trains the same"
    nf4 = config.backend == "fast" and config.frozen_weights != "nf4"
    advice = [
        *([f"finetune.batch_size (now {config.batch_size}; {halved})"] if config.batch_size > 1 else []),
        "tokenize.max_tokens (pack.tokens when packing)",
        f"finetune.lora.r (now {config.lora.r})",
    ]
    switch = [
        *([f"finetune.frozen_weights=nf4 (now {config.frozen_weights})"] if nf4 else []),
        *(
            [f"finetune.gradient_checkpointing={lighter} (now {config.gradient_checkpointing})"]
            if config.gradient_checkpointing not in (lighter, "auto")
            else []
        ),
    ]
    return f"{f'Set {_or(switch)}, or lower' if switch else 'Lower'} {_or(advice)}."


def _or(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@contextmanager
def training_errors_explained(job: Job) -> Generator[None]:
    """Turn running out of memory into a PipelineError that names the settings to change and the checkpoint kept."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise PipelineError(
            f"finetune: out of memory on {job.resolved.device_name}: got {first_line(error)}; expected the training to fit. "
            f"{memory_advice(job.config)} {describe_kept(job.work)}"
        ) from error
