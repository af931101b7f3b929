"""What a request comes to on the machine at hand: number type, memory, and refusals before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from tasks.backends import Resolved
from tasks.config import FinetuneConfig, WeightsConfig
from tasks.refs import ConfigError, InputError, Model

GIB = 2**30
DType = Literal["bfloat16", "float16", "float32"]
BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
NF4_BYTES = 0.53
"""A weight in NF4 with doubly quantized scales. Source: bitsandbytes, blocks of 64 and 256."""
OPTIMIZER_BYTES = {"adamw_8bit": 2, "adamw_torch": 8, "adamw_torch_fused": 8}
"""Two moments for each trained parameter."""
LOSS_TOKENS = 1024
"""Tokens whose logits are in memory at once: both backends take the loss in chunks."""
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "unsloth", "unsloth_zoo")


@dataclass(frozen=True)
class Shape:
    """A Llama-like model's dimensions, from its config.json."""

    hidden: int
    layers: int
    vocabulary: int
    tied: bool
    linear: dict[str, tuple[int, int]]
    """(in, out) features of each linear module of a layer, by name."""

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's linear modules."""
        return sum(inputs * outputs for inputs, outputs in self.linear.values())


def resolve(config: FinetuneConfig, weights: WeightsConfig, device: str) -> Resolved:
    """Decide what the request leaves open.

    Raises:
        ConfigError: when the device, the number type or the backend's library can't be had here.
    """
    check_backend(config.backend)
    check_device(device)
    return Resolved(
        dtype=resolve_dtype(weights.dtype, device),
        load_in_4bit=weights.load_in_4bit,
        optimizer=config.optimizer,
        gradient_checkpointing=config.gradient_checkpointing,
        device=device,
        device_name=device_name(device),
        versions=versions(),
    )


def check_backend(name: str) -> None:
    """Refuse the unsloth backend where its library is not installed."""
    if name == "unsloth" and find_spec("unsloth") is None:
        raise ConfigError(
            "finetune.backend: Unsloth is not installed: got unsloth; expected an installed backend. "
            'Install it (pip install "amazon-ft[cuda]") or set finetune.backend=hf finetune.gradient_checkpointing=full.'
        )


def check_device(device: str) -> None:
    """Refuse `cuda` where torch sees no GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device: no CUDA device here: got cuda; expected a GPU that torch {torch.__version__} can use. "
            "Run this on a machine with one (amazon-ft doctor says what is missing) or set device=cpu."
        )


def resolve_dtype(wanted: str, device: str) -> DType:
    """The number type to compute in: `auto` takes bfloat16 on a GPU that has it, else float16 there, float32 on the CPU.

    >>> resolve_dtype("auto", "cpu"), resolve_dtype("bfloat16", "cpu")
    ('float32', 'bfloat16')
    """
    match wanted, device:
        case "auto", "cpu":
            return "float32"
        case "auto", _:
            return "bfloat16" if _has_bfloat16() else "float16"
        case "float16", "cpu":
            raise ConfigError("model.dtype: no float16 training on the CPU: got float16; expected auto, bfloat16 or float32.")
        case "float16", _:
            return "float16"
        case "float32", _:
            return "float32"
        case _:
            if device == "cuda" and not _has_bfloat16():
                raise ConfigError(
                    f"model.dtype: {device_name(device)} has no bfloat16: got bfloat16; expected float16 or auto. "
                    "Set model.dtype=auto."
                )
            return "bfloat16"


def _has_bfloat16() -> bool:
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def device_name(device: str) -> str:
    """The GPU's name, or `CPU`."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what training comes to."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_model(model: Model) -> None:
    """Refuse a directory that holds no model.

    Raises:
        InputError: naming what is missing.
    """
    path = Path(model.path)
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (path / name).is_file()]
    if not any(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise InputError(
            f"model.id: {model.name}: files missing: got {path} without {', '.join(missing)}; "
            "expected a model directory as transformers saves it. Download it again or name another."
        )


def read_shape(model: Path) -> Shape | None:
    """The model's dimensions, or None for an architecture without Llama's modules."""
    config = json.loads((model / "config.json").read_text())
    try:
        hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        keys = size * config.get("num_key_value_heads", heads)
        return Shape(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            linear={
                "q_proj": (hidden, size * heads),
                "k_proj": (hidden, keys),
                "v_proj": (hidden, keys),
                "o_proj": (size * heads, hidden),
                "gate_proj": (hidden, inner),
                "up_proj": (hidden, inner),
                "down_proj": (inner, hidden),
            },
        )
    except KeyError:
        return None


def estimate_gib(shape: Shape, config: FinetuneConfig, resolved: Resolved, tokens: int) -> dict[str, float]:
    """The least memory that a training step of so many tokens takes, in GiB: weights, adapter, optimizer, activations, total."""
    size = BYTES[resolved.dtype]
    linear = shape.layers * shape.layer_parameters * (NF4_BYTES if resolved.load_in_4bit else size)
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2) * size
    targets = [shape.linear[name] for name in config.lora.target_modules if name in shape.linear]
    trained = shape.layers * config.lora.r * sum(inputs + outputs for inputs, outputs in targets)
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
    """The three settings that save memory, with values to try."""
    lighter = "unsloth" if config.backend == "unsloth" else "full"
    halved = max(1, config.batch_size // 2)
    return (
        f"Lower finetune.batch_size (now {config.batch_size}; {halved} with twice finetune.gradient_accumulation trains the same), "
        f"set finetune.gradient_checkpointing={lighter} (now {config.gradient_checkpointing}), "
        "or lower tokenize.max_tokens (pack.tokens when packing)."
    )


def free_gib(device: str) -> float | None:
    """GPU memory that nobody uses, in GiB; None on the CPU."""
    import torch

    return round(torch.cuda.mem_get_info()[0] / GIB, 3) if device == "cuda" else None


def peak_gib(device: str) -> float:
    """The most memory that this process has used so far: the GPU's, or the main memory on the CPU."""
    import resource

    import torch

    used = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return round(used / GIB, 3)
