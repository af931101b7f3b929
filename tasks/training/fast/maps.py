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


class AdapterRefresh:
    """Puts adapters as they are now beside their frozen matrices."""

    def __init__(self, scaling: float, *, compiled: bool) -> None:
        """LoRA's alpha / rank; and whether torch compiles the arithmetic, on a GPU."""
        self._scaling, self._compiled = scaling, compiled
        self._put = torch.compile(_put_adapters, dynamic=False) if compiled else _put_adapters
        self._graph: Any = None
        self._captured: tuple[torch.dtype, list[int]] | None = None

    def one_layer(self, maps: Sequence[Map], dtype: torch.dtype) -> None:
        """Those of a layer's maps.

        Of plain matrices outside the compiled function, which would copy the whole matrices for them.
        """
        kept = [linear for linear in maps if linear.kind != "nf4"]
        for linear, matrices in zip(kept, self._put(kept, self._scaling, dtype) if kept else (), strict=True):
            if matrices:
                frozen.refresh(linear.kind, linear.base, *matrices)

    def all_layers(self, layers: Sequence[Sequence[Map]], dtype: torch.dtype) -> None:
        """Those of all layers, each at its place in memory for good; where they are compiled, as one CUDA graph.

        Its many short kernels take a GPU less time than Python takes to start them, for which small models waited.
        """
        beside = [linear for maps in layers for linear in maps if linear.kind != "nf4"]
        if not (self._compiled and beside and beside[0].downs[0].is_cuda):
            self._each(layers, dtype)
            return
        adapters = [part for linear in beside for part in (*linear.downs, *linear.ups)]
        if self._captured != (captured := (dtype, [part.data_ptr() for part in adapters])):
            self._each(layers, dtype)  # what is compiled or loaded at first cannot be captured
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # other threads load batches meanwhile
                self._each(layers, dtype)
            self._captured = captured
        self._graph.replay()

    def _each(self, layers: Sequence[Sequence[Map]], dtype: torch.dtype) -> None:
        for maps in layers:
            self.one_layer(maps, dtype)


@torch.no_grad()
def _put_adapters(maps: Sequence[Map], scaling: float, dtype: torch.dtype) -> list[tuple[Tensor, Tensor] | None]:
    """All but those of plain matrices, of which A and B are returned."""
    matrices = [frozen.adapter_matrices(linear.downs, linear.ups, scaling, dtype) for linear in maps]
    for linear, (a, b) in zip(maps, matrices, strict=True):
        if linear.kind != "plain":
            frozen.refresh(linear.kind, linear.base, a, b)
    return [pair if linear.kind == "plain" else None for linear, pair in zip(maps, matrices, strict=True)]
