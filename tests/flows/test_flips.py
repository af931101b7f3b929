"""One bit of a finished root is flipped: all that is cached, listed, compared or loaded then is what it was, or is not told."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Hashable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flows.models.saved import find_saved, list_saved
from flows.pipeline import plan_run
from flows.recipes import build_recipe
from flows.reports.history import compare_runs, listing
from flows.reports.results import Results
from tasks.caching.runs import past_runs
from tasks.config import Recipe
from tasks.refs import PipelineError
from tests.support.here import run_here
from tests.support.rows import WRITERS
from tests.support.tiny import make_tiny_model
from tests.support.tiny_recipe import TINY

pytestmark = pytest.mark.heavy

FLIPS, MANY_FLIPS = 60, 2_000
FOLDERS = ("records", "artifacts", "runs")
Facts = dict[Hashable, Any]


@pytest.fixture
def recipe(home: Path, tmp_path: Path) -> Recipe:
    """A recipe that has run twice, the second time with another seed of the training."""
    make_tiny_model(tmp_path / "model")
    rows = [{"uid": str(row), "title": f"Chaleira {row}", "content": f"De aço; {row} litros"} for row in range(40)]
    settings = json.loads(json.dumps(TINY)) | {"name": "flipped", "promote": {"enabled": True}}
    settings["model"] |= {"id": str(tmp_path / "model")}
    settings["ingest"] = {"sources": [str(WRITERS["jsonl"](tmp_path / "rows.jsonl", rows))]}
    made = build_recipe(settings)
    run_here(build_recipe(settings, ["finetune.seed=7"]))
    run_here(made)
    return made


def digests(path: Path) -> dict[str, str]:
    """{name: SHA-256} of a directory's files, read anew."""
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def facts(recipe: Recipe) -> Facts:
    """All that is served or told of a root."""
    return dict(_stages(recipe)) | dict(_runs()) | dict(_models(recipe))


def _stages(recipe: Recipe) -> Iterator[tuple[Hashable, Any]]:
    for step in plan_run(recipe).steps:
        if step.state == "cached" and step.artifact is not None:
            yield ("stage", step.name), (step.key, step.rows, digests(step.artifact.path))


def _runs() -> Iterator[tuple[Hashable, Any]]:
    past = past_runs()
    for entry in listing():
        yield from ((("listed", entry["id"], name), value) for name, value in entry.items() if value is not None)
    for run in past:
        results = Results(run)
        told = [results.metrics, results.generations, results.training, results.resolved, results.lengths]
        yield from ((("results", run["id"], number), value) for number, value in enumerate(told) if value)
    for first, second in pairwise(past):
        found = compare_runs(first, second)
        if all(None not in figures for figures in found.metrics) and found.metrics:
            yield ("compared", first["id"]), found


def _models(recipe: Recipe) -> Iterator[tuple[Hashable, Any]]:
    with suppress(PipelineError):
        yield "loaded", digests(find_saved(recipe.name).path)
    for entry in list_saved():
        if entry["base"] is not None:
            yield ("model", entry["model"]), entry


def flip(file: Path, rng: random.Random) -> str:
    """Flip a random bit of a file; says which."""
    data = bytearray(file.read_bytes())
    bit = rng.randrange(len(data) * 8)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    return f"bit {bit} of {file}"


def test_no_flipped_bit_is_served_or_told(recipe: Recipe, home: Path, request: pytest.FixtureRequest) -> None:
    rng = random.Random(11)
    before = facts(recipe)
    kinds = {key[0] if isinstance(key, tuple) else key for key in before}
    assert kinds == {"stage", "listed", "results", "compared", "loaded", "model"}
    found = {folder: sorted((home / folder).rglob("*")) for folder in FOLDERS}
    files = {folder: [path for path in paths if path.is_file() and path.stat().st_size] for folder, paths in found.items()}
    for number in range(MANY_FLIPS if request.config.getoption("--many") else FLIPS):
        file = rng.choice(files[FOLDERS[number % len(FOLDERS)]])
        whole = file.read_bytes()
        where = flip(file, rng)
        now = facts(recipe)
        assert {key: value for key, value in now.items() if before.get(key) != value} == {}, where
        file.write_bytes(whole)
    assert facts(recipe) == before
