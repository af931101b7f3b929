"""The small values that stages hand each other, and the errors they raise.

A stage never returns data: it returns a frozen value that names files under AMAZON_FT_HOME by what they contain. Fields
marked `aside` (counts, sizes, side files) do not count when the value is another stage's input.

    Source -> ingest [-> Shards -> join] -> Products -> sample -> Split -> sharegpt -> Split -> template -> Texts -> tokenize
           -> Split -> [pack -> Artifact] -> finetune -> Adapter [; baseline -> Baseline] -> evaluate -> Evaluation -> save
           -> SavedModel

Files, all Arrow IPC streams that `datasets.Dataset.from_file` maps into memory:

    products.arrow       uid, title, content, further columns: string; or uid, system: string, prompts, answers: list<string>
    conversations.arrow  uids: list<string>, products: list<int32>, conversations: list<struct<role, content: string>>
    turns.arrow          uid, prompt, answer: string        (one row a product; conversation i starts with product i)
    texts.arrow          uids: list<string>, products: list<int32>, text: string
    tokens.arrow         uids: list<string>, input_ids, labels: list<int32>
    packs.arrow          uids: list<string>, input_ids, labels, seq_lengths: list<int32>

Rows that were conversations already have their system text, `system: string`, in conversations.arrow and texts.arrow, and
turns of their own. `products` holds, for each turn, the row number of its product (its row in
turns.arrow); `labels` is -100 where nothing is learnt.

Exceptions:

    PipelineError            what the user can mend; shown as one message, never as a stack trace
    +-- ConfigError          the recipe or an override is wrong (exit code 2)
    +-- InputError           the data, the model directory or a path is wrong (exit code 2)
    +-- NoSpaceError         the disk is full
    +-- DivergedError        the loss is NaN or too large
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, PlainSerializer

from tasks.config import aside


class PipelineError(Exception):
    """Says where, what was got, what was expected and what to do."""


class ConfigError(PipelineError):
    """The recipe or an override is wrong."""


class InputError(PipelineError):
    """The data, the model or a path is wrong."""


class NoSpaceError(PipelineError):
    """The disk is full."""


class DivergedError(PipelineError):
    """Training produced NaN or a loss above the bound."""


def home() -> Path:
    """The root of everything the pipeline writes: AMAZON_FT_HOME, else ~/.amazon-ft; read anew at each call."""
    return Path(os.environ.get("AMAZON_FT_HOME") or Path.home() / ".amazon-ft").absolute()


def _under_home(path: str) -> str:
    return path if "://" in path else str(home() / path)


def _relative_to_home(path: str) -> str:
    return str(Path(path).relative_to(home())) if Path(path).is_relative_to(home()) else path


RootedPath = Annotated[str, BeforeValidator(_under_home), PlainSerializer(_relative_to_home)]
"""An absolute path or a URL; kept relative in records where it lies under the root, so that it moves with the root."""


class Value(BaseModel):
    """Base of what stages hand each other: frozen, closed, JSON in and out."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Artifact(Value):
    """A published directory of files, named by its content: equal bytes, equal digest, equal path."""

    kind: str
    digest: str
    """SHA-256, 64 hex digits, of the manifest: the sorted list of (file name, size, SHA-256)."""
    rows: int = aside(0)
    size_bytes: int = aside(0)

    @property
    def path(self) -> Path:
        """Where it lies under the present root."""
        return home() / "artifacts" / self.kind / self.digest[:32]

    def __truediv__(self, name: str) -> Path:
        return self.path / name


class SourceFile(Value):
    """One input file; it counts by content, wherever it lies."""

    url: RootedPath = aside()
    digest: str
    size_bytes: int = aside()


class Source(Value):
    """The input files in the order given; `artifact` holds them when a stage made them."""

    files: tuple[SourceFile, ...]
    is_shard: bool = False
    """One file of several: that enough of it is good, and anything left, is for the whole to show."""
    artifact: Artifact | None = aside(None)


class Products(Value):
    """Cleaned products; `rejects` holds quarantined lines and never counts downstream."""

    data: Artifact
    rejects: Artifact | None = aside(None)
    lines: int = aside(0)
    dropped: dict[str, int] = aside({})
    """Rows that were read and not kept, by reason."""


class Shards(Value):
    """Products of several files, each read on its own; their counts are those of the whole."""

    data: tuple[Artifact, ...]
    rejects: tuple[Artifact, ...]
    lines: int
    dropped: dict[str, int]


class Split(Value):
    """The same kind of rows for training and for evaluation."""

    train: Artifact
    evaluation: Artifact
    counts: dict[str, float] = aside({})


class Special(Value):
    """The tokenizer's special tokens that texts carry."""

    bos: str | None
    eos: str
    stops: tuple[str, ...] = ()
    """Further tokens at which the model ends an answer, by its generation_config.json: Gemma's <end_of_turn>, Phi 3's <|end|>."""


class Texts(Value):
    """Rendered rows and the template that rendered them (template.json: bos, eos, preamble, chat_template)."""

    train: Artifact
    evaluation: Artifact
    template: Artifact
    preview: tuple[str, ...] = aside(())
    """The first two training rows, as the document prints them."""


class Tokenizer(Value):
    """A tokenizer by content (`digest` of its files) or by pinned commit."""

    path: RootedPath = aside()
    digest: str
    special: Special = aside()
    chat_template: str | None = aside(None)
    """The model's own, in Jinja."""


class Model(Value):
    """A base model by content (`digest` of its files) or by pinned commit (`hub:ID@COMMIT`)."""

    path: RootedPath = aside()
    digest: str
    name: str = aside()
    """Its name in a model card: the hub id or the directory's name."""
    tokenizer: Tokenizer = aside()
    artifact: Artifact | None = aside(None)
    """Holds the files when a stage fetched them."""


class HeldOut(Value):
    """The rows that base and tuned model are asked about."""

    tokens: Artifact
    """tokens.arrow."""
    texts: Artifact
    """The same rows as turns.arrow."""
    template: Artifact
    tokenizer: Tokenizer
    """The model's, named here because its files count: they pad and decode."""


class Prepared(Value):
    """All that fine-tuning and evaluation need: what the parent flow hands to the child flow."""

    model: Model
    batches: Artifact
    """Training rows: tokens.arrow, or packs.arrow where the recipe packs."""
    held_out: HeldOut


class Adapter(Value):
    """A LoRA adapter in PEFT's format, and the log of its training (train_log.jsonl, resolved.json)."""

    data: Artifact
    log: Artifact = aside()
    steps: int = aside(0)
    summary: dict[str, float] = aside({})


class Baseline(Value):
    """The base model's answers on the held-out rows (said.json)."""

    data: Artifact


class Evaluation(Value):
    """metrics.json and generations.jsonl of base and tuned model."""

    data: Artifact
    summary: dict[str, float] = aside({})


class SavedModel(Value):
    """All that the user takes away: adapter, tokenizer with chat template, config, lineage, model card."""

    data: Artifact
    name: str = aside()


class StageRecord(Value):
    """How one stage call of a run came out."""

    name: str
    key: str
    digest: str
    rows: int


class Lineage(Value):
    """Where a saved model comes from; it is told, and only the recipe's name counts."""

    name: str = ""
    """The recipe's: a model's card is that of one recipe."""
    recipe: dict[str, JsonValue] = aside(default={})
    """The full configuration of the run that made it."""
    stages: tuple[StageRecord, ...] = aside(default=())
