"""The training loop that the backends share: TRL's SFTTrainer on pre-tokenized rows, watched, sealed and resumable.

Facts behind the settings (TRL 1.14, transformers 5.17): rows carry their own labels, so TRL's preparation is skipped; packs go
in as input_ids, labels and seq_lengths with padding_free, which resets positions at each row's start, and attention follows
them; a resume at the last step would train one step more, so a finished training is never resumed (tasks/finetune.py).
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import copy_context
from functools import partial
from multiprocessing.util import Finalize
from queue import SimpleQueue
from types import FrameType
from typing import Any

from tasks.training.backend import Job
from tasks.training.checkpoints import describe_kept, prune, seal, step_of
from tasks.training.hardware import peak_gib, used_gib
from tasks.training.parallel.dealing import Idle
from tasks.training.parallel.peers import Alone, Peers, find_peers
from tasks.training.validation import ValidationLoss, best_step, has_stopped_improving
from tasks.training.watch import LOG, DivergenceCheck, GradientCheck, Watch, read_log, rewind_log

logger = logging.getLogger(__name__)

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TWICE_SECONDS = 0.5
"""`timeout` sends its signal to the process and to its group: one that comes twice at once is one."""


def train_with_trl(job: Job, model: Any, tokenizer: Any, settings: dict[str, Any]) -> float:
    """Train the wrapped model with TRL; return the peak of memory in GiB.

    `settings` are the arguments of SFTConfig in which the backends differ.

    Raises:
        DivergedError: naming the step and the uids of its rows.
    """
    return run_trainer(job, make_sft_trainer(job, model, tokenizer, settings))


def run_trainer(job: Job, trainer: Any) -> float:
    """Let a transformers.Trainer train, watched, sealed and resumable; return the peak of memory in GiB.

    Raises:
        DivergedError: naming the step and the uids of its rows.
    """
    peers = find_peers()
    peers.join(trainer)
    _end_workers_at_once(trainer)
    if peers.is_first:
        rewind_log(job.work / LOG, step_of(job.resume) if job.resume else 0)
    watch = Watch(
        log=job.work / LOG,
        steps=planned_steps(trainer),
        check=DivergenceCheck(
            max_loss=job.config.max_loss,
            scaled=job.resolved.dtype == "float16",
            rows_of=lambda step: uids_of(trainer, peers.rows_of_step(trainer, step)),
            kept=lambda: describe_kept(job.work),
        ),
        gradients=GradientCheck(dict(trainer.model.named_parameters()), tells=peers.is_first),
        memory_gib=lambda: used_gib(job.resolved.device),
        of_all=peers.of_all,
        tells=peers.is_first,
    )
    _attach(trainer, watch, job, peers)
    with _stoppable(trainer, peers):
        trainer.train(resume_from_checkpoint=str(job.resume) if job.resume else None)
    return peak_gib(job.resolved.device)


def make_sft_trainer(job: Job, model: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    """The SFTTrainer; whatever it prints goes to standard error."""
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]  # where Unsloth puts its own

    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=read_rows(job),
        args=on_one_gpu(SFTConfig(**(sft_arguments(job) | settings))),
    )
    trainer.remove_callback(PrinterCallback)
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL turns an adapter on a 4-bit base to bfloat16; it is trained in float32
            parameter.data = parameter.data.float()
    return trainer


def read_rows(job: Job) -> Any:
    """The pre-tokenized rows, mapped into memory."""
    from datasets import Dataset

    rows: Any = Dataset.from_file(str(job.batches))
    rows._unsloth_truncated_to = job.max_tokens  # no row is longer; lets Unsloth choose padding-free batches as for texts
    return rows


def sft_arguments(job: Job) -> dict[str, Any]:
    """The configuration as arguments of SFTConfig.

    Source: the document's TrainingArguments (README.md, "The recipe", item 9).
    """
    config, resolved = job.config, job.resolved
    return {
        "output_dir": str(job.work),
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "max_steps": config.max_steps or -1,
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup_steps,
        "lr_scheduler_type": config.schedule,
        "optim": resolved.optimizer,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": resolved.dtype == "bfloat16",
        "fp16": resolved.dtype == "float16",
        "use_cpu": resolved.device == "cpu",
        "seed": config.seed,
        "logging_steps": config.logging_steps,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "dataloader_num_workers": config.num_workers or 0,
        "dataloader_pin_memory": resolved.device == "cuda",
        "report_to": "none",
        "disable_tqdm": True,
    }


def on_one_gpu(arguments: Any) -> Any:
    """TrainingArguments for one GPU; where more are visible, a Trainer would spread each batch over all of them.

    A run hides the others (flows/running/gpus.py), but only where nvidia-smi tells of them.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def planned_steps(trainer: Any) -> int:
    """Optimizer steps of the whole training."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])


def uids_of(trainer: Any, rows: Sequence[int]) -> Sequence[str]:
    """The uids of rows of the training."""
    return [uid for uids in trainer.train_dataset[rows]["uids"] for uid in uids]


def _end_workers_at_once(trainer: Any) -> None:
    """Let a data loader's workers, forked from this process, end without what is to be done when this process ends.

    Prefect's calls at exit fail in a fork, and torch takes a worker's exit code for a training that failed.
    """
    make = trainer.get_train_dataloader

    def get_train_dataloader() -> Any:
        loader = make()
        workers = loader.base_dataloader  # torch's, within accelerate's
        workers.worker_init_fn = partial(_begin_worker, workers.worker_init_fn)
        return loader

    trainer.get_train_dataloader = get_train_dataloader


def _begin_worker(begin: Callable[[int], None] | None, worker: int) -> None:
    if begin is not None:
        begin(worker)
    Finalize(None, os._exit, args=(0,), exitpriority=-100)  # after multiprocessing's own, which write what is left in queues


def _attach(trainer: Any, watch: Watch, job: Job, peers: Alone | Peers) -> None:
    """Let the watch see every micro-step, gradient norm and step of the trainer."""
    from transformers import TrainerCallback

    train_step, norm = trainer.training_step, trainer._get_grad_norm

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = tokens_of(inputs)
        loss = train_step(model, inputs, *args, **kwargs)
        watch.micro_step(loss, tokens)
        return loss

    def get_grad_norm(*args: Any, **kwargs: Any) -> Any:
        value = norm(*args, **kwargs)
        watch.clipped(value)
        return value

    trainer.training_step, trainer._get_grad_norm = training_step, get_grad_norm

    validation = ValidationLoss(job.held_out, job.config, job.resolved.device) if job.held_out else None

    class Watched(TrainerCallback):
        def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
            watch.stepped(float(optimizer.param_groups[0]["lr"]))

        def on_step_end(self, *args: Any, **_: Any) -> None:
            _, state, control = args
            loss = validation.loss(trainer.model, state.global_step) if validation else None
            watch.step_ended(state.global_step, loss)
            if control.should_log or control.should_save:
                watch.flush()
            if loss is not None:
                _decide(job, state.global_step, control, peers)

        def on_save(self, *args: Any, **_: Any) -> None:
            _keep(job, args[1].global_step, peers)

    trainer.add_callback(Watched())


def _keep(job: Job, step: int, peers: Alone | Peers) -> None:
    """Seal the checkpoint of a step, which the first process has written, and drop older ones."""
    if peers.is_first:
        seal(job.work / f"checkpoint-{step}")
        prune(job.work, job.config.keep_checkpoints, always=best_step(read_log(job.work / LOG)))


def tokens_of(batch: Any) -> Any:
    """Tokens of a batch that carry text, as a tensor or a number."""
    if isinstance(batch, Idle):
        return 0
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else mask.sum()


def _decide(job: Job, step: int, control: Any, peers: Alone | Peers) -> None:
    """Save the best step so far where the best is wanted; end a training that gets no better, with a checkpoint."""
    records = read_log(job.work / LOG) if peers.is_first else []
    ends = peers.any(has_stopped_improving(records, job.config.early_stopping))
    if ends:
        logger.info("finetune ends at step %d: %d held-out losses in a row were no better.", step, job.config.early_stopping)
        control.should_training_stop = True
    control.should_save |= peers.any(ends or (job.config.keep == "best" and best_step(records) == step))


@contextmanager
def _stoppable(trainer: Any, peers: Alone | Peers) -> Generator[None]:
    """Let a signal end the training after the step at hand, with a checkpoint, and only then do what it did before.

    Of several processes all end after the same step, whichever heard first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from transformers import TrainerCallback

    stop = Stop()

    class Stopping(TrainerCallback):
        def on_step_end(self, *args: Any, **_: Any) -> None:
            stop.steps += 1
            if peers.any(stop.number is not None):
                args[2].should_save = args[2].should_training_stop = True

    trainer.callback_handler.callbacks.insert(0, Stopping())
    try:
        yield
    finally:
        stop.pass_on()


