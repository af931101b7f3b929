"""A full disk in any stage: a clear error, no half artifact, and the rerun works once there is space."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from flows import pipeline
from flows.recipes import load_recipe
from flows.running import dispatch
from tasks.caching.stage import Stage
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


def test_every_stage_survives_a_full_disk(fresh: Tiny, small_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: dict[str, str] = {}

    def execute_twice(stage: Stage[..., Any], inputs: Mapping[str, Any]) -> Any:
        kept = sorted((small_home / "artifacts").glob("*/*"))
        ballast = fill(small_home.parent)
        with pytest.raises(NoSpaceError) as caught:
            stage.execute(inputs)
        failures[stage.name] = str(caught.value)
        assert sorted((small_home / "artifacts").glob("*/*")) == kept
        assert not [*(small_home / "drafts").glob("*")]
        ballast.unlink()
        return stage.execute(inputs)

    small_home.mkdir(parents=True)
    monkeypatch.setattr(Stage, "_run", execute_twice)
    monkeypatch.setattr(pipeline, "tune", dispatch.finetune_and_evaluate)
    pipeline.pipeline(load_recipe(str(fresh.recipe)))
    assert list(failures) == ["ingest", "sample", "sharegpt", "template", "tokenize", "finetune", "baseline", "evaluate", "save"]
    for message in failures.values():
        assert re.match(
            rf"{small_home}\S*: no space left on the device: needs at least [\d,]+ bytes, [\d,]+ were free\.", message
        )
