"""A training's process among the others that share its steps: what all agree on, and who tells.

What they exchange here goes over gloo, between CPUs: it waits for no GPU, and fails at once when a process is gone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from typing import Any

from tasks.training.watch import StepRecord

HANGS_AFTER = timedelta(minutes=10)
"""How long the others wait for a process, which may compile or write a checkpoint, before they give the training up."""


class Alone:
    """The only process of a training."""

    is_first = True

    def join(self, trainer: Any) -> None:
        """Nothing is shared."""

    def any(self, wish: bool) -> bool:
        """Whether some process has the wish."""
        return wish

    def of_all(self, records: Sequence[StepRecord]) -> list[StepRecord]:
        """Steps as they were on all processes together."""
        return list(records)

    def rows_of_step(self, trainer: Any, step: int) -> list[int]:
        """The rows that a step (from 1) is made of, from the order that the seed gives."""
        loader, accumulation = trainer.get_train_dataloader(), trainer.args.gradient_accumulation_steps
        epoch, update = divmod(step - 1, -(-len(loader) // accumulation))
        loader.set_epoch(epoch)
        batches = islice(iter(loader.batch_sampler), update * accumulation, (update + 1) * accumulation)
        return [index for batch in batches for index in batch]


class Peers:
    """One of several processes that torchrun started."""

    def __init__(self) -> None:
        """Their process group exists: TrainingArguments make it."""
        import torch.distributed as dist

        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=HANGS_AFTER)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self._rank == 0

    def join(self, trainer: Any) -> None:
        """Let the Trainer take its share of each step."""
        from tasks.training.parallel.gradients import exchange_gradients
        from tasks.training.parallel.loader import deal_to_ranks

        deal_to_ranks(trainer, self._rank, self._ranks)
        exchange_gradients(trainer)

    def any(self, wish: bool) -> bool:
        """Whether some process has the wish; all ask at the same step."""
        import torch
        import torch.distributed as dist

        wishes = torch.tensor(int(wish))
        dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._group)
        return bool(wishes)

    def of_all(self, records: Sequence[StepRecord]) -> list[StepRecord]:
        """Steps as they were on all processes together: a mean of losses, a sum of tokens, the fullest memory.

        A process's loss is its part of the step's, times their number, as the mean of gradients wants it.
        """
        import torch
        import torch.distributed as dist

        own = torch.tensor([(record.loss, record.tokens, record.memory_gib) for record in records], dtype=torch.float64)
        told = [torch.empty_like(own) for _ in range(self._ranks)]
        dist.all_gather(told, own, group=self._group)
        losses, tokens, memory = torch.stack(told).unbind(-1)  # (ranks, steps) each
        totals = zip(losses.mean(0).tolist(), tokens.sum(0).tolist(), memory.amax(0).tolist(), strict=True)
        return [
            replace(record, loss=loss, tokens=int(count), memory_gib=gib)
            for record, (loss, count, gib) in zip(records, totals, strict=True)
        ]

    def rows_of_step(self, trainer: Any, step: int) -> list[int]:
        """The rows that a step (from 1) is made of, on all processes."""
        from tasks.training.parallel.loader import rows_of_dealt_step

        return rows_of_dealt_step(trainer, step)


def find_peers() -> Alone | Peers:
    """Those that torchrun started beside this process, if it did."""
    return Peers() if count_processes() > 1 else Alone()


def count_processes() -> int:
    """How many torchrun started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1"))
