"""How likely a model holds answers to be: of evaluation, and of a training that looks at held-out rows while it runs.

Only labelled positions go through the model's head, HEAD_TOKENS at a time, so that memory does not grow with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Ids = Sequence[Sequence[int]]
"""Token ids or labels of rows; a label of -100 does not count."""

HEAD_TOKENS = 1024
"""Positions whose logits are in memory at once; 128,256 float32 logits each with Llama-3's vocabulary, 0.5 GB."""


def row_nll(model: Any, input_ids: Ids, labels: Ids, *, batch_size: int, device: str) -> tuple[float, ...]:
    """Negative log-likelihood of each row's labelled tokens, summed, in nats; rows in their order.

    `model` is a causal language model of transformers, with or without an adapter in it. No random number is drawn.
    """
    order = sorted(range(len(input_ids)), key=lambda row: (len(input_ids[row]), row))
    found: dict[int, float] = {}
    for rows in batches(order, batch_size):
        sums = _batch_nll(model, [input_ids[row] for row in rows], [labels[row] for row in rows], device)
        found |= dict(zip(rows, sums, strict=True))
    return tuple(found[row] for row in range(len(order)))


def _batch_nll(model: Any, ids: Ids, labels: Ids, device: str) -> list[float]:
    import torch
    from torch.nn.functional import cross_entropy

    with torch.no_grad():  # not inference_mode: what a model keeps from here must serve a training too
        inputs = _padded(ids, 0, device)
        mask = _padded([[1] * len(row) for row in ids], 0, device)
        hidden = model.get_decoder()(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        target = _padded(labels, -100, device)[:, 1:]
        picked = target != -100  # (rows, positions)
        nll = torch.zeros(target.shape, dtype=torch.float64, device=device)
        logits = (model.get_output_embeddings()(part).float() for part in hidden[picked].split(HEAD_TOKENS))
        wanted = target[picked].split(HEAD_TOKENS)
        parts = [cross_entropy(part, ids, reduction="none").double() for part, ids in zip(logits, wanted, strict=True)]
        if parts:
            nll[picked] = torch.cat(parts)
        return [float(value) for value in nll.sum(dim=1).tolist()]


def labelled_tokens(labels: Ids) -> list[int]:
    """How many tokens of each row count; the first of a row is never predicted.

    >>> labelled_tokens([[5, -100, 7, 1], [-100, 3]])
    [2, 1]
    """
    return [sum(label != -100 for label in row[1:]) for row in labels]


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Items in their order, at most `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _padded(rows: Ids, value: int, device: str) -> Any:
    """(rows, longest), padded on the right."""
    import torch

    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=device)