class Stop:
    """Keeps a signal until the step at hand is over; while there is no step to keep, and at a second Ctrl-C, it passes it on."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.steps = 0
        self._at = math.inf
        self._told = SimpleQueue[int | None]()
        # A handler may interrupt whoever holds the log's lock, a thread does not.
        threading.Thread(target=copy_context().run, args=(self._announce,), daemon=True).start()
        self._before = {
            number: handler for number in STOPPING if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
        }
        for number in self._before:
            signal.signal(number, self._note)

    def pass_on(self) -> None:
        """Give the signals back to whom they belonged, and to them the one that came."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._told.put(None)
        if self.number is not None:
            number, self.number = self.number, None
            os.kill(os.getpid(), number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        again = number == signal.SIGINT and time.monotonic() > self._at + TWICE_SECONDS
        first, self.number = self.number is None, number
        self._at = min(self._at, time.monotonic())
        if again or not self.steps:
            self.pass_on()
        elif first:
            self._told.put(number)

    def _announce(self) -> None:
        while (number := self._told.get()) is not None:
            name = signal.Signals(number).name
            logger.warning("%s: a checkpoint is written after the step at hand, then the training ends.", name)


@contextmanager
def prints_to_stderr() -> Generator[None]:
    """Keep standard output for the one who called: some libraries greet on it."""
    with redirect_stdout(sys.stderr):
        yield
