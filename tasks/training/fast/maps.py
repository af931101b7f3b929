"""A layer's linear maps out of a PEFT-wrapped model: frozen matrices of a common input as one, their adapters; imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.training.fast import frozen
from tasks.training.fast.frozen import Kind

EXACT_BACKWARD = ("o_proj",)
"""Left in the compute type by fp8-backward. The attention's output map is 8 % of a Llama-3-8B layer's weights; with it in fp8
too, the gradients of two such layers were 0.060 from float32's, without it 0.054 (tests/bench/LOG.md)."""


class Map(NamedTuple):
    """A group's frozen matrices and its adapters."""

    kind: Kind
    base: tuple[Tensor, ...]
    """The frozen tensors, as frozen.py lays them out."""
    downs: tuple[Tensor, ...]
    """A of each map, (rank, in)."""
    ups: tuple[Tensor, ...]
    """B of each map, (out, rank)."""
    bias: Tensor | None = None
    """Of all maps, (out,)."""


def fuse_linears(parent: Any, names: Sequence[str], kind: Kind, dtype: torch.dtype, device: torch.device) -> Map:
    """The frozen matrices of modules with a common input as one on the device, taken out of the modules, and their adapters.

    They are held in the compute type where `kind` cannot have them.
    """
    modules = [getattr(parent, name) for name in names]
    linears = [getattr(module, "base_layer", module) for module in modules]
    adapters = [_adapter(module, linear) for module, linear in zip(modules, linears, strict=True)]
    downs, ups = zip(*adapters, strict=True)
    rank = frozen.padded_rank(downs)
    if (kind == "fp8-backward" and names == EXACT_BACKWARD) or (kind == "nf4" and not all(map(is_nf4, linears))):
        kind = "plain"
    if kind == "nf4":
        states = [linear.weight.quant_state for linear in linears]
        base = frozen.freeze_nf4([linear.weight.data for linear in linears], [unnested_scales(state) for state in states])
    else:
        base = frozen.FREEZE[kind](torch.cat([plain_weight(linear).to(device, dtype) for linear in linears]), rank)
    for linear in linears:
        linear.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    biases = [linear.bias.to(device, dtype) for linear in linears if linear.bias is not None]
    return Map(kind, base, tuple(downs), tuple(ups), torch.cat(biases) if biases else None)


def _adapter(module: Any, linear: Any) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of a module; of rank 0 where it has no adapter."""
    if module is linear:
        where = linear.weight.device
        return torch.zeros(0, linear.in_features, device=where), torch.zeros(linear.out_features, 0, device=where)
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def is_nf4(linear: Any) -> bool:
    """Whether a linear module's weight is stored as frozen.py unpacks it; some models leave a few of theirs in 16 bits."""
    state = getattr(linear.weight, "quant_state", None)
    return state is not None and (state.quant_type, state.blocksize) == ("nf4", frozen.NF4_BLOCK)


def plain_weight(linear: Any) -> Tensor:
    """A linear module's weight (out, in), unpacked if it is stored in 4 bits."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight.data
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, state)


def unnested_scales(state: Any) -> Tensor:
    """The scales of a 4-bit weight, themselves unpacked if they are stored in 8 bits."""
    if not state.nested:
        return state.absmax
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(state.absmax, state.state2) + state.offset


def lora_scaling(wrapped: Any) -> float:
    """The factor of all adapters: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    return float(next(module.scaling["default"] for module in wrapped.modules() if hasattr(module, "lora_A")))
