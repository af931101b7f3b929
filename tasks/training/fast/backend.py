"""The fast backend: packs on one GPU as fast as it allows; on the CPU the same arithmetic, for tests and small models.

    ../loading.py -> PEFT -> packed.py     the model: frozen matrices fused, compiled layers
    packed.py -> attention.py              attention within rows
    transformers.Trainer -> ../trainer.py  the loop: schedule, clipping, checkpoints, resume, telemetry, as the other backends

What is our own here, because no library does it as fast or at all, and by how much, is measured in tests/bench/LOG.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.training.backend import Job, Resolved
from tasks.training.loading import attach_fresh_adapter, is_in_4bit, load_base, load_tokenizer
from tasks.training.parallel.peers import count_processes
from tasks.training.trainer import on_one_gpu, read_rows, run_trainer, sft_arguments

if TYPE_CHECKING:
    from tasks.training.fast.packed import Collator, PackedLlama

ONLY_TRL = ("dataset_kwargs",)
"""Arguments of trainer.sft_arguments that transformers.TrainingArguments does not know."""
LENGTHS = 6
"""Rows that are not packed are filled up to so many lengths on a GPU, which compiles each anew, and torch at most eight."""
EVEN = 128
"""Packs are filled up to a multiple of this on a GPU, whose matrix products like even sizes."""
LABELLED = 256
"""Labelled positions are filled up to a multiple of this on a GPU, which has other kernels for other sizes, each to be loaded."""


class FastBackend:
    """Our own forward pass over PEFT's parameters, in transformers' Trainer."""

    def train(self, job: Job) -> float:
        """Train on packs, or on rows laid end to end; see tasks.training.backend.Backend."""
        resolved, path = job.resolved, Path(job.model.path)
        large = is_shared_out(resolved) and not (resolved.load_in_4bit or is_in_4bit(path))
        device = "cpu" if large else resolved.device
        model = load_base(path, resolved.dtype, load_in_4bit=resolved.load_in_4bit, device=device)
        return run_trainer(job, make_packed_trainer(job, attach_fresh_adapter(model, job.config.lora), load_tokenizer(job.model)))


def make_packed_trainer(job: Job, wrapped: Any, tokenizer: Any) -> Any:
    """A transformers.Trainer of the wrapped model, whose loss is that of tasks/training/fast/packed.py."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    rows = read_rows(job)
    known = {name: value for name, value in sft_arguments(job).items() if name not in ONLY_TRL}
    arguments = on_one_gpu(TrainingArguments(**(known | fast_arguments(job))))  # they join the other processes
    packed = packed_llama(job, wrapped)

    class PackedTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Any:
            return model(inputs, num_items_in_batch) * self.accelerator.num_processes  # of which gradients.py takes the mean

    trainer = PackedTrainer(
        model=wrapped,
        args=arguments,
        train_dataset=rows,
        data_collator=collator(job, max_lengths(rows)),
        processing_class=tokenizer,
    )
    wrapped.forward = packed.loss
    trainer.model_accepts_loss_kwargs = True  # the loss is already divided by all labelled tokens of a step
    trainer.remove_callback(PrinterCallback)
    return trainer


def fast_arguments(job: Job) -> dict[str, Any]:
    """TrainingArguments of this backend: no autocast, for packed.py casts where it must, and no waiting for each loss.

    Nor for a batch: another process lays it out, for which a step of 386 ms waited 66 (tests/bench/LOG.md), and it is copied
    to the GPU while that is still busy with the steps before.
    """
    names = ("bf16", "fp16", "remove_unused_columns", "gradient_checkpointing", "logging_nan_inf_filter")
    arguments: dict[str, Any] = dict.fromkeys(names, False)
    if job.resolved.device == "cuda":
        arguments["accelerator_config"] = {"non_blocking": True}
        if job.config.num_workers is None:
            arguments["dataloader_num_workers"] = 1
    return arguments


@dataclass(frozen=True)
class Lengths:
    """The largest sizes of a data set, in tokens and rows."""

    pack: int
    """Tokens of the longest pack, or row where rows are not packed."""
    row: int
    """Tokens of the longest row."""
    rows: int
    """Rows of the fullest pack."""


def max_lengths(dataset: Any) -> Lengths:
    """Read the largest sizes of a data set, without its tokens."""
    import pyarrow.compute as pc

    def longest(name: str) -> int:
        return int(pc.max(pc.list_value_length(table[name])).as_py())

    table: Any = dataset.data
    pack = longest("input_ids")
    if "seq_lengths" not in table.column_names:
        return Lengths(pack, pack, 1)
    return Lengths(pack, int(pc.max(pc.list_flatten(table["seq_lengths"])).as_py()), longest("seq_lengths"))


def packed_llama(job: Job, wrapped: Any) -> PackedLlama:
    """The wrapped model as a function of packs."""
    from tasks.training.fast.packed import PackedLlama

    resolved = job.resolved
    return PackedLlama(
        wrapped,
        resolved.frozen_weights,
        checkpointed=resolved.gradient_checkpointing == "full",
        compiled=resolved.device == "cuda" and resolved.dtype != "float32",
        sharded=is_shared_out(resolved),
        device=resolved.device,
    )


def is_shared_out(resolved: Resolved) -> bool:
    """Whether this process holds its share of the base model's matrices only."""
    return resolved.sharded and count_processes() > 1


def collator(job: Job, lengths: Lengths) -> Collator:
    """Batches of one shape on a GPU, so that one compilation serves all; as long as they are on the CPU."""
    from tasks.training.fast.packed import Collator

    return Collator() if job.resolved.device == "cpu" else gpu_collator(lengths, job.config.batch_size, packed=job.packed)


def gpu_collator(lengths: Lengths, batch_size: int, *, packed: bool) -> Collator:
    """The shapes that a GPU sees of data of such lengths."""
    from tasks.training.fast.packed import Collator

    most = batch_size * lengths.pack
    tokens = round_up(most if packed else -(-most // LENGTHS), EVEN)
    rows = batch_size * lengths.rows + -(-tokens // lengths.row)
    return Collator(tokens=tokens, longest=lengths.row, rows=rows, labelled=LABELLED)


def round_up(size: int, step: int) -> int:
    """The next multiple of a step.

    >>> round_up(8100, 128)
    8192
    """
    return -(-size // step) * step
