# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Operators for GPUs that torch.compile sees through, and their Triton kernels.

Imported where there is a GPU, for torch's CPU build has no Triton. Grids have one dimension: any other ends at 65,535.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tasks.training.fast import frozen

CHUNK = 1024
"""Values of a row that are turned back at once, where a row needs no scale."""
CHUNK_IN_FP8, WARPS_IN_FP8 = 4096, 16
"""The same where it does: a row by one block of threads, in turns."""
PAIRS = 512
"""Values of two halves of heads that are turned back at once."""
ROWS = 16
"""Whose low-rank values are put in place at once."""

ROOT, CUBE = tl.constexpr(math.sqrt(2 / math.pi)), tl.constexpr(0.044715)
"""Of gelu by its tangent hyperbolic: x (1 + tanh(ROOT (x + CUBE x^3))) / 2, which is x times the sigmoid of twice that."""
LARGEST = tl.constexpr(frozen.F8_MAX)


@triton.jit
def _gradients(grad, both, width, at, gelu: tl.constexpr):
    """Of some of a row's gates and ups, of that of silu(gate) * up or gelu's."""
    inside = at < width
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + width + at, mask=inside, other=0.0).to(tl.float32)
    if gelu:
        square = gate * gate
        share = tl.sigmoid(2 * ROOT * gate * (1 + CUBE * square))
        slope = 2 * ROOT * (1 + 3 * CUBE * square)
        of_gate = g * up * share * (1 + gate * (1 - share) * slope)
    else:
        share = tl.sigmoid(gate)
        of_gate = g * up * share * (1 + gate * (1 - share))
    return of_gate, g * gate * share


