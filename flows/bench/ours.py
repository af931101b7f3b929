"""Our data stages in one process, without Prefect: products to token ids; prints {stage: seconds} as JSON.

usage: python -m flows.bench.ours RECIPE SOURCE TOKENIZER_DIR TURNS CONVERSATIONS

AMAZON_FT_HOME should be empty.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from flows.recipes import load_recipe
from tasks.caching.code.loading import collect_rarely
from tasks.caching.files import digested_aside
from tasks.caching.stage import Stage
from tasks.ingest import ingest, processes_beside
from tasks.reading.files.apart import begin_ahead
from tasks.reading.files.blocks import resolve_kind
from tasks.reading.model_files import directory_tokenizer
from tasks.reading.sources import digest_files, find_files
from tasks.sample import sample
from tasks.sharegpt import sharegpt
from tasks.template import template
from tasks.text.encoding import load_ahead
from tasks.tokenize import tokenize

R = TypeVar("R", bound=BaseModel)


def time_stages(recipe_name: str, source: str, tokenizer_directory: str, turns: str, rows: str) -> dict[str, float]:
    """Run the stages on a file; how long each took."""
    settings = {
        "ingest.sources": f"[{source}]",
        "sample.rows": rows,
        "sharegpt.conversation_extension": turns,
        "tokenize.max_affected_share": 1,
    }
    recipe = load_recipe(recipe_name, [f"{name}={value}" for name, value in settings.items()])
    seconds = dict[str, float]()
    tokenizer, files = directory_tokenizer(Path(tokenizer_directory)), find_files(recipe.ingest.sources)

    def timed(stage: Stage[..., R], **inputs: Any) -> R:
        started = time.perf_counter()
        value = stage.execute(inputs)
        seconds[stage.name] = time.perf_counter() - started
        return value

    started = time.perf_counter()
    with digested_aside(files):  # as a run does
        load_ahead(tokenizer)
        begin_ahead(processes_beside(files, resolve_kind(files, recipe.ingest)))
    located = digest_files(files)
    seconds["digest of the source"] = time.perf_counter() - started
    products = timed(ingest, source=located, config=recipe.ingest)
    split = timed(sample, products=products, config=recipe.sample)
    conversations = timed(sharegpt, split=split, config=recipe.sharegpt)
    texts = timed(template, conversations=conversations, special=tokenizer.special, config=recipe.template)
    timed(tokenize, texts=texts, tokenizer=tokenizer, config=recipe.tokenize)
    return seconds


def told(seconds: Mapping[str, float]) -> str:
    """One line of JSON."""
    return json.dumps({name: round(value, 3) for name, value in seconds.items()})


if __name__ == "__main__":
    collect_rarely()  # as a run's process does
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    sys.stdout.write(told(time_stages(*sys.argv[1:])) + "\n")
