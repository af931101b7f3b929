"""Watches a training step by step: what each step lost, whether it diverged, how fast it goes.

Numbers stay on the device until a logged step, so that watching costs one synchronisation for each report.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tasks.caching import files
from tasks.caching.context import tell
from tasks.caching.events import StepsLogged
from tasks.refs import DivergedError

logger = logging.getLogger(__name__)

LOG = "train_log.jsonl"
NAMED_ROWS = 16
"""Rows that an error names; a pack may hold hundreds."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; a line of train_log.jsonl."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    """Tokens that carry text, padding left out."""
    seconds: float = math.nan
    """Since the training began; what lay between an interruption and its resume is left out."""
    memory_gib: float = math.nan
    """Held by the process on its device after the step."""
    held_out_loss: float | None = None
    """Nats per labelled token of the held-out rows after the step, where it was measured."""


@dataclass
class Pending:
    """A step whose numbers are still on the device, each a tensor or a plain number."""

    losses: list[Any] = field(default_factory=list[Any])
    tokens: list[Any] = field(default_factory=list[Any])
    grad_norm: Any = math.nan
    learning_rate: float = math.nan
    step: int = 0
    seconds: float = math.nan
    memory_gib: float = math.nan
    held_out_loss: float | None = None


class Watch:
    """Collects steps; hands them to the log, the listeners and the check when a step is logged or saved."""

    def __init__(
        self,
        *,
        log: Path,
        steps: int,
        check: DivergenceCheck,
        gradients: GradientCheck | None = None,
        memory_gib: Callable[[], float],
        of_all: Callable[[Sequence[StepRecord]], list[StepRecord]] = list,
        tells: bool = True,
    ) -> None:
        """Of several processes that share each step, `of_all` puts steps together, and one tells of them."""
        self._of_all, self._tells = of_all, tells
        self._log = log
        self._steps = steps
        self._check, self._gradients = check, gradients
        self._open = Pending()
        self._waiting: list[Pending] = []
        self._memory_gib = memory_gib
        self._since = time.monotonic()
        self._began = self._since - seconds_so_far(log)

    def micro_step(self, loss: Any, tokens: Any) -> None:
        """A forward and backward pass was made."""
        self._open.losses.append(loss)
        self._open.tokens.append(tokens)

    def clipped(self, grad_norm: Any) -> None:
        """The gradient's norm before clipping is known."""
        self._open.grad_norm = grad_norm

    def stepped(self, learning_rate: float) -> None:
        """The optimizer made a step at this rate; the gradients are there still."""
        self._open.learning_rate = learning_rate
        if self._gradients is not None:
            self._gradients.look()

    def step_ended(self, step: int, held_out_loss: float | None) -> None:
        """The step is complete, and what was lost on held-out rows after it, if that was looked at; steps count from 1."""
        self._open.step, self._open.held_out_loss = step, held_out_loss
        self._open.seconds, self._open.memory_gib = time.monotonic() - self._began, self._memory_gib()
        self._waiting.append(self._open)
        self._open = Pending()

    def flush(self) -> None:
        """Fetch the waiting steps' numbers, write them to the log, tell the listeners, and judge them.

        Raises:
            DivergedError: for the first step that went wrong.
        """
        records = [_fetch(pending) for pending in self._waiting]
        if not records:
            return
        self._waiting = []
        records = self._of_all(_on_time(records, time.monotonic() - self._began))
        if not self._tells:
            return
        with self._log.open("a") as file:
            file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        report = self._report(records)
        tell_steps(report)
        self._check.judge(records)

    def _report(self, records: Sequence[StepRecord]) -> StepsLogged:
        now = time.monotonic()
        seconds, self._since = max(now - self._since, 1e-9), now
        last = records[-1]
        return StepsLogged(
            step=last.step,
            steps=self._steps,
            loss=sum(record.loss for record in records) / len(records),
            grad_norm=last.grad_norm,
            learning_rate=last.learning_rate,
            tokens_per_second=sum(record.tokens for record in records) / seconds,
            eta_seconds=(self._steps - last.step) * seconds / len(records),
            records=tuple(asdict(record) for record in records),
        )


