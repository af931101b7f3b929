"""Two runs at once on one root: both right, nothing corrupt, nothing trained twice."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from tasks.caching import store
from tasks.caching.manifest import MANIFEST
from tasks.refs import Artifact
from tests.e2e.served import until
from tests.e2e.tiny_runs import Tiny
from tests.support.forked import Forked


def start(tiny: Tiny, *settings: str, **env: str) -> Forked:
    arguments = [word for setting in settings for word in ("--set", setting)]
    return Forked(
        ["-m", "flows.cli", "run", tiny.recipe, "--json", *arguments],
        cwd=tiny.checkout.path,
        env=os.environ | env | {"PYTHONPATH": str(tiny.checkout.path), "AMAZON_FT_HOME": str(tiny.home), "OMP_NUM_THREADS": "1"},
    )


def ends(process: Forked) -> tuple[dict[str, str], str]:
    """{stage: digest} of a run that came to its end, and what it said."""
    assert process.wait() == 0, process.stderr[-3000:]
    return {stage["name"]: stage["digest"] for stage in json.loads(process.stdout.splitlines()[-1])["stages"]}, process.stderr


def waits_to_train(said: str) -> bool:
    return "finetune waits: process" in " ".join(said.split())


def all_intact(home: Path, monkeypatch) -> bool:
    monkeypatch.setenv("AMAZON_FT_HOME", str(home))
    for path in (home / "artifacts").glob("*/*"):
        digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
        store.verify(Artifact(kind=path.parent.name, digest=digest))
    return not [*(home / "drafts").glob("*")]


@pytest.mark.slow("two runs at once, and one more")
def test_same_recipe_twice_at_once_trains_once(fresh: Tiny, finished: Tiny, tmp_path: Path, monkeypatch) -> None:
    fresh.let_drafts_linger()
    held = tmp_path / "held"
    held.touch()
    both = [start(fresh, LINGER_WHILE=str(held)) for _ in range(2)]
    until(lambda: any(waits_to_train(process.stderr) for process in both))
    held.unlink()
    (first, first_said), (second, second_said) = map(ends, both)
    alone = {name: stage["digest"] for name, stage in finished.ran().items()}
    for told in (first, second):  # save tells of the run, too
        assert {name for name in alone if told[name] != alone[name]} <= {"save"}
    waiting = [said for said in (first_said, second_said) if waits_to_train(said)]
    assert len(waiting) == 1
    assert any(f"process {process.pid}" in " ".join(waiting[0].split()) for process in both)
    assert all_intact(fresh.home, monkeypatch)


@pytest.mark.slow("two runs at once, and one more")
def test_different_recipes_at_once_are_both_right(fresh: Tiny, finished: Tiny, monkeypatch) -> None:
    settings = ("sample.seed=7", "finetune.learning_rate=2e-3")
    (plain, _), (changed, _) = map(ends, [start(fresh), start(fresh, *settings)])
    alone = finished.ran()
    assert {name for name in plain if plain[name] != alone[name]["digest"]} <= {"save"}
    assert {name for name in plain if plain[name] == changed[name]} == {"ingest", "baseline"}  # held-out rows are as before
    assert ends(start(fresh, *settings))[0] == changed
    assert all_intact(fresh.home, monkeypatch)
