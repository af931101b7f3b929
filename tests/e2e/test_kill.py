"""Killed or told to end at any moment: the next run completes, finished stages stay cached, the bytes are the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from flows.running.garbage import collect
from tasks.caching.manifest import MANIFEST
from tests.e2e.served import until
from tests.e2e.tiny_runs import Tiny
from tests.support.checkout import PROJECT
from tests.support.forked import Forked

TELLS_OF_THE_RUN = (MANIFEST, "README.md", "lineage.json", "recipe.yaml")
PROGRAM, WHOLE_RUN = (Path(__file__).with_name(name) for name in ("data_stages.py", "whole_run.py"))
SIGNALS, MANY_SIGNALS = 6, 200
HOW = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def killed_when(process: Forked, happened: Callable[[], bool], generator: random.Random, spread_seconds: float) -> bool:
    """SIGKILL a process at a random moment after something happened; False when it ended before."""
    while process.poll() is None:
        if happened():
            time.sleep(generator.uniform(0, spread_seconds))
            process.send_signal(signal.SIGKILL)
            process.wait()
            return process.returncode == -signal.SIGKILL
        time.sleep(0.002)
    return False


def started(program: list[str], home: Path, checkout: Path) -> Forked:
    """A Python program of a checkout; its directory comes first wherever Python looks for modules."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "AMAZON_FT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return Forked(program, env=environment | {"LINGER_SECONDS": "0.4"}, cwd=checkout)


def written(home: Path) -> list[str]:
    """Kinds of the drafts that hold a byte."""
    kinds = []
    for path in (home / "drafts").glob("*-*"):
        try:
            if path.is_dir() and any(file.stat().st_size for file in path.rglob("*") if file.is_file()):
                kinds.append(path.name.rpartition("-")[0])
        except FileNotFoundError:
            continue
    return kinds


def contents(home: Path) -> dict[str, bytes]:
    """Every artifact's files by kind, digest and name.

    Left out are the training's log, which holds measured times, and of the saved model, which is named without its digest,
    the files that tell of the run: paths, times.
    """
    files: dict[str, bytes] = {}
    for file in (path for path in (home / "artifacts").rglob("*") if path.is_file()):
        kind, digest, *name = file.relative_to(home / "artifacts").parts
        if kind == "saved-model":
            digest = "-"
        if kind != "training-log" and not (kind == "saved-model" and file.name in TELLS_OF_THE_RUN):
            files["/".join((kind, digest, *name))] = file.read_bytes()
    return files


TARGETS = (
    "products",
    "rejects",
    "sample",
    "conversations",
    "texts",
    "tokens",
    "checkpoint",
    "adapter",
    "baseline",
    "evaluation",
    "saved-model",
)
"""What each stage writes first, in the order of the stages."""


def is_being_written(home: Path, kind: str) -> bool:
    if kind == "checkpoint":
        return any(file.stat().st_size for file in (home / "work").glob("*/checkpoint-*/*"))
    return kind in written(home)


@pytest.mark.slow("eleven runs, each killed in another stage")
def test_ten_kills_through_the_flow(fresh: Tiny, finished: Tiny) -> None:
    fresh.let_drafts_linger()
    generator, home = random.Random(3), fresh.home
    command = ["-m", "flows.cli", "run", str(fresh.recipe)]
    missed = [
        kind
        for kind in TARGETS
        if not killed_when(started(command, home, fresh.checkout.path), partial(is_being_written, home, kind), generator, 0.3)
    ]
    assert missed == []
    cached = [name for name, step in fresh.plan().items() if step["state"] == "cached"]
    entries = fresh.ran()
    assert {entries[name]["state"] for name in cached} == {"cached"}
    collect_in(home)
    assert contents(home) == contents(finished.home)
    assert_no_leftovers(home)


def assert_no_leftovers(home: Path) -> None:
    for folder in ("drafts", "trash"):
        assert not [*(home / folder).glob("*")]
    assert not [*home.glob("runs/*.lock"), *home.glob("work/*.lock")]


def collect_in(home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMAZON_FT_HOME", str(home))
        collect(keep_last=1, age_seconds=0)


@pytest.mark.slow("fifty processes")
def test_fifty_kills_of_the_bare_stages(fresh: Tiny, tmp_path: Path) -> None:
    generator, kills = random.Random(5), 0
    home = tmp_path / "home"
    for _ in range(80):
        process = started([str(PROGRAM), str(fresh.recipe)], home, PROJECT)
        kills += killed_when(process, lambda: bool(written(home)), generator, 0.15)
        if kills == 50:
            break
    assert kills == 50
    quiet = tmp_path / "quiet"
    for root in (home, quiet):
        assert started([str(PROGRAM), str(fresh.recipe)], root, PROJECT).wait() == 0
    assert contents(home) == contents(quiet)
    collect_in(home)
    assert_no_leftovers(home)


@pytest.mark.slow("a training again and again")
def test_a_signal_at_any_moment_of_a_whole_run_loses_nothing(fresh: Tiny, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Roots that came to their end are compared, and the next begins from nothing."""
    generator, ended = random.Random(9), Counter[str]()
    program = [str(WHOLE_RUN), str(fresh.recipe)]
    undisturbed = begun(started(program, tmp_path / "quiet", PROJECT))
    since = time.monotonic()
    assert undisturbed.wait() == 0
    seconds, quiet = time.monotonic() - since, contents(tmp_path / "quiet")
    home = tmp_path / "home"
    while ended.total() < (MANY_SIGNALS if request.config.getoption("--many") else SIGNALS):
        process = begun(started(program, home, PROJECT))
        how = min(HOW, key=lambda number: ended[number.name])
        time.sleep(generator.uniform(0, seconds))
        process.send_signal(how)
        if process.wait() in (-how, 128 + how):
            ended[how.name] += 1
            continue
        assert process.returncode == 0, process.stderr
        assert_as_undisturbed(home, quiet)
        shutil.rmtree(home)
    assert started(program, home, PROJECT).wait() == 0
    assert_as_undisturbed(home, quiet)


def begun(process: Forked) -> Forked:
    """The same once it runs what it was started for."""
    until(lambda: process.stdout or process.poll() is not None)
    return process


def assert_as_undisturbed(home: Path, quiet: dict[str, bytes]) -> None:
    """The same bytes, and nothing else once gc has gone over it."""
    collect_in(home)
    assert contents(home) == quiet
    assert_no_leftovers(home)
    assert [path for path in home.rglob("*") if path.name.startswith(".")] == []
