"""Results of the stages of a run, read from their records: for all that tells of a run after it.

Results(run)    .value("tokenize", Split)        the reference that the stage returned
                .metrics, .generations           what the evaluation measured, what both models said
                .training, .resolved             each step of the training; what it was decided to be
                .lengths, .examples              tokens of the training rows; some of them with what is learnt

What a run did not come to is None or empty, and so is what was removed or damaged since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from tasks.caching.stage import Made, read_made
from tasks.caching.store import Missing, check
from tasks.refs import Adapter, Artifact, Evaluation, Products, Split
from tasks.reporting.markdown import pieces

R = TypeVar("R", bound=BaseModel)
Row = list[tuple[str, bool]]
"""A training row as (text, trained on) pieces."""


class Whatever(BaseModel):
    """Any reference, for whom its fields don't matter."""


class Results:
    """A run by its record."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        self.run = run

    @property
    def stages(self) -> Sequence[Mapping[str, Any]]:
        """One entry a stage call, in their order."""
        return self.run["stages"]

    def entry(self, *names: str) -> Mapping[str, Any] | None:
        """The last entry of one of these stages that came to its end."""
        return next((entry for entry in reversed(self.stages) if entry["name"] in names and "digest" in entry), None)

    def value(self, name: str, returns: type[R]) -> R | None:
        """The reference that a stage returned; None when its record or its files were removed, or are damaged."""
        return self._value(self.entry(name), returns)

    @property
    def products(self) -> Products | None:
        """The rows that training was drawn from; `ingest` may have read files of evaluation's own as well."""
        drawn = next((entry["inputs"]["products"]["data"] for entry in self.stages if entry["name"] == "sample"), None)
        read = [entry for entry in self.stages if entry["name"] in ("ingest", "join") and "digest" in entry]
        return self._value(next((entry for entry in reversed(read) if drawn in (None, entry["digest"])), None), Products)

    def _value(self, entry: Mapping[str, Any] | None, returns: type[R]) -> R | None:
        made = _made(entry["key"], returns) if entry else None
        if made is not None:
            with suppress(Missing):
                check(made.value)
                return made.value
        return None

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """metrics.json; empty without an evaluation or without held-out rows."""
        found = read_optional_json(_file(self.value("evaluate", Evaluation), "metrics.json"))
        return found if found.get("rows") else {}

    @cached_property
    def generations(self) -> list[dict[str, Any]]:
        """generations.jsonl."""
        return read_lines(_file(self.value("evaluate", Evaluation), "generations.jsonl"))

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """train_log.jsonl: one line a step."""
        return read_lines(self._log("train_log.jsonl"))

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """resolved.json: the training's device, number types, versions."""
        return read_optional_json(self._log("resolved.json"))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each training row."""
        tokens = self.value("tokenize", Split)
        return row_lengths(tokens.train) if tokens is not None and tokens.train.path.is_dir() else []

    def examples(self, tokenizer: Path, rows: int) -> list[Row]:
        """The first training rows, decoded by the tokenizer of a directory."""
        tokens = self.value("tokenize", Split)
        return marked_rows(tokens.train, tokenizer, rows) if tokens is not None and tokens.train.path.is_dir() else []

    def seconds(self, entry: Mapping[str, Any]) -> float | None:
        """How long the making of a stage's output took, in this run or in the one that made it."""
        if entry["state"] != "cached":
            return entry.get("seconds")
        made = _made(entry["key"], Whatever)
        return made.seconds if made else None

    def _log(self, name: str) -> Path | None:
        adapter = self.value("finetune", Adapter)
        return adapter.log / name if adapter is not None else None


def _made(key: str, returns: type[R]) -> Made[R] | None:
    """The outcome of a stage call; None where its record was removed, is damaged or of another release."""
    with suppress(OSError, ValueError):
        return read_made(key, returns)
    return None


def row_lengths(tokens: Artifact) -> list[int]:
    """Tokens of each row of tokens.arrow."""
    from tasks.tables.arrow import list_lengths, read_table

    return list_lengths(read_table(tokens / "tokens.arrow")["input_ids"]).tolist()


def marked_rows(tokens: Artifact, tokenizer: Path, rows: int) -> list[Row]:
    """The first rows of tokens.arrow as text, with what is trained on."""
    import pyarrow as pa
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(tokenizer / "tokenizer.json"))
    with pa.memory_map(str(tokens / "tokens.arrow")) as source, pa.ipc.open_stream(source) as reader:
        first = next(iter(reader), None)
        read: list[dict[str, Any]] = first.slice(0, rows).to_pylist() if first is not None else []
    parts = [pieces(row["input_ids"], row["labels"]) for row in read]
    return [[(backend.decode(ids, skip_special_tokens=False), trained) for ids, trained in row] for row in parts]


def read_optional_json(file: Path | None) -> dict[str, Any]:
    """A JSON file's object; empty if it is not there."""
    return json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}


def read_lines(file: Path | None) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none if it is not there."""
    if file is None or not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="\n") as lines:  # splitlines would end a line at U+2028, too
        return [json.loads(line) for line in lines]


def flat(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A recipe's values by their dotted keys.

    >>> flat({"name": "demo", "finetune": {"lora": {"r": 16}, "max_steps": None}})
    {'name': 'demo', 'finetune.lora.r': 16, 'finetune.max_steps': None}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{where}{name}.") if isinstance(value, Mapping) else {f"{where}{name}": value}
    return found


def _file(value: Evaluation | None, name: str) -> Path | None:
    return value.data / name if value is not None else None
