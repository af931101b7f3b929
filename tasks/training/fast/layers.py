"""The layers of a model: their numbers and tensors, taken over from transformers' modules, and their arithmetic; imports torch.

Shapes: T tokens of all rows together, W width, H query heads, G key-value heads, D their size.

Source of the arithmetic: transformers 5.17, models/MODEL_TYPE/modeling_MODEL_TYPE.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.training.fast import frozen, lora_linear
from tasks.training.fast.attention import PLAIN, Scores, attend
from tasks.training.fast.families import FAMILIES, Family, Gate
from tasks.training.fast.frozen import Kind
from tasks.training.fast.maps import Map, fuse_linears
from tasks.training.fast.positions import rotate, turned_heads

Groups = tuple[tuple[str, tuple[str, ...]], ...]
GROUPS: Groups = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""Maps of a layer that share an input."""
FUSED: Groups = (
    ("self_attn", ("qkv_proj",)),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_up_proj",)),
    ("mlp", ("down_proj",)),
)
"""The same of a family that stores them as one."""


class RowBounds(NamedTuple):
    """Where the rows of a batch are, as tasks/training/fast/attention.py reads them."""

    bounds: Tensor
    """Their starts, and the end of the last."""
    sizes: Tensor
    """[rows, tokens of the longest]; on the CPU."""
    blocks: Any = None
    """Of seen_blocks, for attention with capped scores on a GPU."""
    flash4: bool = False
    """Whether FlashAttention-4 computes it there."""


class Norms(NamedTuple):
    """A layer's norms; None where its family has none."""

    before_attention: Tensor | None
    after_attention: Tensor | None
    before_gate: Tensor | None
    after_gate: Tensor | None
    queries: Tensor | None
    """Of each head, (D,), or of all together, (H D,)."""
    keys: Tensor | None


@dataclass(frozen=True)
class LayerConfig:
    """A decoder layer's numbers beside its tensors."""

    query_heads: int
    key_heads: int
    head_size: int
    scaling: float
    """LoRA's alpha / rank."""
    epsilon: float
    gate: Gate = "silu"
    norm_offset: float | None = None
    residual: float = 1.0
    """Factor of all that is added to the layer's input."""
    rotary: bool = True
    scores: Scores = PLAIN


class Layer(NamedTuple):
    """A decoder layer, its frozen matrices taken over."""

    maps: list[Map]
    norms: Norms
    config: LayerConfig
    positions: str | None
    """Which kind of rotary positions, where a model has several."""


def common_config(body: Any, config: Any, scaling: float) -> LayerConfig:
    """The numbers that all layers of a model have in common."""
    family, attention = FAMILIES[config.model_type], body.layers[0].self_attn
    scale = None if attention.scaling == attention.head_dim**-0.5 else attention.scaling
    return LayerConfig(
        query_heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_size=attention.head_dim,
        scaling=scaling,
        epsilon=config.rms_norm_eps,
        gate=family.gate,
        norm_offset=family.norm_offset,
        residual=float(getattr(config, "residual_multiplier", 1.0)),
        scores=Scores(scale, cap=getattr(config, "attn_logit_softcapping", None)),
    )


def windows_of(config: Any) -> list[int | None]:
    """How many tokens each layer sees, itself included; None: all before it."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]


def kind_of_positions(config: Any, index: int) -> str | None:
    """The kind of a layer's rotary positions; None where all layers have the same."""
    types = getattr(config, "layer_types", None)
    return types[index] if types and types[index] in config.rope_parameters else None


def take_over(body: Any, config: Any, kind: Kind, common: LayerConfig, device: torch.device) -> Iterator[Layer]:
    """The decoder layers of a wrapped model, their frozen matrices taken out of its modules to the device, one by one."""
    family, dtype = FAMILIES[config.model_type], body.embed_tokens.weight.dtype
    for index, (layer, window) in enumerate(zip(body.layers, windows_of(config), strict=True)):
        maps = [
            fuse_linears(getattr(layer, part), names, kind, dtype, device) for part, names in (FUSED if family.fused else GROUPS)
        ]
        rotary = bool(getattr(layer.self_attn, "use_rope", True))
        own = replace(common, rotary=rotary, scores=common.scores._replace(window=window))
        yield Layer(maps, norms_of(layer, family), own, kind_of_positions(config, index))


def norms_of(layer: Any, family: Family) -> Norms:
    """The weights of a layer's norms."""

    def weight(parent: Any, name: str | None) -> Tensor | None:
        return getattr(parent, name).weight if name else None

    heads = ("q_norm", "k_norm") if family.head_norms else (None, None)
    return Norms(*(weight(layer, name) for name in family.norms), *(weight(layer.self_attn, name) for name in heads))


def block(x: Tensor, cos: Tensor, sin: Tensor, rows: RowBounds, maps: Sequence[Map], norms: Norms, layer: LayerConfig) -> Tensor:
    """One decoder layer: x (T, W) to (T, W)."""
    into_heads, out_of_heads, widen, narrow = maps
    heads = _apply(into_heads, _norm(x, norms.before_attention, layer), layer).view(len(x), -1, layer.head_size)  # (T, H + 2G, D)
    q, k, v = _queries_keys_values(heads, cos, sin, norms, layer)
    mixed = attend(q, k, v, rows.bounds, rows.sizes, layer.scores, rows.blocks, flash4=rows.flash4)
    x = _add(x, _norm(_apply(out_of_heads, mixed.reshape(len(x), -1), layer), norms.after_attention, layer), layer)
    widened = _apply(widen, _norm(x, norms.before_gate, layer), layer, lora_linear.GATED[layer.gate])
    return _add(x, _norm(_apply(narrow, widened, layer), norms.after_gate, layer), layer)


def _apply(linear: Map, x: Tensor, layer: LayerConfig, function: Callable[..., Tensor] = lora_linear.apply) -> Tensor:
    kind, base, downs, ups, bias = linear
    y = function(kind, x, *frozen.adapter_matrices(downs, ups, layer.scaling, x.dtype), base)
    return y if bias is None else y + bias


def _add(x: Tensor, y: Tensor, layer: LayerConfig) -> Tensor:
    return x + y if layer.residual == 1 else x + y * layer.residual


def _norm(x: Tensor, weight: Tensor | None, layer: LayerConfig) -> Tensor:
    return x if weight is None else rms_norm(x, weight, layer.epsilon, layer.norm_offset)


def _queries_keys_values(
    heads: Tensor, cos: Tensor, sin: Tensor, norms: Norms, layer: LayerConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H, D), (T, G, D) and (T, G, D) of all heads (T, H + 2G, D)."""
    if layer.rotary and norms.queries is None and norms.keys is None:
        return turned_heads(heads, cos, sin, layer.query_heads, layer.key_heads)
    q, k, v = heads.split([layer.query_heads, layer.key_heads, layer.key_heads], 1)
    q, k = _norm_heads(q, norms.queries, layer), _norm_heads(k, norms.keys, layer)
    return (rotate(q, cos, sin), rotate(k, cos, sin), v) if layer.rotary else (q, k, v)


def _norm_heads(x: Tensor, weight: Tensor | None, layer: LayerConfig) -> Tensor:
    """Each head of x (T, heads, D), or all heads of a token together, as the weight is long."""
    return x if weight is None else _norm(x.reshape(len(x), -1, len(weight)), weight, layer).view(x.shape)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float | None = None) -> Tensor:
    """A root-mean-square norm in float32, scaled in the compute type; with an offset of the weights, in float32 too."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * normed.to(x.dtype) if offset is None else (normed * (weight.float() + offset)).to(x.dtype)
