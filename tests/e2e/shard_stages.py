"""Read a recipe's files in a flow that ends with `ingest`; print each stage call with its state, and the last digest."""

from __future__ import annotations

import json
import sys
from contextlib import suppress

from prefect import flow

from flows.recipes import build_recipe
from flows.running.shards import read_products, task_runner
from tasks.caching.runs import run_record
from tasks.caching.stage import StageReached, ending_with
from tasks.ingest import locate_source


@flow(task_runner=task_runner())
def read(sources: list[str]) -> None:
    recipe = build_recipe({"name": "shards", "ingest": {"sources": sources}})
    with run_record(recipe.name, {}) as record, ending_with("ingest"), suppress(StageReached):
        read_products(locate_source(recipe.ingest.sources), recipe.ingest)
        raise AssertionError("a run that ends with ingest went on")
    stages = [(stage["name"], stage["state"]) for stage in record.stages]
    print(json.dumps({"stages": stages, "digest": record.stages[-1]["digest"]}))


if __name__ == "__main__":
    read(sys.argv[1:])
