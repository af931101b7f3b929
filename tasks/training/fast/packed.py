"""Runs a PEFT-wrapped model over rows laid end to end, each seen by itself; imports torch.

The wrapped model stays what is saved and resumed: its LoRA parameters are the ones trained here. Its frozen matrices are
taken over (maps.py), maps with a common input as one, and its layers are run by `block` of layers.py, one compiled function for
all of them on a fixed length: once for each kind of layer, where a model has several. How its family differs from Llama's:
families.py.

Shapes: T tokens of all rows together, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tasks.training.fast.attention import Scores, flash4_agrees, seen_blocks
from tasks.training.fast.frozen import Kind
from tasks.training.fast.layers import Layer, RowBounds, block, common_config, rms_norm, take_over
from tasks.training.fast.loss import IGNORED, Logits, linear_loss
from tasks.training.fast.maps import AdapterRefresh, lora_scaling
from tasks.training.fast.positions import Positions
from tasks.training.parallel.shards import SharedLayers

BUSY_PRODUCTS = 7e11
"""Of a layer's matrices and a batch's tokens, one way: with fewer a GPU waits for Python, of which FlashAttention-4 has more."""


class PackedLlama:
    """A PEFT-wrapped causal language model of Llama's kind as a function from a batch to its loss."""

    def __init__(
        self, wrapped: Any, kind: Kind, *, checkpointed: bool, compiled: bool, sharded: bool = False, device: str | None = None
    ) -> None:
        """Take over the frozen matrices of `wrapped`, which can no longer run by itself then.

        `sharded` shares them out over the processes of the training; each layer is checkpointed then. The model may be in main
        memory, and is moved to the device, a layer after the other.
        """
        model, config = wrapped.get_base_model(), wrapped.config
        self._body, self._head = model.model, model.lm_head.weight
        self._config = common_config(self._body, config, lora_scaling(wrapped))
        place = torch.device(device) if device else self._head.device
        taken = take_over(self._body, config, kind, self._config, place)
        self._layers: list[Layer] = []
        self._shards = SharedLayers(self._take_bases(taken)) if sharded else None
        self._layers += taken
        wrapped.to(place)
        self._positions = Positions(self._body.rotary_emb, list(dict.fromkeys(layer.positions for layer in self._layers)))
        self._kinds = list(dict.fromkeys(layer.config.scores for layer in self._layers))
        pairs = [pair for linear in self._layers[0].maps for pair in zip(linear.downs, linear.ups, strict=True)]
        self._layer_parameters = sum(down.shape[1] * up.shape[0] for down, up in pairs)
        self._embedding = float(getattr(config, "embedding_multiplier", 1.0))
        self._logits = Logits(float(getattr(config, "logits_scaling", 1.0)), getattr(config, "final_logit_softcapping", None))
        self._checkpointed, self._compiled = checkpointed, compiled
        self._block = torch.compile(block, dynamic=False) if compiled else block
        self._refresh = AdapterRefresh(self._config.scaling, compiled=compiled)

    def loss(self, batch: Mapping[str, Any], items: Tensor | int) -> Tensor:
        """Negative log-likelihood of the batch's labelled tokens over `items`, the labelled tokens of a whole step."""
        hidden = self.hidden(batch).index_select(0, batch["positions"])
        hidden = rms_norm(hidden, self._body.norm.weight, self._config.epsilon, self._config.norm_offset)
        return linear_loss(hidden, self._head, batch["shift_labels"], items, compiled=self._compiled, how=self._logits)

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (T, vocabulary) of every token."""
        hidden = rms_norm(self.hidden(batch), self._body.norm.weight, self._config.epsilon, self._config.norm_offset)
        return self._logits.of(hidden @ self._head.t())

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """The last layer's output for the tokens, (T, W), before the last norm."""
        x = self._body.embed_tokens(batch["input_ids"])
        if self._embedding != 1:
            x = x * self._embedding
        tables = self._positions.tables(x, batch)
        x = x[0].detach().requires_grad_(torch.is_grad_enabled())  # as in later layers, so that one compiled block serves all
        rows = self._rows(batch, x)
        if self._shards is not None:
            return self._shards(x, [partial(self._run_with, layer, tables, rows) for layer in self._layers])
        self._refresh.all_layers([layer.maps for layer in self._layers], x.dtype)
        for layer in self._layers:
            x = self._run(layer, tables, rows, x, checkpointed=self._checkpointed)
        return x

    def _take_bases(self, layers: Iterable[Layer]) -> Iterator[list[tuple[Tensor, ...]]]:
        """The frozen tensors of each layer's maps, which the layers are kept without."""
        for layer in layers:
            self._layers.append(layer._replace(maps=[linear._replace(base=()) for linear in layer.maps]))
            yield [linear.base for linear in layer.maps]

    def _run_with(self, layer: Layer, tables: Any, rows: Any, bases: Sequence[Sequence[Tensor]], x: Tensor) -> Tensor:
        maps = [linear._replace(base=tuple(base)) for linear, base in zip(layer.maps, bases, strict=True)]
        self._refresh.one_layer(maps, x.dtype)
        return self._run(layer._replace(maps=maps), tables, rows, x, checkpointed=False)

    def _run(self, layer: Layer, tables: Any, rows: Any, x: Tensor, *, checkpointed: bool) -> Tensor:
        maps, norms, config, positions = layer
        cos, sin = tables[positions]
        inputs = (x, cos, sin, rows[config.scores], maps, norms, config)
        return checkpoint(self._block, *inputs, use_reentrant=False) if checkpointed else self._block(*inputs)

    def _rows(self, batch: Mapping[str, Any], x: Tensor) -> dict[Scores, RowBounds]:
        """Where a batch's rows are, for each kind of layer."""
        pays = len(x) * self._layer_parameters >= BUSY_PRODUCTS or any(kind.cap for kind in self._kinds)
        rows = RowBounds(batch["bounds"], torch.tensor(batch["sizes"]), flash4=pays and self._flash4)
        if rows.flash4:
            return dict.fromkeys(self._kinds, rows)
        return {kind: rows._replace(blocks=seen_blocks(rows.bounds, x, kind)) for kind in self._kinds}

    @cached_property
    def _flash4(self) -> bool:
        """Whether FlashAttention-4 is here and right for this model."""
        heads = (self._config.query_heads, self._config.key_heads, self._config.head_size)
        return flash4_agrees(heads, self._kinds, self._head.device, self._head.dtype)


