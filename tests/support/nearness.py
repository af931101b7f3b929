"""How near the fast backend comes to float32 by transformers and PEFT, each row by itself: losses, logits, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn import functional

from tasks.training.fast import frozen
from tasks.training.fast.packed import Collator, PackedLlama

Rows = list[dict[str, Any]]


def adapter_of(wrapped: Any) -> dict[str, Any]:
    """The trained parameters by name."""
    return {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}


def gradients(wrapped: Any) -> dict[str, Tensor]:
    """Of the trained parameters, by name."""
    return {name: parameter.grad for name, parameter in adapter_of(wrapped).items()}


def labelled(rows: Rows) -> int:
    """Tokens that are predicted: a row's first never is."""
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def row_by_row(wrapped: Any, rows: Rows) -> tuple[float, Tensor]:
    """Loss and logits by transformers and PEFT, each row by itself; the gradients are left in the wrapped model."""
    total, logits = 0.0, []
    for row in rows:
        ids, labels = (torch.tensor(row[name], device=wrapped.device) for name in ("input_ids", "labels"))
        found = wrapped(input_ids=ids[None]).logits[0]
        loss = functional.cross_entropy(found[:-1].float(), labels[1:], reduction="sum") / labelled(rows)
        loss.backward()
        total, logits = total + loss.item(), [*logits, found.detach()]
    return total, torch.cat(logits)


def packed(
    wrapped: Any, rows: Rows, *, kind: frozen.Kind = "plain", collate: Callable[..., Any] | None = None, **how: Any
) -> tuple[float, Tensor]:
    """Loss and logits of all rows in one pack; the gradients are left in the wrapped model."""
    compiled, checkpointed = how.get("compiled", False), how.get("checkpointed", False)
    llama = PackedLlama(wrapped, kind, checkpointed=checkpointed, compiled=compiled)
    batch = send_to_device((collate or Collator())(rows), wrapped.device)
    loss = llama.loss(batch, (batch["shift_labels"] != -100).sum())
    loss.backward()
    with torch.no_grad():
        return loss.item(), llama.logits(batch)[: sum(len(row["input_ids"]) for row in rows)]


def relative(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, of all gradients together."""
    missed = sum((got[name].float() - wanted[name]).square().sum() for name in wanted)
    return float((missed / sum(grad.square().sum() for grad in wanted.values())) ** 0.5)


def scaled_product(
    a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, use_fast_accum: bool
) -> Tensor:
    """What a GPU's product of fp8 matrices with a scale for each row and column is by definition."""
    assert use_fast_accum
    assert a.shape[1] % 16 == 0
    return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)


__all__ = ["Rows", "adapter_of", "gradients", "labelled", "packed", "relative", "row_by_row", "scaled_product"]