@triton.jit
def _gated_backward(grad, both, out, width, chunk: tl.constexpr, gelu: tl.constexpr):
    """A chunk of a row of silu(gate) * up, or gelu's, backwards."""
    parts = tl.cdiv(width, chunk)
    row = (tl.program_id(0) // parts).to(tl.int64)
    at = tl.program_id(0) % parts * chunk + tl.arange(0, chunk)
    of_gate, of_up = _gradients(grad + row * width, both + row * 2 * width, width, at, gelu)
    out += row * 2 * width
    tl.store(out + at, of_gate.to(out.dtype.element_ty), mask=at < width)
    tl.store(out + width + at, of_up.to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _gated_backward_in_fp8(
    grad, both, out, out8, scale, width, width8, room: tl.constexpr, chunk: tl.constexpr, gelu: tl.constexpr
):
    """A row of it; then, as its largest value is known, the same in fp8, read again from the cache."""
    row = tl.program_id(0).to(tl.int64)
    out += row * 2 * width
    out8 += row * width8
    largest = tl.zeros([chunk], tl.float32)
    for start in range(0, width, chunk):
        at = start + tl.arange(0, chunk)
        of_gate, of_up = _gradients(grad + row * width, both + row * 2 * width, width, at, gelu)
        of_gate, of_up = of_gate.to(out.dtype.element_ty), of_up.to(out.dtype.element_ty)
        tl.store(out + at, of_gate, mask=at < width)
        tl.store(out + width + at, of_up, mask=at < width)
        largest = tl.maximum(largest, tl.maximum(tl.abs(of_gate.to(tl.float32)), tl.abs(of_up.to(tl.float32))))
    of_row = tl.maximum(tl.max(largest, 0), 1e-12) * room
    tl.store(scale + row, of_row)
    tl.debug_barrier()  # other threads of the block have written what is read now
    for start in range(0, 2 * width, chunk):
        at = start + tl.arange(0, chunk)
        value = tl.load(out + at, mask=at < 2 * width, other=0.0).to(tl.float32)
        tl.store(out8 + at, (value / of_row).to(tl.float8e4nv), mask=at < 2 * width)


@triton.jit
def _put_low(low, scale, balance, out8, tokens, rank, start, width8, rows: tl.constexpr, room: tl.constexpr):
    """The low-rank values of some rows beside their fp8 ones, in the scale of each row times the balance; zeros after them."""
    row = (tl.program_id(0) * rows + tl.arange(0, rows))[:, None].to(tl.int64)
    at = tl.arange(0, room)[None, :]
    value = tl.load(low + row * rank + at, mask=(row < tokens) & (at < rank), other=0.0).to(tl.float32)
    of_row = tl.load(scale + row, mask=row < tokens, other=1.0) * tl.load(balance)
    scaled = tl.minimum(tl.maximum(value / of_row, -LARGEST), LARGEST)
    tl.store(out8 + row * width8 + start + at, scaled.to(tl.float8e4nv), mask=(row < tokens) & (start + at < width8))


@triton.jit
def _turned_back(q, k, v, cos, sin, out, queries, keys, half, heads: tl.constexpr, block: tl.constexpr):
    """Some of a token's heads out of gradients of q, k and v, those of q and k turned back; both halves of a head at once."""
    parts = tl.cdiv(queries + 2 * keys, heads)
    token = (tl.program_id(0) // parts).to(tl.int64)
    head = (tl.program_id(0) % parts * heads + tl.arange(0, heads))[:, None]
    at = tl.arange(0, block)[None, :]
    of_q, of_k = head < queries, (head >= queries) & (head < queries + keys)
    of_v = (head >= queries + keys) & (head < queries + 2 * keys)
    q += (token * queries + head) * 2 * half + at
    k += (token * keys + head - queries) * 2 * half + at
    v += (token * keys + head - queries - keys) * 2 * half + at
    inside = at < half
    left = tl.load(q, mask=of_q & inside, other=0.0) + tl.load(k, mask=of_k & inside, other=0.0)
    right = tl.load(q + half, mask=of_q & inside, other=0.0) + tl.load(k + half, mask=of_k & inside, other=0.0)
    left = (left + tl.load(v, mask=of_v & inside, other=0.0)).to(tl.float32)
    right = (right + tl.load(v + half, mask=of_v & inside, other=0.0)).to(tl.float32)
    c = tl.where(of_v, 1.0, tl.load(cos + token * 2 * half + at, mask=inside, other=0.0).to(tl.float32))
    s = tl.where(of_v, 0.0, tl.load(sin + token * 2 * half + at, mask=inside, other=0.0).to(tl.float32))
    out += (token * (queries + 2 * keys) + head) * 2 * half + at
    there = inside & (head < queries + 2 * keys)
    tl.store(out, (left * c + right * s).to(out.dtype.element_ty), mask=there)
    tl.store(out + half, (right * c - left * s).to(out.dtype.element_ty), mask=there)


@triton_op("amazon_ft::gated_backward", mutates_args=())
def gated_backward(grad: Tensor, both: Tensor, gelu: bool) -> Tensor:
    """The gradient (T, 2 I) of gate and up, side by side in `both` (T, 2 I), of that of silu(gate) * up or gelu's, (T, I)."""
    out, width = torch.empty_like(both), both.shape[1] // 2
    grid = (len(both) * triton.cdiv(width, CHUNK),)
    wrap_triton(_gated_backward)[grid](grad.contiguous(), both.contiguous(), out, width, chunk=CHUNK, gelu=gelu)
    return out


@triton_op("amazon_ft::gated_backward_in_fp8", mutates_args=())
def gated_backward_in_fp8(
    grad: Tensor, both: Tensor, b: Tensor, balance: Tensor, width8: int, room: float, gelu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, G; G B; and [G | G B] in e4m3, (T, width8), with the scale of each row, (T, 1): its largest value times `room`.

    G B is over that scale times the balance there, zeros are after it.
    """
    g, width = torch.empty_like(both), both.shape[1] // 2
    wide = torch.empty(len(both), width8, dtype=torch.float8_e4m3fn, device=both.device)
    scale = torch.empty(len(both), 1, dtype=torch.float32, device=both.device)
    sizes = {"room": room, "chunk": CHUNK_IN_FP8, "num_warps": WARPS_IN_FP8}
    kernel = wrap_triton(_gated_backward_in_fp8)
    kernel[(len(both),)](grad.contiguous(), both.contiguous(), g, wide, scale, width, width8, gelu=gelu, **sizes)
    low = g @ b
    _put_beside(low, scale, balance, wide, 2 * width)
    return g, low, wide, scale


def _put_beside(low: Tensor, scale: Tensor, balance: Tensor, wide: Tensor, start: int) -> None:
    """By a kernel of its own, for torch.compile would copy all of `wide` to write a part of it."""
    tokens, width8 = wide.shape
    sizes = {"rows": ROWS, "room": triton.next_power_of_2(width8 - start)}
    kernel = wrap_triton(_put_low)
    kernel[(triton.cdiv(tokens, ROWS),)](low, scale, balance, wide, tokens, low.shape[1], start, width8, **sizes)


@triton_op("amazon_ft::turned_back", mutates_args=())
def turned_back(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient (T, H + 2G, D) of all heads of those of queries and keys after their rotary positions, and of values."""
    tokens, queries, size = q.shape
    keys, block = k.shape[1], triton.next_power_of_2(size // 2)
    out, heads = q.new_empty(tokens, queries + 2 * keys, size), max(PAIRS // block, 1)
    grid = (tokens * triton.cdiv(queries + 2 * keys, heads),)
    given = (part.contiguous() for part in (q, k, v, cos, sin))
    wrap_triton(_turned_back)[grid](*given, out, queries, keys, size // 2, heads=heads, block=block)
    return out