@dataclass(frozen=True)
class Collator:
    """Rows or packs to one sequence, on the CPU.

    {"input_ids": [0, 7, 8, 1, 0, 9, 1], "labels": [...], "seq_lengths": [4, 3]}
        ->  position_ids 0 1 2 3 0 1 2, bounds 0 4 7, positions: tokens whose successor is labelled, shift_labels: those,
            sizes (2, 4): how many rows, and the tokens of the longest; numbers, since tensors are moved to the GPU
    """

    tokens: int = 0
    """Fill up to a multiple of this, with rows that nothing is learnt from; 0: leave the length."""
    longest: int = 0
    """No such row is longer than this."""
    rows: int = 0
    """Fill `bounds` up to so many rows, empty ones."""
    labelled: int = 0
    """Fill the labelled positions up to a multiple of this, with some that have no label; 0: leave their number."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch as tensors, but for `sizes`."""
        lengths = [length for example in examples for length in example.get("seq_lengths") or [len(example["input_ids"])]]
        ids = [token for example in examples for token in example["input_ids"]]
        labels = torch.tensor([label for example in examples for label in example["labels"]])
        text = len(ids)
        if self.tokens and (missing := -text % self.tokens):
            ids, lengths = ids + [0] * missing, [*lengths, *_split(missing, self.longest or missing)]
            labels = functional.pad(labels, (0, missing), value=IGNORED)
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        labels[bounds[:-1].long()] = IGNORED  # a row's first token is never predicted from the row before
        positions = torch.nonzero(labels[1:] != IGNORED)[:, 0]
        room = -len(positions) % self.labelled if self.labelled else 0
        return {
            "input_ids": torch.tensor([ids]),
            "attention_mask": (torch.arange(len(ids)) < text)[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "labels": labels[None],
            "sizes": (len(lengths), max(lengths)),
            "bounds": functional.pad(bounds, (0, max(0, self.rows + 1 - len(bounds))), value=len(ids)),
            "positions": functional.pad(positions, (0, room)),
            "shift_labels": functional.pad(labels[positions + 1], (0, room), value=IGNORED),
        }


def _split(tokens: int, longest: int) -> list[int]:
    """Lengths of rows that take so many tokens.

    >>> _split(7, 3)
    [3, 3, 1]
    """
    return [min(longest, tokens - start) for start in range(0, tokens, longest)]
