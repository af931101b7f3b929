"""How the fast backend holds the base model on the GPU at hand, and whether it keeps activations: the fastest that fits."""

from __future__ import annotations

import json
import logging
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

from tasks.config import FinetuneConfig, FrozenWeights
from tasks.refs import ConfigError
from tasks.training.backend import Resolved
from tasks.training.fast.families import FAMILIES, dropouts, unsupported
from tasks.training.hardware import GIB
from tasks.training.memory import estimate_gib
from tasks.training.model_shape import ModelShape

logger = logging.getLogger(__name__)

Checkpointing = Literal["none", "full"]

FP8_CAPABILITY = (8, 9)
"""The first GPUs with fp8 matrix products (Ada). Source: CUDA's compute capability tables."""
FP8_HIDDEN = 2048
"""`auto` rounds no narrower model. fp8 costs SmolLM2-135M, 576 wide, held-out loss (tests/bench/LOG.md), and speeds up
Llama-3-8B, 4,096 wide; where between the two it begins to pay was not measured."""
KEPT = 1.45
"""Activations over the least estimate: Llama-3-8B, 8,192 tokens, took 38.5 GiB, estimate_gib says 26.6 (tests/bench/LOG.md)."""
USABLE = 0.95
"""Share of the free memory to plan with; the rest goes to fragments."""


class Holding(NamedTuple):
    """How a base model can be held."""

    frozen_weights: FrozenWeights
    checkpointing: Checkpointing
    sharded: bool = False


def choose(
    config: FinetuneConfig,
    resolved: Resolved,
    shape: ModelShape,
    tokens: int,
    free_gib: float | None,
    *,
    devices: int = 1,
) -> Resolved:
    """The fastest of the wanted ways whose estimate fits into each device's free memory; the leanest where none does.

    Raises:
        ConfigError: for fp8 on a GPU without it, or where one device is to share the base model out.
    """
    capability = compute_capability(resolved.device)
    if is_fp8(config.frozen_weights) and capability < FP8_CAPABILITY:
        raise ConfigError(
            f"finetune.frozen_weights: {resolved.device_name} has no fp8: got {config.frozen_weights}; "
            "expected auto, plain or nf4. Set finetune.frozen_weights=auto."
        )
    chosen = resolved
    for held, checkpointing, sharded in ways(config, capability, shape.hidden, devices):
        taken = {"frozen_weights": held, "load_in_4bit": held == "nf4", "gradient_checkpointing": checkpointing}
        chosen = resolved.model_copy(update=taken | {"sharded": sharded})
        estimate = _estimate(shape, config, chosen, tokens, devices if sharded else 1)
        chosen = chosen.model_copy(update={"estimated_gib": estimate, "free_gib": free_gib})
        if free_gib is None or chosen.estimated_gib["total"] <= USABLE * free_gib:  # pyright: ignore[reportOptionalSubscript]
            break
    _tell(chosen)
    return chosen


def check_supported(path: Path, dtype: str) -> None:
    """Refuse a model that packed.py does not compute, by its config.json.

    Raises:
        ConfigError: naming the backend that can.
    """
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    stored = config.get("quantization_config")
    weights = "16 bits" if stored is None else "4 bits" if stored.get("load_in_4bit") else stored.get("quant_method")
    wrong = unsupported(config)
    wrong += [f"dtype {dtype}"] if dtype not in ("bfloat16", "float32") else []
    wrong += [f"weights {weights}"] if weights not in ("16 bits", "4 bits") else []
    if wrong:
        raise ConfigError(
            f"finetune.backend: the fast backend can't train this model: got {', '.join(wrong)}; expected a "
            f"Llama or one of its kin ({', '.join(FAMILIES)}), its weights in 16 bits or in 4 by bitsandbytes, in bfloat16 or "
            "float32, with no such setting. "
            "Set finetune.backend=hf finetune.gradient_checkpointing=full."
        )
    if left_out := dropouts(config):
        logger.warning("finetune: backend fast trains without the dropout of the model's config.json: %s.", left_out)


def is_fp8(held: str) -> bool:
    """Whether a way to hold the matrices needs fp8 matrix products."""
    return held in ("fp8", "fp8-backward")


def ways(config: FinetuneConfig, capability: tuple[int, int], hidden: int, devices: int = 1) -> list[Holding]:
    """The ways that are wanted and can be had here for a model of that width, fastest first.

    >>> [tuple(way)[:2] for way in ways(FinetuneConfig(backend="fast", gradient_checkpointing="auto"), (8, 0), 4096)]
    [('plain', 'none'), ('plain', 'full'), ('nf4', 'none'), ('nf4', 'full')]
    >>> ways(FinetuneConfig(backend="fast", sharded=True, frozen_weights="fp8"), (9, 0), 4096, 2)
    [Holding(frozen_weights='fp8', checkpointing='full', sharded=True)]
    """
    fastest: tuple[FrozenWeights, ...] = ("fp8",) if capability >= FP8_CAPABILITY and hidden >= FP8_HIDDEN else ("plain",)
    on_gpu: tuple[FrozenWeights, ...] = (*fastest, "nf4") if capability > (0, 0) else ("plain",)
    held = on_gpu if config.frozen_weights == "auto" else (config.frozen_weights,)
    kept: tuple[Checkpointing, ...] = ("none", "full")
    whole = [
        Holding(*way) for way in product(held, kept if config.gradient_checkpointing == "auto" else (_checkpointing(config),))
    ]
    shared = [Holding(way, "full", sharded=True) for way in held] if devices > 1 else []
    if config.sharded is True and not shared:
        raise ConfigError(
            "finetune.sharded: nothing to share the base model out to: got true and 1 device; expected several devices. "
            "Set finetune.devices to their number, or finetune.sharded=auto."
        )
    return {"auto": whole + shared, True: shared, False: whole}[config.sharded]


def _checkpointing(config: FinetuneConfig) -> Checkpointing:
    return "none" if config.gradient_checkpointing == "none" else "full"


def _estimate(shape: ModelShape, config: FinetuneConfig, resolved: Resolved, tokens: int, shares: int) -> dict[str, float]:
    parts = {name: value for name, value in estimate_gib(shape, config, resolved, tokens, shares).items() if name != "total"}
    if resolved.frozen_weights == "fp8-backward":
        parts["weights"] = round(parts["weights"] + shape.layers * shape.layer_parameters / shares / GIB, 4)
    parts["activations"] = round(parts["activations"] * KEPT, 4)
    return parts | {"total": round(sum(parts.values()), 4)}


def _tell(chosen: Resolved) -> None:
    estimate = chosen.estimated_gib or {}
    room = "" if chosen.free_gib is None else f" of {chosen.free_gib:.1f} GiB free"
    shared = ", shared out over the devices" if chosen.sharded else ""
    logger.info(
        "finetune: base matrices %s%s, gradient checkpointing %s: the fastest that fits on %s (about %.1f GiB%s).",
        *(chosen.frozen_weights, shared, chosen.gradient_checkpointing, chosen.device_name, estimate.get("total", 0.0), room),
    )


def compute_capability(device: str) -> tuple[int, int]:
    """The GPU's compute capability; (0, 0) on the CPU."""
    import torch

    return torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
