"""A full disk in any stage: a clear error, no half artifact, and the rerun works once there is space."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flows.pipeline import pipeline
from flows.recipes import load_recipe
from tasks.caching.context import within
from tasks.caching.stage import Call, Made, Stage
from tasks.refs import NoSpaceError
from tests.e2e.tiny_runs import Tiny

DISK_MIB = 192
ROOM_BYTES = 1024
"""Left free for a stage: enough to begin, too little to end."""


@pytest.fixture
def small_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """AMAZON_FT_HOME on a file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    monkeypatch.setenv("AMAZON_FT_HOME", str(disk / "home"))
    yield disk / "home"
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all but a little of the space."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            file.truncate(file.tell() - ROOM_BYTES)
    return ballast


class Twice:
    """An engine that runs each stage on a full disk first."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.failures: dict[str, str] = {}

    def start(self, stage: Stage[..., Any], calls: Sequence[Call[Any]]) -> list[Callable[[], Made[Any]]]:
        return [partial(self.execute_twice, stage, call) for call in calls]

    def execute_twice(self, stage: Stage[..., Any], call: Call[Any]) -> Made[Any]:
        kept = sorted((self.home / "artifacts").glob("*/*"))
        ballast = fill(self.home.parent)
        with pytest.raises(NoSpaceError) as caught:
            stage.execute(call.inputs)
        self.failures[stage.name] = str(caught.value)
        assert sorted((self.home / "artifacts").glob("*/*")) == kept
        assert not [*(self.home / "drafts").glob("*")]
        ballast.unlink()
        return stage.make(call.inputs, call.code)


@pytest.mark.slow("each stage twice")
def test_every_stage_survives_a_full_disk(fresh: Tiny, small_home: Path) -> None:
    small_home.mkdir(parents=True)
    engine = Twice(small_home)
    with within(engine=engine):
        pipeline(load_recipe(str(fresh.recipe)))
    stages = ["ingest", "sample", "sharegpt", "template", "tokenize", "finetune", "baseline", "evaluate", "save"]
    assert list(engine.failures) == stages
    for message in engine.failures.values():
        assert re.match(
            rf"{small_home}\S*: no space left on the device: needs at least [\d,]+ bytes, [\d,]+ were free\.", message
        )
