"""Causal attention within rows laid end to end: flash attention on a GPU, row by row elsewhere; imports torch.

Flash attention has no capped scores, which Gemma 2 has: there torch's flex_attention compiles a kernel for them.

A GPU starts blocks of threads for as many rows as `bounds` has room for, each as long as the longest, and those without work
cost time too. Packs have one shape, so that one compilation serves all, but not as many rows, nor as long ones. So their true
sizes go in beside the padded bounds, as a tensor on the CPU: reading it waits for nothing, and a new value compiles nothing.

Shapes: T tokens of all rows together, H query heads, G key-value heads, D their size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import flex_attention as flex


class Scores(NamedTuple):
    """How a layer weighs what a token sees."""

    scale: float | None = None
    """Of the products of queries and keys; None: one over the root of D."""
    window: int | None = None
    """The last so many tokens are seen, the token itself one of them; None: all before it."""
    cap: float | None = None
    """Scores are kept between this and its negative by a tangent hyperbolic."""


PLAIN = Scores()


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, sizes: Tensor, scores: Scores = PLAIN, blocks: Any = None) -> Tensor:
    """Causal attention within each row: q (T, H, D), k and v (T, G, D) to (T, H, D).

    Rows begin and end at `bounds`, (at least rows + 1); sizes, on the CPU: [rows, tokens of the longest]; blocks: seen_blocks.
    """
    if blocks is not None:
        return _attend_capped(q, k, v, scores, blocks)
    if q.is_cuda and q.dtype != torch.float32:
        return flash(q, k, v, bounds, sizes, scores.scale, scores.window)[0]
    rows = [slice(start, end) for start, end in pairwise(bounds.tolist()) if end > start]
    return torch.cat([_attend_row(q[row], k[row], v[row], scores) for row in rows])


def _attend_row(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    if scores.window is None and scores.cap is None:
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scale, enable_gqa=True)
        return mixed[0].transpose(0, 1)
    tokens = q.shape[2]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    if scores.window is not None:
        seen = seen.triu(1 - scores.window)
    if scores.cap is None:
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scores.scale, enable_gqa=True)
        return mixed[0].transpose(0, 1)
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    products = _cap(q @ k.mT * (scores.scale or q.shape[-1] ** -0.5), scores.cap)
    shares = products.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (shares @ v)[0].transpose(0, 1)


def _cap(score: Tensor, cap: float) -> Tensor:
    return torch.tanh(score / cap) * cap


def seen_blocks(bounds: Tensor, x: Tensor, scores: Scores) -> Any:
    """Which blocks of tokens see which, where _attend_capped needs to know: for capped scores on a GPU in 16 bits; else None."""
    if scores.cap is None or not x.is_cuda or x.dtype == torch.float32:
        return None
    return make_blocks(bounds, len(x), scores.window)


def make_blocks(bounds: Tensor, tokens: int, window: int | None) -> Any:
    """A BlockMask of causal attention within rows, and within a window if there is one."""
    row = torch.searchsorted(bounds[1:], torch.arange(tokens, dtype=bounds.dtype, device=bounds.device), right=True)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (row[query] == row[key]) & (key <= query) & (query - key < (window or tokens))

    return flex.create_block_mask(sees, None, None, tokens, tokens, device=bounds.device)


def _attend_capped(q: Tensor, k: Tensor, v: Tensor, scores: Scores, blocks: Any) -> Tensor:
    cap = scores.cap
    assert cap is not None

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return _cap(score, cap)

    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    mixed = flex.flex_attention(q, k, v, score_mod=capped, block_mask=blocks, scale=scores.scale, enable_gqa=True)
    return mixed[0].transpose(0, 1)


@torch.library.custom_op("amazon_ft::flash", mutates_args=())
def flash(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, sizes: Tensor, scale: float | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Flash attention by torch on rows of any lengths; what it gives, and the logarithms of its sums, (H, T).

    torch.nn.attention.varlen calls the same operators, but with sizes that torch.compile takes for constants.
    """
    rows, longest = sizes.tolist()
    bounds = bounds[: rows + 1]
    out, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale, window_size_left=_left(window)
    )
    return out, log_sums


def _left(window: int | None) -> int | None:
    return None if window is None else window - 1


@flash.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("amazon_ft::flash_backward", mutates_args=())
def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    bounds: Tensor,
    sizes: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    rows, longest = sizes.tolist()
    bounds, none = bounds[: rows + 1], torch.empty(2, dtype=torch.uint64, device=q.device)  # random state: nothing is dropped
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad,
        *(q, k, v, out, log_sums, bounds, bounds, longest, longest, 0.0, True, none, none),
        scale=scale,
        window_size_left=_left(window),
    )
    return dq, dk, dv


@flash_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, sizes, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, sizes)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *flash_backward(grad, *ctx.saved_tensors, *ctx.how), None, None, None, None


flash.register_autograd(_backward, setup_context=_keep)
