"""gc removes what nothing refers to, and never what a kept or a living run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.running.garbage import collect, inventory, parse_age
from tasks.caching import locks, runs, store
from tasks.caching.context import open_run
from tasks.config import PROMOTED, SampleConfig
from tasks.refs import Artifact, ConfigError, InputError
from tests.support import toy


def made_by_a_run(text: str, recipe: str = "toy") -> Artifact:
    with open_run(recipe, {}) as run:
        artifact = toy.read.fn(text, SampleConfig(rows=1)).data
        run.stages.append({"name": "read", "key": text * 64, "digest": artifact.digest})
    return artifact


def test_last_run_of_each_recipe_is_kept() -> None:
    old, new, other = made_by_a_run("a"), made_by_a_run("b"), made_by_a_run("c", recipe="other")
    removed = collect(keep_last=1, age_seconds=0)
    assert [entry.path for entry in removed] == [f"artifacts/products/{old.digest[:32]}"]
    store.verify(new)
    store.verify(other)


def test_keep_last_counts_finished_runs() -> None:
    finished = made_by_a_run("a")
    with pytest.raises(ValueError, match="broken"), open_run("toy", {}):
        tried = toy.read.fn("b", SampleConfig(rows=1)).data
        raise ValueError("broken")
    assert collect(keep_last=1, age_seconds=0) == []
    store.verify(finished)
    store.verify(tried)


@pytest.mark.parametrize("how", [{"parent": "another"}, {"until": "read"}])
def test_what_only_trains_or_ends_early_is_not_the_last_run(how: dict[str, Any]) -> None:
    whole = made_by_a_run("a")
    with open_run("toy", {}, **how):
        part = toy.read.fn("b", SampleConfig(rows=1)).data
    assert collect(keep_last=1, age_seconds=0) == []
    store.verify(whole)
    store.verify(part)


def test_a_copy_that_is_being_merged_is_kept(home: Path) -> None:
    (home / "served" / "ab" / ".draft").mkdir(parents=True)
    with locks.locked(home / "served" / "ab.lock", remove=True):
        assert [entry.path for entry in collect(keep_last=1, age_seconds=0)] == []
    assert [entry.path for entry in collect(keep_last=1, age_seconds=0)] == ["served/ab"]


@pytest.mark.parametrize("folder", ["drafts", "served", "work"])
def test_what_is_taken_hold_of_after_gc_has_looked_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    (home / folder / "ab").mkdir(parents=True)
    monkeypatch.setattr(locks, "is_locked", lambda _: False)
    with locks.locked(home / folder / "ab.lock", remove=True):
        assert collect(keep_last=1, age_seconds=0) == []
        assert sorted(path.name for path in (home / folder).iterdir()) == ["ab", "ab.lock"]


def test_a_lock_file_is_removed_only_by_who_holds_it(home: Path) -> None:
    (home / "work").mkdir(parents=True)
    (home / "work" / "dead.lock").touch()
    assert [entry.path for entry in collect(keep_last=1, age_seconds=0)] == ["work/dead.lock"]
    assert not list((home / "work").iterdir())


def test_dry_run_only_says() -> None:
    old = made_by_a_run("a")
    made_by_a_run("b")
    assert len(collect(keep_last=1, age_seconds=0, dry_run=True)) == 1
    store.verify(old)


def test_living_run_keeps_what_it_uses() -> None:
    with open_run("toy", {}):
        artifact = toy.read.fn("a", SampleConfig(rows=1)).data
        assert collect(keep_last=0, age_seconds=0) == []
        store.verify(artifact)
    assert len(collect(keep_last=0, age_seconds=0)) == 1


def test_promoted_model_is_kept_with_all_that_its_run_used(home: Path) -> None:
    with open_run("toy", {}):
        data, model = toy.read.fn("a", SampleConfig(rows=1)).data, toy.read.fn("model", SampleConfig(rows=1)).data
    (home / "models" / "toy").mkdir(parents=True)
    (home / "models" / "toy" / PROMOTED).symlink_to(f"../../artifacts/products/{model.digest[:32]}")
    later = made_by_a_run("b")
    made_by_a_run("c")
    assert [entry.path for entry in collect(keep_last=1, age_seconds=0)] == [f"artifacts/products/{later.digest[:32]}"]
    store.verify(data)
    store.verify(model)


def test_young_runs_are_kept_by_age() -> None:
    old = made_by_a_run("a")
    made_by_a_run("b")
    assert collect(keep_last=1, age_seconds=3600) == []
    store.verify(old)


def test_record_of_a_dropped_run_goes_and_others_stay(home: Path) -> None:
    made_by_a_run("a")
    made_by_a_run("b")
    (home / "records").mkdir()
    for text in "ab":
        (home / "records" / (text * 64)).write_text("{}")
    collect(keep_last=1, age_seconds=0)
    assert [path.name for path in (home / "records").iterdir()] == ["b" * 64]
    assert len(runs.past_runs()) == 1


def test_leftovers_of_killed_writers_go(home: Path) -> None:
    made_by_a_run("a")
    (home / "drafts" / "products-dead").mkdir(parents=True)
    (home / "drafts" / "products-dead.lock").touch()
    (home / "runs" / "dead.lock").touch()
    (home / "runs" / ".half.json").touch()
    collect(keep_last=1, age_seconds=0)
    assert list((home / "drafts").iterdir()) == []
    assert [path.suffix for path in (home / "runs").iterdir()] == [".json"]
    assert not list((home / "trash").iterdir())


@pytest.mark.parametrize("folder", ["records", "runs"])
def test_what_a_living_run_is_writing_is_kept(home: Path, folder: str) -> None:
    with open_run("toy", {}):
        (home / folder).mkdir(exist_ok=True)
        (home / folder / ".half.json").touch()
        assert collect(keep_last=1, age_seconds=0) == []
        assert (home / folder / ".half.json").exists()
    assert [entry.path for entry in collect(keep_last=1, age_seconds=0)] == [f"{folder}/.half.json"]


def test_a_record_that_a_living_run_wrote_while_gc_looked_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "records").mkdir(parents=True)
    past_runs = runs.past_runs

    def look() -> list[dict[str, Any]]:
        found = past_runs()
        (home / "records" / ("k" * 64)).touch()
        return found

    monkeypatch.setattr(runs, "past_runs", look)
    collect(keep_last=1, age_seconds=0)
    assert (home / "records" / ("k" * 64)).exists()


def test_a_root_that_may_only_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMAZON_FT_HOME", "/proc/amazon-ft")
    with pytest.raises(InputError, match=r"^AMAZON_FT_HOME: /proc/amazon-ft: .*; expected a directory to write to"):
        collect(keep_last=1, age_seconds=0)


def test_work_of_a_running_training_is_kept(home: Path) -> None:
    with locks.work_directory("k" * 64):
        assert collect(keep_last=0, age_seconds=0) == []
    collect(keep_last=0, age_seconds=0)
    assert not list((home / "work").iterdir())


def test_inventory_tells_sizes_and_references() -> None:
    artifact = made_by_a_run("a")
    (entry,) = inventory()
    assert entry.path == f"artifacts/products/{artifact.digest[:32]}"
    assert entry.size_bytes == sum(file.stat().st_size for file in artifact.path.iterdir())
    assert len(entry.runs) == 1


@pytest.mark.parametrize("text", ["7", "d", "7 days", "-1d"])
def test_age_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a number and m, h, d or w, such as 12h or 7d"):
        parse_age(text)
