"""Runs a PEFT-wrapped Llama over rows laid end to end, each seen by itself; imports torch.

The wrapped model stays what is saved and resumed: its LoRA parameters are the ones trained here. Its frozen matrices are
taken over (tasks/training/fast/frozen.py), maps with a common input as one, and its layers are run by `block`, one compiled
function for all of them on a fixed length.

Shapes: T tokens of all rows together, W width, H query heads, G key-value heads, D their size.

Source of the arithmetic: transformers 5.17, models/llama/modeling_llama.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tasks.training.fast import frozen, lora_linear
from tasks.training.fast.attention import attend
from tasks.training.fast.frozen import Kind
from tasks.training.fast.loss import IGNORED, linear_loss

GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""Maps of a layer that share an input."""
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


class RowBounds(NamedTuple):
    """Where the rows of a batch are, as tasks/training/fast/attention.py reads them."""

    bounds: Tensor
    """Their starts, and the end of the last."""
    sizes: Tensor
    """[rows, tokens of the longest]; on the CPU."""


@dataclass(frozen=True)
class LayerConfig:
    """A decoder layer's numbers beside its tensors."""

    query_heads: int
    key_heads: int
    head_size: int
    scaling: float
    """LoRA's alpha / rank."""
    epsilon: float


class PackedLlama:
    """A PEFT-wrapped LlamaForCausalLM as a function from a batch to its loss."""

    def __init__(self, wrapped: Any, kind: Kind, *, checkpointed: bool, compiled: bool) -> None:
        """Take over the frozen matrices of `wrapped`, which can no longer run by itself then."""
        llama, config = wrapped.get_base_model(), wrapped.config
        self._body, self._head = llama.model, llama.lm_head.weight
        dtype = self._body.embed_tokens.weight.dtype
        maps = [[fuse_linears(getattr(layer, part), names, kind, dtype) for part, names in GROUPS] for layer in self._body.layers]
        norms = [(layer.input_layernorm.weight, layer.post_attention_layernorm.weight) for layer in self._body.layers]
        self._layers = list(zip(maps, norms, strict=True))
        size = self._body.layers[0].self_attn.head_dim
        self._config = LayerConfig(
            query_heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_size=size,
            scaling=lora_scaling(wrapped),
            epsilon=config.rms_norm_eps,
        )
        self._checkpointed, self._compiled = checkpointed, compiled
        self._block = torch.compile(block, dynamic=False) if compiled else block
        self._put = torch.compile(put_adapters, dynamic=False) if compiled else put_adapters

    def loss(self, batch: Mapping[str, Any], items: Tensor | int) -> Tensor:
        """Negative log-likelihood of the batch's labelled tokens over `items`, the labelled tokens of a whole step."""
        hidden = self.hidden(batch).index_select(0, batch["positions"])
        hidden = rms_norm(hidden, self._body.norm.weight, self._config.epsilon)
        return linear_loss(hidden, self._head, batch["shift_labels"], items, compiled=self._compiled)

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (T, vocabulary) of every token."""
        return rms_norm(self.hidden(batch), self._body.norm.weight, self._config.epsilon) @ self._head.t()

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """The last layer's output for the tokens, (T, W), before the last norm."""
        x = self._body.embed_tokens(batch["input_ids"])
        cos, sin = (part[0] for part in self._body.rotary_emb(x, batch["position_ids"]))
        x = x[0].detach().requires_grad_(torch.is_grad_enabled())  # as in later layers, so that one compiled block serves all
        rows = RowBounds(batch["bounds"], torch.tensor(batch["sizes"]))
        for maps, norms in self._layers:
            self._refresh(maps, x.dtype)
            inputs = (x, cos, sin, rows, maps, norms, self._config)
            x = checkpoint(self._block, *inputs, use_reentrant=False) if self._checkpointed else self._block(*inputs)
        return x

    def _refresh(self, maps: Sequence[Map], dtype: torch.dtype) -> None:
        """Put a layer's adapters as they are now beside its frozen matrices.

        Those of plain matrices outside the compiled function, which would copy the whole matrices for them.
        """
        for linear, matrices in zip(maps, self._put(maps, self._config, dtype), strict=True):
            if linear.kind == "plain":
                frozen.refresh("plain", linear.base, *matrices)


