"""A frozen linear map with its LoRA, forwards and backwards; imports torch.

    y = x W' + (x A') B'   is   [x | x A'] [W | B]'          and backwards, with g = dL/dy,
    dx = g W + (g B) A     is   [g | g B] [W ; A]

as one matrix product, where that moves fewer bytes than two. How W, A and B lie in memory: tasks/training/fast/frozen.py.
Gate and up are one map, whose halves become silu(gate) * up or gelu(gate) * up; the gradient of that is taken with the map's,
which needs it in fp8.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tasks.training.fast.frozen import F8, F8_MAX, NF4_BLOCK, ROOM, Kind


def apply(kind: Kind, x: Tensor, a: Tensor, b: Tensor, base: Sequence[Tensor]) -> Tensor:
    """The map with its adapter: x (rows, in) to (rows, out)."""
    return {"plain": _Plain, "fp8": _Fp8, "fp8-backward": _Fp8Backward, "nf4": _Nf4}[kind].apply(x, a, b, *base)


def apply_gated(kind: Kind, x: Tensor, a: Tensor, b: Tensor, base: Sequence[Tensor], *, gelu: bool) -> Tensor:
    """silu(gate) * up, or gelu(gate) * up, of the map with its adapter, which gives both side by side.

    x (rows, in) to (rows, out / 2); gelu is the one by a tangent hyperbolic.
    """
    in_fp8 = {"fp8": _Fp8Gated, "fp8-backward": _Fp8BackwardGated}
    return in_fp8[kind].apply(gelu, x, a, b, *base) if kind in in_fp8 else _Gated.apply(gelu, apply(kind, x, a, b, base))


GATED = {"silu": partial(apply_gated, gelu=False), "gelu_pytorch_tanh": partial(apply_gated, gelu=True)}
"""By the activation's name in transformers."""


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, a, b, weight = args
        low = x @ a.t()
        ctx.save_for_backward(x, low, b, weight)
        return _extended_product(x, low, weight[: len(b)].t())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, low, b, weight = ctx.saved_tensors
        (g,) = grads
        low_g = g @ b
        return _extended_product(g, low_g, weight[:, : x.shape[1]]), low_g.t() @ x, g.t() @ low, None


def _extended_product(x: Tensor, low: Tensor, weight: Tensor) -> Tensor:
    """[x | low] times the matrix; what it has below those rows is left out."""
    inner, out = weight.shape
    if x.shape[1] > out:  # more bytes to put side by side than to add to the result
        return _sum_of_products(x, weight[: x.shape[1]], low, weight[x.shape[1] : x.shape[1] + low.shape[1]])
    return torch.cat([x, functional.pad(low, (0, inner - x.shape[1] - low.shape[1]))], 1) @ weight


@torch.library.custom_op("amazon_ft::sum_of_products", mutates_args=())
def _sum_of_products(x: Tensor, weight: Tensor, low: Tensor, beside: Tensor) -> Tensor:
    """In place, for torch.compile would first copy what is added to."""
    return (x @ weight).addmm_(low, beside)


