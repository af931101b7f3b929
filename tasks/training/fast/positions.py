"""Rotary positions of rows laid end to end, each as if by itself; imports torch.

Frequencies and tables are transformers' own, but for longrope: there it takes one set of frequencies for rows up to the length
that a model was first trained on and another for longer ones, by the longest of a whole batch; here each row has its own.

Shapes: T tokens of all rows together, D the size of a head.

Source: transformers 5.17, modeling_rope_utils.py; https://arxiv.org/abs/2402.13753 (longrope).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor]
"""Cosines and sines, (T, D), or less than D where only a part of a head is turned."""


class LongRope(NamedTuple):
    """Frequencies of short and of long rows."""

    short: Tensor
    long: Tensor
    length: int
    """The most tokens of a short row."""
    factor: float
    """Of cosines and sines."""


class Positions:
    """A model's rotary positions."""

    def __init__(self, module: Any, kinds: Sequence[str | None]) -> None:
        """`module` is transformers' of the model; kinds: those layer types whose positions differ, or [None]."""
        self._module, self._kinds = module, kinds
        types = {kind: module.rope_type[kind] if kind else module.rope_type for kind in kinds}
        self._long = {kind: _longrope(module, kind) for kind in kinds if types[kind] == "longrope"}

    def tables(self, x: Tensor, batch: Mapping[str, Any]) -> dict[str | None, Tables]:
        """The tables of a batch's tokens for each kind, in the type and on the device of x."""
        return {kind: self._tables(x, batch, kind) for kind in self._kinds}

    def _tables(self, x: Tensor, batch: Mapping[str, Any], kind: str | None) -> Tables:
        if (found := self._long.get(kind)) is not None:
            return long_tables(
                found, batch["position_ids"][0], row_of_token(batch["bounds"], x.shape[1]), batch["bounds"], x.dtype
            )
        cos, sin = self._module(x, batch["position_ids"], *((kind,) if kind else ()))
        return cos[0], sin[0]


def row_of_token(bounds: Tensor, tokens: int) -> Tensor:
    """The number of each token's row, (T,).

    >>> row_of_token(torch.tensor([0, 2, 5, 5]), 5).tolist()
    [0, 0, 1, 1, 1]
    """
    return torch.searchsorted(bounds[1:], torch.arange(tokens, dtype=bounds.dtype, device=bounds.device), right=True)


@torch.no_grad()
def long_tables(rope: LongRope, positions: Tensor, rows: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tables:
    """Tables by longrope of tokens at `positions` (T,) of rows with those numbers (T,)."""
    is_long = (bounds.diff() > rope.length)[rows, None]
    angles = positions[:, None].float() * torch.where(is_long, rope.long, rope.short)
    angles = torch.cat([angles, angles], -1)
    return (angles.cos() * rope.factor).to(dtype), (angles.sin() * rope.factor).to(dtype)


def _longrope(module: Any, kind: str | None) -> LongRope:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = module.config
    parameters = config.rope_parameters[kind] if kind else config.rope_parameters
    length = parameters["original_max_position_embeddings"]
    device = next(module.buffers()).device
    (short, factor), (long, _) = (
        ROPE_INIT_FUNCTIONS["longrope"](config, device, seq_len=tokens, layer_type=kind) for tokens in (length, length + 1)
    )
    return LongRope(short, long, length, factor)


def turned_heads(heads: Tensor, cos: Tensor, sin: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with rotary positions, and values, of heads (T, H + 2G, D)."""
    if heads.is_cuda and cos.shape[-1] == heads.shape[-1]:
        return _turned_heads(heads, cos, sin, queries, keys)
    q, k, v = heads.split([queries, keys, keys], 1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (T, heads, D), or the first of its D where cos and sin are for fewer, whose halves are equal."""
    if (turned := cos.shape[-1]) < x.shape[-1]:
        return torch.cat([rotate(x[..., :turned], cos, sin), x[..., turned:]], -1)
    return (_rotary if x.is_cuda else _turn)(x, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    turned = x * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]
    return turned.to(x.dtype)  # OLMo 2 turns in float32


def _turn_heads(heads: Tensor, cos: Tensor, sin: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = heads.split([queries, keys, keys], 1)
    return _turn(q, cos, sin), _turn(k, cos, sin), v.clone()


def _make_operators() -> tuple[Any, Any]:
    """Operators that torch.compile sees through, of `_turn` and of `_turn_heads`, whose gradients are the same turned back.

    torch 2.11 compiles an autograd.Function that ends with `.to` of the type it has to one that gives no gradient.
    """
    rotary: Any = torch.library.triton_op("amazon_ft::rotary", _turn, mutates_args=())
    turned: Any = torch.library.triton_op("amazon_ft::turned_heads", _turn_heads, mutates_args=())

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
        ctx.save_for_backward(*inputs[1:3])

    def turn_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotary(grad, cos, -sin), None, None

    def turn_heads_back(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        from tasks.training.fast import kernels

        return kernels.turned_back(*grads, *ctx.saved_tensors), None, None, None, None

    rotary.register_autograd(turn_back, setup_context=keep)
    turned.register_autograd(turn_heads_back, setup_context=keep)
    return rotary, turned


_rotary, _turned_heads = _make_operators() if torch.backends.cuda.is_built() else (_turn, _turn_heads)
"""torch's CPU build has no Triton, and says so where an operator is made; nothing is compiled there."""
