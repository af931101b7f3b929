"""A process's share of the rows of each step, for a transformers.Trainer under torchrun; imports torch.

A Trainer deals whole micro-batches in turn, fills up the last step with rows seen before, and makes a step of more rows the more
processes there are. Here a step has the rows that it has in one process, and in the same order; each process gets as many
micro-batches as the others, so that Trainer's loop and its counting of learnt tokens over all processes stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from tasks.training.parallel.dealing import Idle, deal, micro_steps, row_costs
from tasks.training.parallel.evening import Room, even_out

RNG_STATE = "rng_state.pth"
"""Where a Trainer alone keeps its random state."""


class Dealt(BatchSampler):
    """The micro-batches of one process, as `share` finds them in the rows of a step."""

    def __init__(
        self,
        order: Sampler[int],
        share: Callable[[list[int]], list[list[Any]]],
        *,
        rows: int,
        step_rows: int,
        batch_size: int,
        ranks: int,
    ) -> None:
        super().__init__(order, batch_size, drop_last=False)
        self._order, self._share, self._rows, self._step_rows, self._ranks = order, share, rows, step_rows, ranks

    def steps(self) -> Iterator[list[int]]:
        """The rows of each step, on all processes."""
        yield from BatchSampler(self._order, self._step_rows, drop_last=False)

    def __iter__(self) -> Iterator[list[Any]]:
        for rows in self.steps():
            yield from self._share(rows)

    def __len__(self) -> int:
        full, rest = divmod(self._rows, self._step_rows)
        return full * self._micro_steps(self._step_rows) + self._micro_steps(rest)

    def _micro_steps(self, rows: int) -> int:
        return micro_steps(rows, self.batch_size, self._ranks)


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

    args, costs = trainer.args, row_costs(trainer.train_dataset.data)
    batch_size, packed = args.per_device_train_batch_size, "seq_lengths" in trainer.train_dataset.column_names
    step_rows = batch_size * args.gradient_accumulation_steps
    collate = idle_where_empty(trainer.data_collator, packed=packed)

    def get_train_dataloader() -> Any:
        rows = trainer._remove_unused_columns(trainer.train_dataset, description="Training")
        packs = EvenedPacks(rows) if packed else None

        def share(step: list[int]) -> list[list[Any]]:
            dealt = deal(step, costs, batch_size, ranks)
            return (packs.even_out(dealt) if packs is not None else dealt)[rank]

        order = SeedableRandomSampler(rows, data_seed=args.data_seed)  # what accelerate makes of a Trainer's own
        made: Any = DataLoader(
            packs or rows,
            batch_sampler=Dealt(order, share, rows=len(rows), step_rows=step_rows, batch_size=batch_size, ranks=ranks),
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


def idle_where_empty(collate: Callable[[Sequence[Any]], dict[str, Any]], *, packed: bool) -> Callable[[Sequence[Any]], Any]:
    """The collator, and a batch of two tokens without a label where there are no rows."""
    blank: dict[str, list[int]] = {"input_ids": [0, 0], "labels": [-100, -100]}
    if packed:
        blank["seq_lengths"] = [2]

    def collate_or_idle(rows: Sequence[Any]) -> dict[str, Any]:
        return collate(rows) if rows else Idle(collate([blank]))

    return collate_or_idle


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
