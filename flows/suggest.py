"""The recipe that would train on a source, guessed from its columns and its number of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tasks.config import IngestConfig
from tasks.reading.conversations import find_kind
from tasks.reading.files.blocks import Look
from tasks.refs import InputError

HINTS = {
    "uid": r"^(uid|id|asin|sku|ean|gtin|c[oó]digo|code|key)$",
    "title": r"(title|t[ií]tulo|name|nome|nombre|produto|product|headline|pergunta|question)",
    "content": r"(content|desc|text|texto|body|corpo|summary|resumo|resposta|answer)",
}
"""Names that columns of products often have."""
MODEL = "smollm2-135m-instruct"


def suggest(sources: tuple[str, ...], path: Path, found: Look, model: str | None) -> dict[str, Any]:
    """The settings of a recipe for a source, its columns guessed by name where they are not ours."""
    kind = find_kind(found.columns, IngestConfig())
    there = [str(Path(source).absolute()) if Path(source).exists() else source for source in sources]
    settings: dict[str, Any] = {
        "name": re.sub(r"[^a-z0-9]+", "-", path.name.split(".")[0].lower()).strip("-") or "own-data",
        "device": "cuda",
        "model": {"id": model or MODEL, "load_in_4bit": False},
        "ingest": {"sources": there, "kind": kind, "on_bad_row": "quarantine"},
    }
    if kind == "products":
        settings["ingest"] |= {"columns": guess_columns(found.columns)}
        settings["sharegpt"] = {"merged_prompt": "{title}", "conversation_extension": 1}
    settings["template"] = {"source": "model"} if model else {}
    settings["finetune"] = {"backend": "hf", "max_steps": None, "epochs": 1, "gradient_checkpointing": "full"}
    return settings


def guess_columns(columns: Sequence[str]) -> dict[str, str]:
    """The columns of products that names speak for.

    >>> guess_columns(["Código", "Nome", "Preço", "Descrição"])
    {'uid': 'Código', 'title': 'Nome', 'content': 'Descrição'}
    """
    found = dict[str, str]()
    for ours, hint in HINTS.items():
        exact = [name for name in columns if name == ours]
        alike = [name for name in columns if re.search(hint, name, re.IGNORECASE) and name not in found.values()]
        if named := [*exact, *alike]:
            found[ours] = named[0]
    if missing := [name for name in ("title", "content") if name not in found]:
        raise InputError(
            f"peek: columns: got {', '.join(columns) or 'none'}; expected the {' and the '.join(missing)} of a product, or "
            "those of a conversation (messages, conversations, prompt and completion, instruction and output). "
            "Write a recipe with ingest.columns, and look at it with amazon-ft plan."
        )
    return found


def size_sample(settings: dict[str, Any], rows: int) -> None:
    """Set how many rows are trained on and held out, of so many that are kept."""
    held_out = max(1, min(500, rows // 20))
    settings["sample"] = {"rows": max(1, rows - 2 * held_out), "eval_rows": held_out}


def recipe_text(settings: Mapping[str, Any]) -> str:
    """The recipe as YAML, without sections that say nothing."""
    kept = {name: value for name, value in settings.items() if value != {}}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
