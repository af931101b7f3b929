"""Checkpoints that can be trusted: each is sealed with a manifest of its files, and only an intact one is used.

work/KEY/checkpoint-50/                what transformers.Trainer writes: adapter, optimizer, schedule, random states
work/KEY/checkpoint-50/manifest.json   written last; a checkpoint without it was cut short
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from tasks.caching.manifest import MANIFEST, find_damage, write_manifest

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
"""Written by transformers.Trainer: global_step, max_steps."""


def seal(checkpoint: Path) -> None:
    """Sync a checkpoint's files to disk and note their digests; what a killed seal of this step left there is removed."""
    for draft in checkpoint.glob(f".{MANIFEST}.*"):
        draft.unlink()
    write_manifest(checkpoint, "checkpoint")


def newest_intact(work: Path) -> Path | None:
    """The newest checkpoint whose bytes are as sealed; damaged ones above it are skipped with a warning."""
    for checkpoint in checkpoints(work):
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s is skipped: %s; the checkpoint before it is used.", checkpoint.name, damage)
    return None


def checkpoints(work: Path) -> list[Path]:
    """All checkpoints of a work directory, newest step first."""
    found = [path for path in work.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written.

    >>> step_of(Path("checkpoint-50"))
    50
    """
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_last(checkpoint: Path) -> bool:
    """Whether the training had come to its last step."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"])


def damage_of(checkpoint: Path, *, digests: bool = True) -> str | None:
    """The fault of a checkpoint, if any; without `digests` only sizes are compared."""
    damage = find_damage(checkpoint, digests=digests)
    return f"{damage.name} is {damage.how}" if damage else None


def prune(work: Path, keep: int, *, always: int | None = None) -> None:
    """Keep the newest `keep` sealed checkpoints, so that an intact one is left at any moment, and that of step `always`."""
    sealed = [path for path in checkpoints(work) if (path / MANIFEST).is_file()]
    for checkpoint in sealed[keep:]:
        if step_of(checkpoint) != always:
            shutil.rmtree(checkpoint, ignore_errors=True)


def drop_from(work: Path, step: int) -> None:
    """Remove the checkpoints of a step and of those after it, to train them again."""
    for checkpoint in checkpoints(work):
        if step_of(checkpoint) >= step:
            shutil.rmtree(checkpoint)


def resumable(work: Path) -> str | None:
    """Say what an unfinished training left behind, for the plan; quick: sizes only."""
    good = next((path for path in checkpoints(work) if damage_of(path, digests=False) is None), None)
    return f"resumable from step {step_of(good)}" if good else None


def describe_kept(work: Path) -> str:
    """Which checkpoint a failed training leaves, for its error message."""
    good = next((path for path in checkpoints(work) if damage_of(path, digests=False) is None), None)
    return f"The checkpoint of step {step_of(good)} is kept in {good}." if good else "No checkpoint had been written yet."