@_sum_of_products.register_fake
def _(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty((len(x), weight.shape[1]))


class _Fp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, a, b, w, ws, wt, wts, balance, balance_t = args
        low = x @ a.t()
        ctx.save_for_backward(x, low, b, wt, wts, balance_t)
        return _fp8_product(x, low, w, ws, balance)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *_gradients_in_fp8(*grads, *ctx.saved_tensors), None, None, None, None, None, None


class _Fp8Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, a, b, weight, wt, wts, balance_t = args
        low = x @ a.t()
        ctx.save_for_backward(x, low, b, wt, wts, balance_t)
        return _extended_product(x, low, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *_gradients_in_fp8(*grads, *ctx.saved_tensors), None, None, None, None


def _gradients_in_fp8(
    g: Tensor, x: Tensor, low: Tensor, b: Tensor, wt: Tensor, wts: Tensor, balance_t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, A and B; the base matrix's part of the first in fp8."""
    low_g = g @ b
    return _fp8_product(g, low_g, wt, wts, balance_t), low_g.t() @ x, g.t() @ low


def _fp8_product(x: Tensor, low: Tensor, weight: Tensor, scale: Tensor, balance: Tensor) -> Tensor:
    """[x | low] times the transpose of an extended fp8 matrix."""
    of_row = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) * (ROOM / F8_MAX)
    wide = (x.float() / of_row).to(F8)
    beside = functional.pad(low, (0, weight.shape[1] - x.shape[1] - low.shape[1])).float()
    narrow = (beside / (of_row * balance)).clamp(-F8_MAX, F8_MAX).to(F8)
    return _scaled_product(torch.cat([wide, narrow], 1), of_row, weight, scale, x.dtype)


def _scaled_product(x: Tensor, of_row: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch._scaled_mm(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]  # as torchao calls it
        x, weight.t(), scale_a=of_row, scale_b=scale, out_dtype=dtype, use_fast_accum=True
    )


class _Nf4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, a, b, packed, scales = args
        low = x @ a.t()
        ctx.save_for_backward(x, low, a, b, packed, scales)
        return torch.addmm(low @ b.t(), x, _unpack(packed, scales, x, b).t())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, low, a, b, packed, scales = ctx.saved_tensors
        (g,) = grads
        low_g = g @ b
        return torch.addmm(low_g @ a, g, _unpack(packed, scales, x, b)), low_g.t() @ x, g.t() @ low, None, None


def _unpack(packed: Tensor, scales: Tensor, x: Tensor, b: Tensor) -> Tensor:
    shape = [len(b), x.shape[1]]
    return torch.ops.bitsandbytes.dequantize_4bit(packed[:, None], scales, NF4_BLOCK, "nf4", shape, x.dtype)


# Gates


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.gelu, both = args
        ctx.save_for_backward(both)
        return _gated(both, ctx.gelu)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, _gradient_of_gates(*grads, *ctx.saved_tensors, gelu=ctx.gelu)


class _Fp8Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.gelu, x, a, b, w, ws, wt, wts, balance, balance_t = args
        low = x @ a.t()
        both = _fp8_product(x, low, w, ws, balance)
        ctx.save_for_backward(x, low, both, b, wt, wts, balance_t)
        return _gated(both, ctx.gelu)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *_gated_gradients_in_fp8(*grads, *ctx.saved_tensors, gelu=ctx.gelu), None, None, None, None, None, None


class _Fp8BackwardGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.gelu, x, a, b, weight, wt, wts, balance_t = args
        low = x @ a.t()
        both = _extended_product(x, low, weight.t())
        ctx.save_for_backward(x, low, both, b, wt, wts, balance_t)
        return _gated(both, ctx.gelu)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *_gated_gradients_in_fp8(*grads, *ctx.saved_tensors, gelu=ctx.gelu), None, None, None, None


def _gated(both: Tensor, gelu: bool) -> Tensor:
    gate, up = both.chunk(2, 1)
    return (functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)) * up


def _gradient_of_gates(grad: Tensor, both: Tensor, *, gelu: bool) -> Tensor:
    """Of gate and up, side by side in `both` (rows, 2 I), of that of silu(gate) * up or gelu's, (rows, I)."""
    if grad.is_cuda:
        from tasks.training.fast import kernels

        return kernels.gated_backward(grad, both, gelu)
    gate, up = both.chunk(2, 1)
    if gelu:
        of_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        return torch.cat([of_gate, grad * functional.gelu(gate, approximate="tanh")], 1)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)], 1)


def _gated_gradients_in_fp8(
    grad: Tensor, x: Tensor, low: Tensor, both: Tensor, b: Tensor, wt: Tensor, wts: Tensor, balance_t: Tensor, *, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, A and B of the map that gave `both`, of the gradient behind its gates."""
    if not grad.is_cuda:
        return _gradients_in_fp8(_gradient_of_gates(grad, both, gelu=gelu), x, low, b, wt, wts, balance_t)
    from tasks.training.fast import kernels

    g, low_g, wide, of_row = kernels.gated_backward_in_fp8(grad, both, b, balance_t, wt.shape[1], ROOM / F8_MAX, gelu)
    return _scaled_product(wide, of_row, wt, wts, g.dtype), low_g.t() @ x, g.t() @ low
