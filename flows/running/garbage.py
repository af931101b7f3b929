"""The content of AMAZON_FT_HOME, which runs refer to it, and what may be removed."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.caching import locks, runs
from tasks.caching.context import check_root
from tasks.config import PROMOTED
from tasks.refs import ConfigError, InputError, home

LOCKED = ("drafts", "runs", "served", "work")
"""Folders in which X is held through X.lock."""
UNIT_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass
class Entry:
    """An artifact or a work directory, and the runs that refer to it."""

    kind: str
    """Of an artifact; `work` for checkpoints, `served` for what `amazon-ft serve` merged."""
    path: str
    size_bytes: int
    runs: list[str] = field(default_factory=list[str])


def inventory() -> list[Entry]:
    """Every artifact and work directory, largest first."""
    past = runs.past_runs()
    entries = [
        Entry(path.parent.name, str(path.relative_to(home())), _size(path), _referring(past, path)) for path in _artifacts()
    ]
    entries += [Entry("work", str(path.relative_to(home())), _size(path), _working(past, path)) for path in _work()]
    entries += [Entry("served", str(path.relative_to(home())), _size(path)) for path in _children("served")]
    return sorted(entries, key=lambda entry: -entry.size_bytes)


def parse_age(text: str | None) -> float:
    """Seconds of an age such as 30m, 12h, 7d or 2w; 0 for none.

    >>> parse_age("12h")
    43200.0

    Raises:
        ConfigError: for any other text.
    """
    if text is None:
        return 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text)
    if match is None:
        raise ConfigError(f"--older-than {text}: expected a number and m, h, d or w, such as 12h or 7d")
    return float(match[1]) * UNIT_SECONDS[match[2]]


def collect(keep_last: int, age_seconds: float, *, dry_run: bool = False) -> list[Entry]:
    """Remove what neither a kept run nor a living one refers to; returns what was removed.

    Kept are living runs, the last `keep_last` runs of each recipe that came to its end with what was tried since, runs younger
    than `age_seconds`, and the newest that used a promoted model. Removing is a rename under the root's mutex and under what
    the path is held through, so that a run which starts meanwhile sees all of it or nothing.

    Raises:
        InputError: when the root may only be read, or a run's record is damaged: what that run relies on is unknown.
    """
    check_root()
    if damaged := runs.damaged_runs():
        raise InputError(
            f"cache gc: {damaged[0]}: got a damaged record; expected one that tells what its run uses. Remove that file, and "
            "gc may remove what only that run used."
        )
    with locks.mutex():
        records, past = _children("records"), runs.past_runs()  # in this order: a run tells of a stage before it records it
        promoted = _ids_of_promoted(past)
        kept = [run for run in past if run["id"] in promoted or _is_kept(run, past, keep_last, age_seconds)]
        doomed = [(path, Entry(_kind(path), str(path.relative_to(home())), _size(path))) for path in _doomed(kept)]
        if dry_run:
            return [entry for _, entry in doomed]
        _drop_records(records, kept)
        trash = home() / "trash" / f"{time.time_ns()}"
        trash.mkdir(parents=True)
        gone = [entry for number, (path, entry) in enumerate(doomed) if _move(path, trash / f"{number}")]
        for run in past:
            if run not in kept:
                for suffix in ("json", "log"):
                    (home() / "runs" / f"{run['id']}.{suffix}").unlink(missing_ok=True)
    shutil.rmtree(trash, ignore_errors=True)
    return gone


def _is_kept(run: dict[str, Any], runs: list[dict[str, Any]], keep_last: int, age_seconds: float) -> bool:
    if locks.is_locked(home() / "runs" / f"{run['id']}.lock"):
        return True
    finished = [other["started"] for other in runs if other["recipe"] == run["recipe"] and _is_complete(other)][:keep_last]
    oldest_kept = min(finished, default=0.0) if keep_last else float("inf")
    return run["started"] >= oldest_kept or (age_seconds > 0 and time.time() - run["started"] < age_seconds)


def _is_complete(run: dict[str, Any]) -> bool:
    """Whether a run has made all that its recipe makes; what was tried since is kept with it."""
    return run["finished"] and run["until"] is None and run["parent"] is None


def _promoted() -> list[str]:
    """KIND/DIGEST of every recipe's promoted model."""
    links = [path for path in (home() / "models").glob(f"*/{PROMOTED}") if path.exists()]
    return ["/".join(link.resolve().parts[-2:]) for link in links]


