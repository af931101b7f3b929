"""Libraries that train: one Protocol, and the values that it takes; hf.py, unsloth.py and fast/backend.py keep to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tasks.config import FinetuneConfig, FrozenWeights
from tasks.refs import Model, Value


class Resolved(Value):
    """A request as the machine at hand can meet it; pinned for a whole training, so that a resume can't change it."""

    dtype: Literal["bfloat16", "float16", "float32"]
    load_in_4bit: bool
    optimizer: str
    gradient_checkpointing: str
    device: str
    device_name: str
    versions: dict[str, str]
    frozen_weights: FrozenWeights = "plain"
    """How the fast backend holds the base model's matrices."""
    sharded: bool = False
    """Whether its devices share these matrices out."""
    estimated_gib: dict[str, float] | None = None
    """Weights, adapter, optimizer, activations and their total, estimated before loading."""
    free_gib: float | None = None
    """GPU memory that was free before loading."""


@dataclass(frozen=True)
class Job:
    """One training, fully decided."""

    model: Model
    batches: Path
    """tokens.arrow or packs.arrow."""
    packed: bool
    config: FinetuneConfig
    max_tokens: int
    resolved: Resolved
    work: Path
    """Holds the checkpoints and the log."""
    resume: Path | None = None
    """The checkpoint to go on from."""
    held_out: Path | None = None
    """tokens.arrow of the rows whose loss is looked at every config.eval_steps."""


class Backend(Protocol):
    """A library that trains."""

    def train(self, job: Job) -> float:
        """Train until the last step, whose checkpoint in the work directory is the result; the peak of memory in GiB.

        Raises:
            DivergedError: naming the step and the rows.
            PipelineError: when memory runs out, naming the settings to change.
        """
        ...
