"""Run the data stages of a recipe without the engine, again and again the same; print {stage: [key, digest]}."""

from __future__ import annotations

import json
import sys
from inspect import signature
from pathlib import Path
from typing import Any

from flows.recipes import load_recipe
from tasks.caching.stage import Stage
from tasks.ingest import ingest
from tasks.model import base_model
from tasks.reading.files.blocks import resolve_kind
from tasks.reading.sources import locate_source
from tasks.sample import sample
from tasks.sharegpt import sharegpt
from tasks.template import template
from tasks.tokenize import tokenize


def run(recipe_file: str) -> dict[str, list[str]]:
    recipe, told = load_recipe(recipe_file), dict[str, list[str]]()

    def step(stage: Stage[..., Any], *inputs: Any) -> Any:
        value = stage.fn(*inputs)
        digests = [
            artifact["digest"] for artifact in value.model_dump().values() if isinstance(artifact, dict) and "kind" in artifact
        ]
        told[stage.name] = [stage.key(signature(stage.fn).bind(*inputs).arguments), *digests]
        print(stage.name, file=sys.stderr, flush=True)
        return value

    model = base_model(recipe.model)
    source = locate_source(recipe.ingest.sources)
    products = step(ingest, source, resolve_kind([Path(file.url) for file in source.files], recipe.ingest), ())
    split = step(sample, products, recipe.sample, None)
    conversations = step(sharegpt, split, recipe.sharegpt)
    texts = step(template, conversations, model.tokenizer.special, recipe.template, None)
    step(tokenize, texts, model.tokenizer, recipe.tokenize)
    return told


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
