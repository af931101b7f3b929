"""How frozen matrices and their LoRA lie in memory; imports torch.

A base matrix W has room for A and B beside it, so that adding the adapter can cost a few columns more and not another pass
over what comes out (tasks/training/fast/lora_linear.py). W never gets a gradient. Maps that share an input (q, k and v; gate
and up) are one map, their adapters side by side: A stacked, B block-diagonal.

    plain           W in the compute type                         (out + room, in + room)
    fp8             W and its transpose in e4m3, a scale a row     (out, in + room) and (in, out + room)
    fp8-backward    W in the compute type, W' in e4m3              (out, in + room) and (in, out + room)
    nf4             W in bitsandbytes' NF4, unpacked on the fly     (out * in / 2,) and a scale for 64 values

fp8 rounds what the model says, so that an adapter learns to mend a base model that no one else has; fp8-backward rounds only
the way that a gradient takes back, and what the model says is plain's to the bit.

Source of rowwise fp8: torchao.float8 "rowwise", which quantizes a frozen weight anew at every step; here it is done once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tasks.config import FrozenWeights

Kind = FrozenWeights
F8 = torch.float8_e4m3fn
F8_MAX = 448.0
"""Largest e4m3 value. Source: OCP 8-bit floating point specification."""
ROOM = 4.0
"""x and g are scaled to F8_MAX / ROOM, which leaves their adapter columns room to be larger than any of their values."""
MAX_BALANCE = 16.0
"""B and A are scaled up against x A' and g B by at most this, so that small adapters keep their digits in fp8."""
RANK_MULTIPLE = 16
"""fp8 products need inner sizes of a multiple of 16."""
LINE_BYTES = 128
"""Rows begin on lines of the GPU's cache: where they did not, an H200's fp8 products took 1.2 times as long (LOG.md)."""
NF4_BLOCK = 64


def padded_rank(downs: Sequence[Tensor]) -> int:
    """Columns that the adapters of maps with one input take beside the base matrix."""
    return -(-sum(len(down) for down in downs) // RANK_MULTIPLE) * RANK_MULTIPLE


def adapter_matrices(downs: Sequence[Tensor], ups: Sequence[Tensor], scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LoRA matrices of maps with one input as A (rank, in) and B (out, rank), rank padded to a multiple of 16."""
    a, b = torch.cat(list(downs)), torch.block_diag(*ups) * scaling
    missing = -len(a) % RANK_MULTIPLE
    return functional.pad(a, (0, 0, 0, missing)).to(dtype), functional.pad(b, (0, missing)).to(dtype)


def room_for(rank: int, size: int, item_bytes: int) -> int:
    """Columns beside so many that hold an adapter of that rank and end where a cache line does.

    >>> room_for(48, 4096, 1)
    128
    """
    items = LINE_BYTES // item_bytes
    return -(-(size + rank) // items) * items - size


def freeze_plain(weight: Tensor, rank: int) -> tuple[Tensor, ...]:
    """W (out, in) with room for an adapter of that rank."""
    below, beside = (room_for(rank, size, weight.element_size()) for size in weight.shape)
    return (functional.pad(weight, (0, beside, 0, below)),)


def freeze_fp8(weight: Tensor, rank: int) -> tuple[Tensor, ...]:
    """W, its scales, W' and its scales, and the two balances, with room for an adapter of that rank."""
    one = torch.ones((), device=weight.device)
    return (*_quantize(weight, rank), *_quantize(weight.t(), rank), one, one.clone())


def freeze_fp8_backward(weight: Tensor, rank: int) -> tuple[Tensor, ...]:
    """W in its own type, W' in e4m3 and its scales, and its balance, with room for an adapter of that rank."""
    beside = room_for(rank, weight.shape[1], weight.element_size())
    return functional.pad(weight, (0, beside)), *_quantize(weight.t(), rank), torch.ones((), device=weight.device)


def _quantize(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    largest = weight.abs().amax(1, keepdim=True).float()
    scale = largest.clamp(min=float(largest.max()) / 64 or 1.0) / (F8_MAX / ROOM)
    room = torch.zeros(len(weight), room_for(rank, weight.shape[1], 1), dtype=F8, device=weight.device)
    return torch.cat([(weight.float() / scale).to(F8), room], 1), scale.t().contiguous()


def freeze_nf4(packed: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Several maps' NF4 bytes and scales as one's: blocks lie within rows, so they can be put in a line."""
    return torch.cat([part.flatten() for part in packed]), torch.cat([scale.flatten().float() for scale in scales])


@torch.no_grad()
def refresh(kind: Kind, base: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
    """Put the adapter as it is now into its room beside the base matrix."""
    if kind == "plain":
        (weight,), (out, width), rank = base, (len(b), a.shape[1]), len(a)
        weight[:out, width : width + rank] = b
        weight[out : out + rank, :width] = a
    elif kind == "fp8":
        w, ws, wt, wts, balance, balance_t = base
        _put(w, a.shape[1], ws, b.float(), balance)
        _put(wt, len(b), wts, a.t().float(), balance_t)
    elif kind == "fp8-backward":
        w, wt, wts, balance_t = base
        w[:, a.shape[1] : a.shape[1] + len(a)] = b
        _put(wt, len(b), wts, a.t().float(), balance_t)


def _put(weight: Tensor, start: int, scale: Tensor, columns: Tensor, balance: Tensor) -> None:
    if not columns.shape[1]:
        return  # maps without an adapter
    room = F8_MAX * scale.t() / columns.abs().amax(1, keepdim=True).clamp(min=1e-20)
    balance.copy_(room.min().clamp(max=MAX_BALANCE))
    scaled = columns * balance / scale.t()
    weight[:, start : start + columns.shape[1]] = scaled.clamp(-F8_MAX, F8_MAX).to(F8)


FREEZE = {"plain": freeze_plain, "fp8": freeze_fp8, "fp8-backward": freeze_fp8_backward}
"""{kind: a function of W and a rank}; nf4 takes what bitsandbytes has packed."""
