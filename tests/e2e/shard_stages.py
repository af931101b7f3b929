"""Run the reading stage of a recipe's files inside a flow; print each stage call, its state, and the process that ran it."""

from __future__ import annotations

import json
import sys

from prefect import flow

from flows.recipes import build_recipe
from flows.shards import read_products, task_runner
from tasks.ingest import locate_source
from tasks.runs import run_record


@flow(task_runner=task_runner())
def read(sources: list[str]) -> None:
    recipe = build_recipe({"name": "shards", "ingest": {"sources": sources}})
    with run_record(recipe.name, {}) as record:
        products = read_products(locate_source(recipe.ingest.sources), recipe.ingest)
    stages = [(stage["name"], stage["state"]) for stage in record.stages]
    print(json.dumps({"stages": stages, "digest": products.data.digest, "rows": products.data.rows}))


if __name__ == "__main__":
    read(sys.argv[1:])
