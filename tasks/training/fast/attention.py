"""Causal attention within rows laid end to end: flash attention on a GPU, row by row elsewhere; imports torch.

A GPU starts blocks of threads for as many rows as `bounds` has room for, each as long as the longest, and those without work
cost time too. Packs have one shape, so that one compilation serves all, but not as many rows, nor as long ones. So their true
sizes go in beside the padded bounds, as a tensor on the CPU: reading it waits for nothing, and a new value compiles nothing.

Shapes: T tokens of all rows together, H query heads, G key-value heads, D their size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, sizes: Tensor) -> Tensor:
    """Causal attention within each row: q (T, H, D), k and v (T, G, D) to (T, H, D).

    Rows begin and end at `bounds`, (at least rows + 1); sizes, on the CPU: [rows, tokens of the longest].
    """
    if q.is_cuda and q.dtype != torch.float32:
        return flash(q, k, v, bounds, sizes)[0]
    rows = [slice(start, end) for start, end in pairwise(bounds.tolist()) if end > start]
    return torch.cat([_attend_row(q[row], k[row], v[row]) for row in rows])


def _attend_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


@torch.library.custom_op("amazon_ft::flash", mutates_args=())
def flash(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Flash attention by torch on rows of any lengths; what it gives, and the logarithms of its sums, (H, T).

    torch.nn.attention.varlen calls the same operators, but with sizes that torch.compile takes for constants.
    """
    rows, longest = sizes.tolist()
    bounds = bounds[: rows + 1]
    out, log_sums, *_ = torch.ops.aten._flash_attention_forward(q, k, v, bounds, bounds, longest, longest, 0.0, True, False)
    return out, log_sums


@flash.register_fake
def _(q: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("amazon_ft::flash_backward", mutates_args=())
def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, bounds: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    rows, longest = sizes.tolist()
    bounds, none = bounds[: rows + 1], torch.empty(2, dtype=torch.uint64, device=q.device)  # random state: nothing is dropped
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, log_sums, bounds, bounds, longest, longest, 0.0, True, none, none
    )
    return dq, dk, dv


@flash_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, sizes = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, sizes)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *flash_backward(grad, *ctx.saved_tensors), None, None


flash.register_autograd(_backward, setup_context=_keep)
