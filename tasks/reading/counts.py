"""Lines that are not kept: counted by reason, set aside, and held against what the recipe allows."""

from __future__ import annotations

import json
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import IO

from tasks.caching.store import Draft, publish
from tasks.config import IngestConfig
from tasks.reading.rows import Reject
from tasks.refs import Artifact, InputError

REJECTS = "rejects.jsonl"
EXAMPLES = 3
"""So many bad lines are named when there are too many of them."""


@dataclass
class LineCounts:
    """Counts of the lines so far by what became of them; rejects go to a file that is made for the first of them."""

    config: IngestConfig
    stack: ExitStack
    lines: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    draft: Draft | None = None
    file: IO[str] | None = None

    def reject(self, file: str, reject: Reject) -> None:
        """Set a line aside.

        Raises:
            InputError: under the policy `fail`.
        """
        if self.config.on_bad_row == "fail":
            raise InputError(
                f"{file} {reject.unit} {reject.line}: {reject.reason}. Set ingest.on_bad_row=quarantine to set such rows aside."
            )
        if self.draft is None or self.file is None:
            self.draft = self.stack.enter_context(publish("rejects"))
            self.file = self.stack.enter_context((self.draft / REJECTS).open("w", encoding="utf-8"))
        self.draft.rows += 1
        told = {"file": file, reject.unit: reject.line, "reason": reject.reason} | _as_json(reject.raw)
        json.dump(told, self.file, ensure_ascii=False)
        self.file.write("\n")

    @property
    def rejects(self) -> Artifact | None:
        """The lines set aside; once the stack is closed."""
        return self.draft.artifact if self.draft else None


def _as_json(raw: bytes) -> dict[str, str]:
    """A line as it was: as text where it is text, else in base 64."""
    try:
        return {"raw": raw.decode()}
    except UnicodeDecodeError:
        return {"raw_base64": b64encode(raw).decode()}


def check_kept(kept: int, lines: int, dropped: Mapping[str, int]) -> None:
    """Make sure that something is left.

    Raises:
        InputError: when nothing is, saying what became of it.
    """
    if not kept:
        why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()) if count) or "nothing dropped"
        raise InputError(f"ingest: products: got 0 of {lines:,} lines ({why}); expected at least 1. Check ingest.sources.")


def check_rejected(rejects: Iterable[Artifact], lines: int, config: IngestConfig) -> None:
    """Make sure that not too many lines were set aside.

    Raises:
        InputError: when they were, naming the first.
    """
    held = list(rejects)
    rejected = sum(artifact.rows for artifact in held)
    if rejected > config.max_bad_share * lines:
        named = (f"{entry['file']} {_place(entry)}: {entry['reason']}" for entry in _entries(held))
        raise InputError(
            f"ingest: bad lines: got {rejected:,} of {lines:,}; expected at most max_bad_share={config.max_bad_share:.2%}. "
            f"First: {'; '.join(islice(named, EXAMPLES))}. Mend the file or raise ingest.max_bad_share."
        )


def _entries(rejects: Iterable[Artifact]) -> Iterable[dict[str, str]]:
    for artifact in rejects:
        with (artifact / REJECTS).open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def _place(entry: dict[str, str]) -> str:
    return next(f"{unit} {entry[unit]}" for unit in ("line", "row") if unit in entry)