def _ids_of_promoted(runs: list[dict[str, Any]]) -> set[str]:
    """The newest finished run that used each promoted model; `runs` are newest first."""
    using = ([run["id"] for run in runs if run["finished"] and name in run["artifacts"]] for name in _promoted())
    return {ids[0] for ids in using if ids}


def _doomed(kept: list[dict[str, Any]]) -> list[Path]:
    return [path for path in (*_unreferenced(kept), *_leftovers()) if not locks.is_locked(path.with_suffix(".lock"))]


def _unreferenced(kept: list[dict[str, Any]]) -> Iterator[Path]:
    used = {name for run in kept for name in run["artifacts"]} | set(_promoted())
    keys = {entry["key"][:32] for run in kept for entry in run["stages"]}
    yield from (path for path in _artifacts() if f"{path.parent.name}/{path.name}" not in used)
    yield from (path for path in _work() if path.name not in keys)


def _leftovers() -> Iterator[Path]:
    """Drafts and half-written files whose writer is gone, links to nothing, an earlier sweep's trash, and merged copies of
    models, which `amazon-ft serve` makes anew; a server that has one open keeps it until it ends.
    """
    yield from (*_children("drafts"), *_children("served"), *(home() / "runs").glob("*.lock"), *(home() / "work").glob("*.lock"))
    yield from _half_written()
    yield from (path for path in (home() / "models").glob("*/*") if path.is_symlink() and not path.exists())
    yield from _children("trash")


def _half_written() -> list[Path]:
    """Files that a writer left; while a run lives, they may be its own. A writer holds its run's lock, so that is asked last."""
    found = [path for folder in ("runs", "records") for path in _children(folder) if path.name.startswith(".")]
    return [] if any(map(locks.is_locked, (home() / "runs").glob("*.lock"))) else found


def _drop_records(records: list[Path], kept: list[dict[str, Any]]) -> None:
    keys = {entry["key"] for run in kept for entry in run["stages"]}
    for record in records:
        if record.name not in keys and not record.name.startswith("."):
            record.unlink(missing_ok=True)


def _move(path: Path, to: Path) -> bool:
    """Move what is still there and still held by nobody; whether it was. A lock file goes with the hold on it."""
    lock = path.with_suffix(".lock")
    hold = locks.locked(lock, remove=True, wait_seconds=0) if path.parent.name in LOCKED else nullcontext()
    with suppress(FileNotFoundError, locks.Timeout), hold:
        if path != lock:
            path.rename(to)
        return True
    return False


def _artifacts() -> list[Path]:
    return sorted((home() / "artifacts").glob("*/*"))


def _work() -> list[Path]:
    return [path for path in _children("work") if path.is_dir()]


def _children(folder: str) -> list[Path]:
    path = home() / folder
    return sorted(path.iterdir()) if path.is_dir() else []


def _referring(runs: list[dict[str, Any]], path: Path) -> list[str]:
    return [run["id"] for run in runs if f"{path.parent.name}/{path.name}" in run["artifacts"]]


def _working(runs: list[dict[str, Any]], path: Path) -> list[str]:
    return [run["id"] for run in runs if any(entry["key"].startswith(path.name) for entry in run["stages"])]


def _kind(path: Path) -> str:
    top, second, *_ = path.relative_to(home()).parts
    return second if top == "artifacts" else top


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())
