"""A process's share of the rows of each step, for a transformers.Trainer under torchrun; imports torch.

A Trainer deals whole micro-batches in turn, fills up the last step with rows seen before, and makes a step of more rows the more
processes there are. Here a step has the rows that it has in one process, and in the same order; each process gets as many
micro-batches as the others, so that Trainer's loop and its counting of learnt tokens over all processes stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from tasks.training.parallel.dealing import Idle, deal, micro_steps, row_costs
from tasks.training.parallel.evening import Room, even_out

RNG_STATE = "rng_state.pth"
"""Where a Trainer alone keeps its random state."""


class MicroBatch(NamedTuple):
    """Rows that a process computes at once."""

    step_rows: tuple[int, ...]
    """The rows of its step, on all processes."""
    number: int
    """Which of the process's micro-batches of that step it is."""


class Dealt(BatchSampler):
    """The micro-batches of one process, one at a time; which rows of its step each holds, Shares finds out."""

    def __init__(self, order: Sampler[int], *, rows: int, step_rows: int, batch_size: int, ranks: int) -> None:
        super().__init__(order, batch_size, drop_last=False)
        self._order, self._rows, self._step_rows, self._ranks = order, rows, step_rows, ranks

    def steps(self) -> Iterator[list[int]]:
        """The rows of each step, on all processes."""
        yield from BatchSampler(self._order, self._step_rows, drop_last=False)

    def __iter__(self) -> Iterator[list[Any]]:
        for rows in self.steps():
            for number in range(self._micro_steps(len(rows))):
                yield [MicroBatch(tuple(rows), number)]

    def __len__(self) -> int:
        full, rest = divmod(self._rows, self._step_rows)
        return full * self._micro_steps(self._step_rows) + self._micro_steps(rest)

    def _micro_steps(self, rows: int) -> int:
        return micro_steps(rows, self.batch_size, self._ranks)


class Shares(Dataset[list[Any]]):
    """The rows, or packs, of a process's micro-batches."""

    def __init__(self, rows: Any, *, packed: bool, batch_size: int, rank: int, ranks: int) -> None:
        self._rows = EvenedPacks(rows) if packed else rows
        self._costs, self._batch_size, self._rank, self._ranks = row_costs(rows.data), batch_size, rank, ranks
        self._dealt: tuple[tuple[int, ...], list[list[Any]]] = ((), [])

    def __getitem__(self, micro_batch: MicroBatch) -> list[Any]:
        """Its rows; none where a step has none left for this process."""
        step_rows, number = micro_batch
        if step_rows != self._dealt[0]:
            self._dealt = (step_rows, self._share(step_rows))
        return [self._rows[key] for key in self._dealt[1][number]]

    def _share(self, step_rows: Sequence[int]) -> list[list[Any]]:
        dealt = deal(step_rows, self._costs, self._batch_size, self._ranks)
        return (self._rows.even_out(dealt) if isinstance(self._rows, EvenedPacks) else dealt)[self._rank]


class EvenedPacks(Dataset[dict[str, Any]]):
    """Packs between which rows have changed places: a key is the numbers of a pack's rows, counted through all packs."""

    def __init__(self, packs: Any) -> None:
        lengths = packs.data["seq_lengths"].combine_chunks()
        self._packs = packs
        self._lengths = lengths.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        self._starts = np.concatenate([[0], np.cumsum(lengths.value_lengths().to_numpy(zero_copy_only=False))])
        tokens = np.add.reduceat(self._lengths, self._starts[:-1])
        self._room = Room(int(tokens.max()), int(np.diff(self._starts).max()))

    def even_out(self, dealt: Sequence[Sequence[Sequence[int]]]) -> list[list[list[Any]]]:
        """The keys for each process's micro-batches of packs, once all processes have as much to do."""
        packs = [[np.arange(*self._starts[[pack, pack + 1]]) for micro in share for pack in micro] for share in dealt]
        evened = [iter(share) for share in even_out(packs, self._lengths, self._room)]
        return [[[next(keys) for _ in micro] for micro in share] for share, keys in zip(dealt, evened, strict=True)]

    def __getitem__(self, rows: Any) -> dict[str, Any]:
        owners = np.searchsorted(self._starts, rows, "right") - 1
        whole = {owner: self._packs[int(owner)] for owner in np.unique(owners)}
        parts = [(whole[owner], self._span(owner, row)) for owner, row in zip(owners, rows, strict=True)]
        joined = {name: [token for pack, span in parts for token in pack[name][span]] for name in ("input_ids", "labels")}
        return joined | {"seq_lengths": self._lengths[rows].tolist()}

    def _span(self, pack: int, row: int) -> slice:
        """Where a row's tokens are in its pack."""
        first = int(self._lengths[self._starts[pack] : row].sum())
        return slice(first, first + int(self._lengths[row]))


