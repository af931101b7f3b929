"""SIGKILL at any moment: the next run completes, finished stages stay cached, the bytes are an undisturbed run's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkout import PROJECT
from conftest import Tiny
from flows.cache import collect

PROGRAM = Path(__file__).with_name("data_stages.py")
LINGER = """    import time

    time.sleep(float(os.environ.get("LINGER_SECONDS", "0")))
    files = _listing(draft.path)
"""
"""Keeps a written draft unpublished for a while, so that a kill can meet it. The store is outside every stage's code."""


def killed_when(process: subprocess.Popen[bytes], happened, generator: random.Random, spread_seconds: float) -> bool:
    """SIGKILL a process at a random moment after something happened; False when it ended before."""
    while process.poll() is None:
        if happened():
            time.sleep(generator.uniform(0, spread_seconds))
            process.send_signal(signal.SIGKILL)
            process.wait()
            return process.returncode == -signal.SIGKILL
        time.sleep(0.002)
    return False


def started(program: list[str], home: Path, **env: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "AMAZON_FT_HOME": str(home), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, *program], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


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
    """Every artifact's files but the training's log, which holds measured times."""
    files = (file for file in (home / "artifacts").rglob("*") if file.is_file())
    return {str(file.relative_to(home)): file.read_bytes() for file in files if "training-log" not in file.parts}


@pytest.mark.slow
def test_ten_kills_through_the_flow(fresh: Tiny, finished: Tiny) -> None:
    fresh.checkout.edit("tasks/store.py", "    files = _listing(draft.path)\n", LINGER)
    generator, home, kills = random.Random(3), fresh.home, list[list[str]]()
    command = ["-m", "flows.cli", "run", str(fresh.recipe)]
    env = {"PYTHONPATH": str(fresh.checkout.path), "LINGER_SECONDS": "0.4"}
    for _ in range(14):
        process = started(command, home, **env)
        seen = set(kinds for kill in kills for kinds in kill)
        again = generator.random() < 0.4
        if killed_when(process, lambda: written(home) and (again or set(written(home)) - seen), generator, 0.3):
            kills.append(written(home))
        if len(kills) == 10:
            break
    assert len(kills) == 10
    steps = fresh.plan()
    cached = [name for name, step in steps.items() if step["state"] == "cached"]
    entries = fresh.ran()
    assert [name for name in cached if entries[name]["state"] != "cached"] == []
    assert_undisturbed(fresh, finished)


def assert_undisturbed(killed: Tiny, undisturbed: Tiny) -> None:
    collect_in(killed.home)
    expected = {name: content for name, content in contents(undisturbed.home).items() if "/save/" not in name}
    assert {name: content for name, content in contents(killed.home).items() if "/save/" not in name} == expected
    for folder in ("drafts", "trash"):
        assert not [*(killed.home / folder).glob("*")]
    assert not [*(killed.home / "runs").glob("*.lock")]


def collect_in(home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMAZON_FT_HOME", str(home))
        collect(keep_last=1, age_seconds=0)


@pytest.mark.slow
def test_fifty_kills_of_the_bare_stages(fresh: Tiny, tmp_path: Path) -> None:
    generator, kills = random.Random(5), 0
    here, home = {"PYTHONPATH": str(PROJECT)}, tmp_path / "home"
    for _ in range(80):
        process = started([str(PROGRAM), str(fresh.recipe)], home, **here)
        kills += killed_when(process, lambda: bool(written(home)), generator, 0.15)
        if kills == 50:
            break
    assert kills == 50
    subprocess.run(
        [sys.executable, str(PROGRAM), str(fresh.recipe)],
        env={**os.environ, **here, "AMAZON_FT_HOME": str(home)},
        check=True,
        capture_output=True,
    )
    quiet = tmp_path / "quiet"
    subprocess.run(
        [sys.executable, str(PROGRAM), str(fresh.recipe)],
        env={**os.environ, **here, "AMAZON_FT_HOME": str(quiet)},
        check=True,
        capture_output=True,
    )
    assert contents(home) == contents(quiet)
    collect_in(home)
    assert not [*(home / "drafts").glob("*")]
