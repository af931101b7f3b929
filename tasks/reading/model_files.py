"""A model directory in transformers' format: what it counts as, its tokenizer's special tokens, the base that an adapter names;
without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tasks.caching.files import directory_digest
from tasks.refs import Artifact, InputError, Model, Special, Tokenizer

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
"""Pickled weights (*.bin) do not count and are not read: loading one runs whatever it holds."""
ADAPTER = "adapter_config.json"
"""transformers loads the base model that it names, instead of the directory's own, and the adapter over it."""
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def directory_model(path: Path, *, name: str, artifact: Artifact | None = None) -> Model:
    """A model directory, by the content of the files that matter.

    Raises:
        InputError: when weights (safetensors), config.json or tokenizer files are missing, or it holds an adapter.
    """
    if (path / ADAPTER).exists():
        raise InputError(
            f"model.id: {path} holds an adapter: got {ADAPTER}; expected a base model. Take that file away, or merge the "
            "adapter first: amazon-ft export MODEL OUT --format merged-16bit."
        )
    weights = _names(path, WEIGHTS)
    if "config.json" not in weights or not any(file.endswith(".safetensors") for file in weights):
        raise InputError(
            f"model.id: {path} is no model directory: got {_listed(path)}; expected config.json and *.safetensors. "
            "Save the model with save_pretrained, which writes both."
        )
    return Model(
        path=str(path),
        digest=directory_digest(path, weights),
        name=name,
        tokenizer=directory_tokenizer(path),
        artifact=artifact,
    )


def directory_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer directory, by the content of its files.

    Raises:
        InputError: when there is no tokenizer.json, or no end-of-sequence token is named.
    """
    names = _names(path, TOKENIZER)
    if "tokenizer.json" not in names:
        raise InputError(
            f"model.id: {path} has no tokenizer: got {_listed(path)}; expected tokenizer.json. "
            "Save the fast tokenizer there with save_pretrained."
        )
    return Tokenizer(
        path=str(path),
        digest=directory_digest(path, names),
        special=read_special(path),
        chat_template=read_chat_template(path),
    )


def read_chat_template(path: Path) -> str | None:
    """The chat template of a tokenizer's directory, in Jinja; the default one of several."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    config = path / "tokenizer_config.json"
    found = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        named = {item["name"]: item["template"] for item in cast("list[dict[str, str]]", found)}
        return named.get("default")
    return found


def read_special(path: Path) -> Special:
    """The tokens that begin and end a text, as the tokenizer's files name them, and those that end an answer beside.

    Raises:
        InputError: when none of them names an end-of-sequence token.
    """
    named: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / file).is_file():
            named |= {key: value for key, value in read_json(path / file).items() if value is not None}
    eos = _token(named.get("eos_token"))
    if eos is None:
        raise InputError(
            f"{path}: no end-of-sequence token: got {sorted(named)}; expected eos_token in tokenizer_config.json. "
            "Without it no answer would end; name one there."
        )
    return Special(bos=_token(named.get("bos_token")), eos=eos, stops=tuple(stop for stop in _stops(path) if stop != eos))


def _stops(path: Path) -> list[str]:
    """Added tokens of the tokenizer that end the model's answers. Source: transformers, GenerationConfig.eos_token_id."""
    generation, tokenizer = path / "generation_config.json", path / "tokenizer.json"
    if not generation.is_file() or not tokenizer.is_file():
        return []
    numbers = read_json(generation).get("eos_token_id")
    if not isinstance(numbers, list):
        return []
    added = {token["id"]: token["content"] for token in read_json(tokenizer).get("added_tokens", [])}
    return [added[number] for number in cast("list[int]", numbers) if number in added]


def _token(value: Any) -> str | None:
    """A token, written as text or as {"content": text}.

    >>> _token({"content": "</s>", "lstrip": False})
    '</s>'
    """
    return value["content"] if isinstance(value, dict) else value


def adapter_config(config: Mapping[str, Any], base: str) -> bytes:
    """PEFT's adapter_config.json with equal bytes for equal settings, naming the base model as the user does.

    >>> print(adapter_config({"r": 4, "base_model_name_or_path": "/tmp/x", "target_modules": ["v", "q"]}, "org/model").decode())
    {
      "base_model_name_or_path": "org/model",
      "r": 4,
      "target_modules": [
        "q",
        "v"
      ]
    }
    """
    portable = {**config, "base_model_name_or_path": base}
    if isinstance(modules := portable.get("target_modules"), list):
        portable["target_modules"] = sorted(modules)  # PEFT writes a set, in any order
    return json.dumps(portable, indent=2, sort_keys=True).encode()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        InputError: when it is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: no JSON: {error}. Fetch the tokenizer anew.") from error


def _names(path: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted({file.name for pattern in patterns for file in path.glob(pattern) if file.is_file()})


def _listed(path: Path) -> str:
    names = sorted(item.name for item in path.iterdir())
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" or "an empty directory"
