"""Save: everything that a user takes away, in one directory, and a name that points to it.

    saved-model/     adapter_model.safetensors, adapter_config.json          the adapter, in PEFT's format
                     tokenizer.json, ..., chat_template.jinja                the tokenizer with the recipe's chat template
                     README.md                                               the model card
                     recipe.yaml                                             the full configuration
                     lineage.json                                            every stage's key, digest and rows; versions
                     metrics.json, generations.jsonl                         base against tuned
    models/RECIPE/NAME -> the directory
    models/RECIPE/promoted -> the one that the verdict was for (flows/running/promotion.py)

It loads with plain peft and transformers; the model card says how.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from tasks.caching.manifest import read_names
from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.caching.versions import package_versions
from tasks.config import SaveConfig
from tasks.reading.model_files import ADAPTER, TOKENIZER, adapter_config, read_json, read_special
from tasks.refs import Adapter, Artifact, Evaluation, InputError, Lineage, Model, SavedModel, Tokenizer, home
from tasks.reporting.model_card import model_card

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "numpy",
    "peft",
    "polars",
    "prefect",
    "pyarrow",
    "rouge-score",
    "sacrebleu",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
    "unsloth",
    "unsloth_zoo",
)
"""Packages that bytes may depend on."""
ROOM_BYTES = 64 * 2**20
"""For all that is not the adapter."""


def tokenizer_files(source: Path, target: Path, chat_template: str, eos: str) -> None:
    """Copy a tokenizer's files and give it the chat template instead of its own, and what ends an answer by that as its EOS.

    A template in tokenizer_config.json, as older tokenizers have it, is taken out: there must be one.
    """
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = read_json(target / "tokenizer_config.json")
    config.pop("chat_template", None)
    _write_json(target / "tokenizer_config.json", config)
    if eos != read_special(target).eos:
        for file in filter(Path.is_file, (target / "tokenizer_config.json", target / "special_tokens_map.json")):
            _write_json(file, read_json(file) | {"eos_token": eos})
    (target / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def lineage_record(lineage: Lineage, model: Model, adapter: Adapter) -> dict[str, Any]:
    """Where the model comes from: stages, source, base model, seeds, versions here and where it was trained."""
    resolved = adapter.log / "resolved.json"
    return {
        "stages": [record.model_dump() for record in lineage.stages],
        "base_model": {"name": model.name, "digest": model.digest, "tokenizer": model.tokenizer.digest},
        "adapter": adapter.data.digest,
        "seeds": dict(seeds(lineage.recipe)),
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "training": read_json(resolved) if resolved.is_file() else {},
    }


def seeds(recipe: Mapping[str, Any], where: str = "") -> dict[str, int]:
    """Every seed of a recipe by its dotted key.

    >>> seeds({"sample": {"seed": 42, "rows": 3}, "finetune": {"lora": {"random_state": 7}}})
    {'finetune.lora.random_state': 7, 'sample.seed': 42}
    """
    found: dict[str, int] = {}
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            found |= seeds(value, f"{where}{name}.")
        elif name == "random_state" or name.endswith("seed"):
            found[f"{where}{name}"] = value
    return dict(sorted(found.items()))


def _copy(artifact: Artifact, target: Path) -> None:
    for name in read_names(artifact.path):
        shutil.copyfile(artifact / name, target / name)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@stage(version=1)
def save(
    adapter: Adapter,
    evaluation: Evaluation,
    template: Artifact,
    model: Model,
    tokenizer: Tokenizer,
    base_name: str,
    config: SaveConfig,
    lineage: Lineage,
) -> SavedModel:
    """Put adapter, tokenizer, configuration, lineage and model card into one directory.

    Tokenizer and base_name are the model's, named by themselves because they count here: files as they do not where only ids
    matter, the name because the model bears it.
    """
    with publish("saved-model", need_bytes=adapter.data.size_bytes + ROOM_BYTES) as draft:
        _copy(adapter.data, draft.path)
        (draft / ADAPTER).write_bytes(adapter_config(read_json(draft / ADAPTER), base_name))
        _copy(evaluation.data, draft.path)
        described = read_json(template / "template.json")
        tokenizer_files(Path(tokenizer.path), draft.path, described["chat_template"], described["eos"])
        recipe = yaml.safe_dump(lineage.recipe, sort_keys=False, allow_unicode=True)
        (draft / "recipe.yaml").write_text(recipe, encoding="utf-8")
        _write_json(draft / "lineage.json", lineage_record(lineage, model, adapter))
        card = model_card(config.name, model, lineage.recipe, read_json(draft / "metrics.json"))
        (draft / "README.md").write_text(card, encoding="utf-8")
    return SavedModel(data=draft.artifact, name=config.name)


def publish_link(saved: SavedModel, recipe_name: str, name: str | None = None) -> Path:
    """Point AMAZON_FT_HOME/models/RECIPE/NAME at a saved model, in one step; call it for a cached one too.

    `name` stands instead of the model's own.

    Raises:
        InputError: when something else lies there.
    """
    link = home() / "models" / recipe_name / (name or saved.name)
    if link.exists() and not link.is_symlink():
        raise InputError(f"{link}: not a link: got a file or directory; expected a link to a saved model. Move it away.")
    link.parent.mkdir(parents=True, exist_ok=True)
    draft = link.with_name(f".{link.name}.{uuid4().hex}")
    draft.symlink_to(os.path.relpath(saved.data.path, link.parent))
    draft.replace(link)
    return link