@dataclass(frozen=True)
class DivergenceCheck:
    """Decides whether a step went wrong."""

    max_loss: float
    scaled: bool
    """float16 with a loss scale: an overflowing gradient is skipped by design and no divergence."""
    rows_of: Callable[[int], Sequence[str]]
    """uids of the rows of a step."""
    kept: Callable[[], str]
    """Says which checkpoint is left."""

    def judge(self, records: Sequence[StepRecord]) -> None:
        """Raise for the first record with a loss or a gradient that is not a usable number."""
        for record in records:
            if what := self._fault(record):
                raise DivergedError(
                    f"finetune step {record.step}: training diverged: got {what}; expected a loss up to {self.max_loss:g} and "
                    f"finite gradients. Its rows: {_named(self.rows_of(record.step))}. {self.kept()} "
                    "Lower finetune.learning_rate, raise finetune.warmup_steps, or look at these rows."
                )

    def _fault(self, record: StepRecord) -> str | None:
        if not record.loss <= self.max_loss:
            return f"loss {record.loss:g}"
        if not math.isfinite(record.grad_norm) and not self.scaled:
            return f"gradient norm {record.grad_norm:g}"
        return None


class GradientCheck:
    """Says which modules' adapters have no gradient, in the first step that has any: a loss does not show it."""

    def __init__(self, parameters: Mapping[str, Any], *, tells: bool) -> None:
        """A model's parameters by name. B of LoRA is looked at: it is zero at first, and so is A's gradient then."""
        named = [(name.split("."), parameter) for name, parameter in parameters.items() if parameter.requires_grad]
        self._adapters = [(path[-4], parameter) for path, parameter in named if path[-3:-2] == ["lora_B"]]
        self._looks = tells

    def look(self) -> None:
        """All gradients of a step are there."""
        if not self._looks:
            return
        idle = [module for module, parameter in self._adapters if parameter.grad is None or not parameter.grad.any()]
        self._looks = len(idle) == len(self._adapters)  # as of a batch without labels
        if idle and not self._looks:
            logger.warning(
                "finetune: no gradient for the adapters of %s; expected one for each. Without any they learn nothing: "
                "try finetune.backend=hf, or another version of torch.",
                ", ".join(sorted(set(idle))),
            )


def tell_steps(report: StepsLogged) -> None:
    """Let all hear how a training stands."""
    tell(report)
    logger.info(
        "step %d of %d: loss %.4f, learning rate %.2e, gradient norm %.3f, %.0f tokens/s, %.0f s left",
        *(report.step, report.steps, report.loss, report.learning_rate, report.grad_norm),
        *(report.tokens_per_second, report.eta_seconds),
    )
    if (held_out := report.records[-1]["held_out_loss"]) is not None:
        logger.info("step %d: held-out loss %.4f", report.step, held_out)


def rewind_log(log: Path, step: int) -> None:
    """Drop the lines of steps after the checkpoint that a training goes on from."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
    kept = "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
    files.write_atomic(log, kept.encode())


def read_log(log: Path) -> list[StepRecord]:
    """All steps of a training; a line that was cut short is none."""
    return [
        StepRecord(**json.loads(line))
        for line in log.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n")
    ]


def seconds_so_far(log: Path) -> float:
    """How long the steps in a log took."""
    records = read_log(log) if log.is_file() else []
    return records[-1].seconds if records else 0.0


def _fetch(pending: Pending) -> StepRecord:
    return StepRecord(
        step=pending.step,
        loss=float(sum(pending.losses)),
        grad_norm=float(pending.grad_norm),
        learning_rate=pending.learning_rate,
        tokens=int(sum(pending.tokens)),
        seconds=round(pending.seconds, 3),
        memory_gib=pending.memory_gib,
        held_out_loss=pending.held_out_loss,
    )


def _on_time(records: Sequence[StepRecord], now: float) -> list[StepRecord]:
    """Records whose steps the GPU has done by now, later than they were noted: what is missing is shared out evenly."""
    late = (now - records[-1].seconds) / len(records)
    return [replace(record, seconds=round(record.seconds + late * number, 3)) for number, record in enumerate(records, 1)]


def _named(uids: Sequence[str]) -> str:
    more = f" and {len(uids) - NAMED_ROWS} more" if len(uids) > NAMED_ROWS else ""
    return ", ".join(uids[:NAMED_ROWS]) + more