def deal_to_ranks(trainer: Any, rank: int, ranks: int) -> None:
    """Let a Trainer under torchrun take its share of each step of the training that it would be alone."""
    from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader

    args, packed = trainer.args, "seq_lengths" in trainer.train_dataset.column_names
    batch_size = args.per_device_train_batch_size
    step_rows = batch_size * args.gradient_accumulation_steps
    collate = CollateShare(trainer.data_collator, packed)

    def get_train_dataloader() -> Any:
        rows = trainer._remove_unused_columns(trainer.train_dataset, description="Training")
        order = SeedableRandomSampler(rows, data_seed=args.data_seed)  # what accelerate makes of a Trainer's own
        made: Any = DataLoader(
            Shares(rows, packed=packed, batch_size=batch_size, rank=rank, ranks=ranks),
            batch_sampler=Dealt(order, rows=len(rows), step_rows=step_rows, batch_size=batch_size, ranks=ranks),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            made,
            trainer.accelerator.device,
            num_processes=1,  # it is dealt already
            process_index=0,
            put_on_device=True,
            non_blocking=trainer.accelerator.non_blocking,
        )

    trainer.get_train_dataloader = get_train_dataloader
    args.gradient_accumulation_steps = micro_steps(step_rows, batch_size, ranks)
    if args.use_cpu:
        args._setup_devices = torch.device("cpu")  # for accelerate it is cpu:0, where torch can't load an optimizer to
    _keep_one_random_state(trainer, rank)


def rows_of_dealt_step(trainer: Any, step: int) -> list[int]:
    """The rows that a step (from 1) is made of, on all processes."""
    loader = trainer.get_train_dataloader()
    epoch, update = divmod(step - 1, -(-len(loader) // trainer.args.gradient_accumulation_steps))
    loader.set_epoch(epoch)
    return next(islice(loader.batch_sampler.steps(), update, None))


@dataclass(frozen=True)
class CollateShare:
    """A collator, and a batch of two tokens without a label where there are no rows."""

    collate: Callable[[Sequence[Any]], dict[str, Any]]
    packed: bool

    def __call__(self, shares: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """The batch of a single share."""
        [rows] = shares
        if rows:
            return self.collate(rows)
        blank = {"input_ids": [0, 0], "labels": [-100, -100]} | ({"seq_lengths": [2]} if self.packed else {})
        return Idle(self.collate([blank]))


def _keep_one_random_state(trainer: Any, rank: int) -> None:
    """Let the first process keep its random state where a Trainer alone would, and all go on from there."""
    from transformers.trainer_pt_utils import safe_globals

    def save(folder: str) -> None:
        states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.random.get_rng_state()
        if rank == 0:
            torch.save(states, Path(folder, RNG_STATE))

    def load(checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with safe_globals():
            states = torch.load(Path(checkpoint, RNG_STATE), weights_only=True)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.random.set_rng_state(states["cpu"])
        if torch.cuda.is_available() and "cuda" in states:
            torch.cuda.random.set_rng_state(states["cuda"])

    trainer._save_rng_state, trainer._load_rng_state = save, load