def block(
    x: Tensor, cos: Tensor, sin: Tensor, rows: RowBounds, maps: Sequence[Map], norms: tuple[Tensor, Tensor], layer: LayerConfig
) -> Tensor:
    """One decoder layer: x (T, W) to (T, W)."""
    into_heads, out_of_heads, widen, narrow = maps
    heads = _apply(into_heads, rms_norm(x, norms[0], layer.epsilon), layer).view(len(x), -1, layer.head_size)  # (T, H + 2G, D)
    q, k, v = heads.split([layer.query_heads, layer.key_heads, layer.key_heads], 1)
    mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, *rows)
    x = x + _apply(out_of_heads, mixed.reshape(len(x), -1), layer)
    widened = _apply(widen, rms_norm(x, norms[1], layer.epsilon), layer, lora_linear.apply_swiglu)
    return x + _apply(narrow, widened, layer)


@torch.no_grad()
def put_adapters(maps: Sequence[Map], layer: LayerConfig, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Put a layer's adapters as they are now beside its frozen matrices but plain ones, and return all of them."""
    matrices = [frozen.adapter_matrices(linear.downs, linear.ups, layer.scaling, dtype) for linear in maps]
    for linear, (a, b) in zip(maps, matrices, strict=True):
        if linear.kind != "plain":
            frozen.refresh(linear.kind, linear.base, a, b)
    return matrices


def _apply(linear: Map, x: Tensor, layer: LayerConfig, function: Callable[..., Tensor] = lora_linear.apply) -> Tensor:
    kind, base, downs, ups = linear
    return function(kind, x, *frozen.adapter_matrices(downs, ups, layer.scaling, x.dtype), base)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """LlamaRMSNorm: in float32, scaled in the compute type."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (T, heads, D) with cos and sin (T, D), whose halves are equal."""
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    """Its gradient is the same the other way round, which compiles to a third of the time of what autograd makes of it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, cos, sin = args
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]


def fuse_linears(parent: Any, names: Sequence[str], kind: Kind, dtype: torch.dtype) -> Map:
    """The frozen matrices of modules with a common input as one, taken out of the modules, and their adapters.

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
        base = frozen.FREEZE[kind](torch.cat([plain_weight(linear).to(dtype) for linear in linears]), rank)
    for linear in linears:
        linear.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    return Map(kind, base, tuple(downs), tuple(ups))


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


@dataclass(frozen=True)
class Collator:
    """Rows or packs to one sequence, on the CPU.

    {"input_ids": [0, 7, 8, 1, 0, 9, 1], "labels": [...], "seq_lengths": [4, 3]}
        ->  position_ids 0 1 2 3 0 1 2, bounds 0 4 7, positions: tokens whose successor is labelled, shift_labels: those,
            sizes (2, 4): how many rows, and the tokens of the longest; numbers, since tensors are moved to the GPU
    """

    tokens: int = 0
    """Fill up to a multiple of this, with rows that nothing is learnt from; 0: leave the length."""
    longest: int = 0
    """No such row is longer than this."""
    rows: int = 0
    """Fill `bounds` up to so many rows, empty ones."""
    slice: int = 0
    """Fill the labelled positions up to a multiple of this."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch as tensors, but for `sizes`."""
        lengths = [length for example in examples for length in example.get("seq_lengths") or [len(example["input_ids"])]]
        ids = [token for example in examples for token in example["input_ids"]]
        labels = torch.tensor([label for example in examples for label in example["labels"]])
        text = len(ids)
        if self.tokens and (missing := -text % self.tokens):
            ids, lengths = ids + [0] * missing, [*lengths, *_split(missing, self.longest or missing)]
            labels = functional.pad(labels, (0, missing), value=IGNORED)
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        labels[bounds[:-1].long()] = IGNORED  # a row's first token is never predicted from the row before
        positions = torch.nonzero(labels[1:] != IGNORED)[:, 0]
        room = -len(positions) % self.slice if self.slice else 0
        return {
            "input_ids": torch.tensor([ids]),
            "attention_mask": (torch.arange(len(ids)) < text)[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "labels": labels[None],
            "sizes": (len(lengths), max(lengths)),
            "bounds": functional.pad(bounds, (0, max(0, self.rows + 1 - len(bounds))), value=len(ids)),
            "positions": functional.pad(positions, (0, room)),
            "shift_labels": functional.pad(labels[positions + 1], (0, room), value=IGNORED),
        }


def _split(tokens: int, longest: int) -> list[int]:
    """Lengths of rows that take so many tokens.

    >>> _split(7, 3)
    [3, 3, 1]
    """
    return [min(longest, tokens - start) for start in range(0, tokens, longest)]
