"""A request resolved on the machine at hand, and refusals before anything is loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from platform import machine
from typing import Literal

from tasks.caching.versions import package_versions
from tasks.config import FinetuneConfig, WeightsConfig
from tasks.refs import ConfigError, InputError, Model
from tasks.training.backend import Resolved

logger = logging.getLogger(__name__)

GIB = 2**30
DType = Literal["bfloat16", "float16", "float32"]
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "unsloth", "unsloth_zoo", "flash-attn-4")
"""Packages whose versions decide what training comes to."""


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
        optimizer=resolve_optimizer(config.optimizer, device),
        gradient_checkpointing=config.gradient_checkpointing,
        device=device,
        device_name=device_name(device),
        versions=package_versions(LIBRARIES),
    )


def count_devices(config: FinetuneConfig, device: str) -> int:
    """How many GPUs, or on a CPU processes, share the steps of a training.

    Raises:
        ConfigError: when there are not as many GPUs.
    """
    import torch

    there = torch.cuda.device_count() if device == "cuda" else 1
    if config.devices == "auto":
        return max(1, min(there, config.step_rows))
    if device == "cuda" and config.devices > there:
        raise ConfigError(
            f"finetune.devices: too few GPUs here: got {config.devices}; expected at most {there}, or auto. "
            "Lower it, or run on a machine with more."
        )
    return config.devices


def resolve_optimizer(wanted: str, device: str) -> str:
    """The optimizer to use: 8-bit moments save a GPU's memory; on the CPU the same AdamW keeps them in 32 bits.

    >>> resolve_optimizer("adamw_8bit", "cpu"), resolve_optimizer("adamw_8bit", "cuda")
    ('adamw_torch', 'adamw_8bit')
    """
    return "adamw_torch" if device == "cpu" and wanted == "adamw_8bit" else wanted


def check_backend(name: str) -> None:
    """Refuse the unsloth backend where its library is not installed."""
    if name == "unsloth" and not package_versions([name]):
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
            if device == "cpu" and _lacks_avx512():
                logger.warning(
                    "model.dtype: this CPU has no AVX-512: got bfloat16, in which a step takes many times as long here; "
                    "expected float32 or auto. Set model.dtype=auto unless memory is short."
                )
            return "bfloat16"


def _lacks_avx512() -> bool:
    import torch

    return torch.backends.cpu.get_cpu_capability() in {"DEFAULT", "AVX2"} and machine() in {"x86_64", "AMD64"}


def _has_bfloat16() -> bool:
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def device_name(device: str) -> str:
    """The GPU's name, or `CPU`."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


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


def free_gib(device: str) -> float | None:
    """GPU memory that nobody uses, in GiB; None on the CPU."""
    import torch

    return round(torch.cuda.mem_get_info()[0] / GIB, 3) if device == "cuda" else None


def used_gib(device: str) -> float:
    """Memory that this process holds now: the GPU's, or the main memory on the CPU."""
    import psutil
    import torch

    used = torch.cuda.memory_reserved() if device == "cuda" else psutil.Process().memory_info().rss
    return round(used / GIB, 3)


def peak_gib(device: str) -> float:
    """The most memory that this process has used so far: the GPU's, or the main memory on the CPU."""
    import resource

    import torch

    used = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return round(used / GIB, 3)
