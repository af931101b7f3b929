"""Cross entropy of labelled rows against a large vocabulary, a slice of rows at a time; imports torch.

The logits of all rows are never in memory at once, and the gradient is taken while a slice's logits are there, so the
product with the output matrix is made twice and not three times. The matrix itself is frozen.

Source: Liger Kernel's fused linear cross entropy (https://arxiv.org/abs/2410.10989), which needs a GPU; this runs on a CPU too,
and on an H200 took 0.9 times as long (tests/bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
SLICE = 2048
"""Rows whose logits are in memory at once: 0.5 GB in bfloat16 with Llama-3's vocabulary."""


class Logits(NamedTuple):
    """How logits come of a head's product."""

    scaling: float = 1.0
    """They are divided by it."""
    cap: float | None = None
    """They are kept between this and its negative by a tangent hyperbolic."""

    def of(self, product: Tensor) -> Tensor:
        """The logits of a product (rows, vocabulary)."""
        scaled = product if self.scaling == 1 else product / self.scaling
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap

    def backwards(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the product of that of its logits."""
        grad = grad if self.cap is None else grad * (1 - (logits / self.cap).square())
        return grad if self.scaling == 1 else grad / self.scaling


PLAIN = Logits()


def linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, items: Tensor | int, *, compiled: bool, how: Logits = PLAIN
) -> Tensor:
    """Sum of the rows' negative log-likelihoods over `items`.

    hidden (rows, width), weight (vocabulary, width), targets (rows,); rows with target -100 are left out. 0 where none is left.
    """
    scale = 1 / torch.as_tensor(items, device=hidden.device, dtype=torch.float32).clamp(min=1)
    return _LinearLoss.apply(hidden, weight, targets, scale, how, _slice_function(compiled))  # type: ignore[no-any-return]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        hidden, weight, targets, scale, how, of_slice = args
        grad, losses = torch.empty_like(hidden), [torch.zeros_like(scale)]
        for start in range(0, len(hidden), SLICE):
            rows = slice(start, start + SLICE)
            loss, grad[rows] = of_slice(hidden[rows], weight, targets[rows], scale, how)
            losses.append(loss)
        ctx.save_for_backward(grad)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None, None, None


def _of_slice(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, how: Logits) -> tuple[Tensor, Tensor]:
    """Loss of some rows, and its gradient with respect to them."""
    logits = how.of((hidden @ weight.t()).float())
    labelled = (targets != IGNORED) * scale
    wanted = targets.clamp(min=0)
    norm = torch.logsumexp(logits, -1)
    loss = ((norm - logits.gather(1, wanted[:, None])[:, 0]) * labelled).sum()
    one_hot = torch.arange(weight.shape[0], device=weight.device) == wanted[:, None]
    pull = ((logits - norm[:, None]).exp() - one_hot.float()) * labelled[:, None]
    return loss, how.backwards(pull, logits).to(hidden.dtype) @ weight


@cache
def _slice_function(compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_of_slice) if compiled else _of_slice  # the last slice is of any size: compiled once for all of them
