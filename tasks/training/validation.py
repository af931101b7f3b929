"""The loss on held-out rows while a training runs: which step was best, and when to stop.

Everything is decided from the training's log, which a resume cuts back to its checkpoint: an interrupted training decides as
an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.config import FinetuneConfig
from tasks.training.inference.likelihood import labelled_tokens, row_nll
from tasks.training.watch import StepRecord


class ValidationLoss:
    """Measures a model's loss on the held-out rows when it is due."""

    def __init__(self, rows: Path, config: FinetuneConfig, device: str) -> None:
        """`rows` is tokens.arrow."""
        import pyarrow as pa

        with pa.memory_map(str(rows)) as source, pa.ipc.open_stream(source) as reader:
            table = reader.read_all()
        self._ids, self._labels = (table[name].to_pylist() for name in ("input_ids", "labels"))
        self._tokens = max(1, sum(labelled_tokens(self._labels)))
        self._config, self._device = config, device

    def loss(self, model: Any, step: int) -> float | None:
        """Nats per labelled token after a step, as evaluate measures them; None when it is not due. Draws no random number."""
        if not self._config.eval_steps or step % self._config.eval_steps:
            return None
        training = model.training
        model.eval()
        sums = row_nll(model.get_base_model(), self._ids, self._labels, batch_size=self._config.batch_size, device=self._device)
        model.train(training)
        return sum(sums) / self._tokens


def best_step(records: Iterable[StepRecord]) -> int | None:
    """The step with the lowest held-out loss, the first of equals; None when none was measured.

    >>> best_step(StepRecord(step, 1.0, 1.0, 0.1, 9, held_out_loss=loss) for step, loss in ((2, 3.0), (4, 2.0), (6, 2.0)))
    4
    """
    measured = [record for record in records if record.held_out_loss is not None]
    return min(measured, key=_worth).step if measured else None


def has_stopped_improving(records: Iterable[StepRecord], patience: int | None) -> bool:
    """Whether the last `patience` held-out losses are no better than the best before them; never for None.

    >>> steps = [StepRecord(step, 1.0, 1.0, 0.1, 9, held_out_loss=loss) for step, loss in ((2, 3.0), (4, 2.0), (6, 2.5))]
    >>> has_stopped_improving(steps, 1), has_stopped_improving(steps, 2), has_stopped_improving(steps, None)
    (True, False, False)
    """
    measured = [record for record in records if record.held_out_loss is not None]
    best = best_step(measured)
    return patience is not None and best is not None and sum(record.step > best for record in measured) >= patience


def _worth(record: StepRecord) -> float:
    loss = record.held_out_loss
    return loss if loss is not None and loss == loss else float("inf")  # NaN is worse than any number
