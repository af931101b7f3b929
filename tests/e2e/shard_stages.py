"""Read a recipe's files in a flow that ends with `ingest`; print each stage call with its state, and the last digest."""

from __future__ import annotations

import json
import sys
from contextlib import suppress

from prefect import flow

from flows.pipeline import read_products
from flows.recipes import build_recipe
from flows.running.cluster import task_runner
from tasks.caching.context import open_run
from tasks.caching.engine import PrefectEngine
from tasks.caching.stage import StageReached
from tasks.reading.sources import locate_source


@flow(task_runner=task_runner())
def read(sources: list[str]) -> None:
    recipe = build_recipe({"name": "shards", "ingest": {"sources": sources}})
    with open_run(recipe.name, {}, until="ingest", engine=PrefectEngine()) as record, suppress(StageReached):
        read_products(locate_source(recipe.ingest.sources), recipe.ingest)
        raise AssertionError("a run that ends with ingest went on")
    stages = [(stage["name"], stage["state"]) for stage in record.stages]
    print(json.dumps({"stages": stages, "digest": record.stages[-1]["digest"]}))


if __name__ == "__main__":
    read(sys.argv[1:])
