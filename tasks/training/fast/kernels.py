# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Triton kernels of the fast backend; imported where there is a GPU, for torch's CPU build has no Triton."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES_PER_WARP = 1024
"""32 for each thread: what its registers hold of five tensors at once."""


ROOT, CUBE = tl.constexpr(math.sqrt(2 / math.pi)), tl.constexpr(0.044715)
"""Of gelu by its tangent hyperbolic: x (1 + tanh(ROOT (x + CUBE x^3))) / 2, which is x times the sigmoid of twice that."""


@triton.jit
def _gated_backward(
    grad,
    both,
    out,
    out8,
    scale,
    width,
    width8,
    room: tl.constexpr,
    block: tl.constexpr,
    tail: tl.constexpr,
    gelu: tl.constexpr,
    in_fp8: tl.constexpr,
):
    """A row of silu(gate) * up, or gelu's, backwards; all of it at once, so that its largest value is known before it is fp8."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    g = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    if gelu:
        square = gate * gate
        share = tl.sigmoid(2 * ROOT * gate * (1 + CUBE * square))
        slope = 2 * ROOT * (1 + 3 * CUBE * square)
        of_gate = (g * up * share * (1 + gate * (1 - share) * slope)).to(out.dtype.element_ty)
    else:
        share = tl.sigmoid(gate)
        of_gate = (g * up * share * (1 + gate * (1 - share))).to(out.dtype.element_ty)
    of_up = (g * gate * share).to(out.dtype.element_ty)
    tl.store(out + row * 2 * width + at, of_gate, mask=inside)
    tl.store(out + row * 2 * width + width + at, of_up, mask=inside)
    if in_fp8:
        of_gate, of_up = of_gate.to(tl.float32), of_up.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(of_gate), 0), tl.max(tl.abs(of_up), 0))
        of_row = tl.maximum(largest, 1e-12) * room
        tl.store(scale + row, of_row)
        tl.store(out8 + row * width8 + at, (of_gate / of_row).to(tl.float8e4nv), mask=inside)
        tl.store(out8 + row * width8 + width + at, (of_up / of_row).to(tl.float8e4nv), mask=inside)
        rest = 2 * width + tl.arange(0, tail)
        tl.store(out8 + row * width8 + rest, tl.zeros([tail], tl.float32).to(tl.float8e4nv), mask=rest < width8)


def run_gated_backward(grad: Tensor, both: Tensor, *, gelu: bool) -> Tensor:
    """The gradient (T, 2 I) of gate and up, side by side in `both` (T, 2 I), of that of silu(gate) * up or gelu's, (T, I)."""
    out = torch.empty_like(both)
    _launch(grad, both, out, out, out, both.shape[1], 1.0, gelu=gelu, in_fp8=False)
    return out


def run_gated_backward_in_fp8(
    grad: Tensor, both: Tensor, width8: int, room: float, *, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same; and in e4m3 over a scale for each row, (T, 1), its largest value times `room`: (T, width8), zeros at the end."""
    out = torch.empty_like(both)
    out8 = torch.empty(len(both), width8, dtype=torch.float8_e4m3fn, device=both.device)
    scale = torch.empty(len(both), 1, dtype=torch.float32, device=both.device)
    _launch(grad, both, out, out8, scale, width8, room, gelu=gelu, in_fp8=True)
    return out, out8, scale


def _launch(
    grad: Tensor, both: Tensor, out: Tensor, out8: Tensor, scale: Tensor, width8: int, room: float, **variant: bool
) -> None:
    width = both.shape[1] // 2
    block = triton.next_power_of_2(width)
    tail = triton.next_power_of_2(max(width8 - 2 * width, 1))
    warps = min(32, max(4, block // VALUES_PER_WARP))
    sizes = {"room": room, "block": block, "tail": tail, "num_warps": warps}
    _gated_backward[(len(both),)](grad.contiguous(), both.contiguous(), out, out8, scale, width, width8, **sizes, **variant)
