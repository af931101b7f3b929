"""The commands as a shell starts them: elsewhere than the run was, and with a log in the place of a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.running.quiet import SWITCHES
from tests.e2e.tiny_runs import Tiny, make_tiny
from tests.support import forked
from tests.support.checkout import PROJECT

pytestmark = pytest.mark.heavy


@dataclass(frozen=True)
class Ended:
    """A process that came to its end, and what it left on stderr, a file."""

    code: int
    log: str


def start(tiny: Tiny, directory: Path, python: Sequence[str]) -> Ended:
    """`python ...` in a directory, with the root of the tiny run, and nobody watching."""
    env = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    own = {"AMAZON_FT_HOME": str(tiny.home), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    with (directory / "log").open("w+", newline="") as log:
        done = subprocess.run(
            [sys.executable, *python], cwd=directory, env=env | own, stdout=subprocess.DEVNULL, stderr=log, check=False
        )
        log.seek(0)
        return Ended(done.returncode, log.read())


def amazon_ft(tiny: Tiny, directory: Path, *words: str) -> Ended:
    ended = start(tiny, directory, ["-m", "flows.cli", *words])
    assert ended.code == 0, ended.log
    return ended


def has_bars(log: str) -> bool:
    return "%|" in log or "\r" in log


@pytest.fixture(scope="module")
def tiny(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("processes") / "tiny")


@pytest.fixture(scope="module")
def ran(tiny: Tiny) -> Ended:
    """A run of a recipe whose base model is `model`, beside it."""
    return amazon_ft(tiny, tiny.home.parent, "run", "tiny.yaml", "--set", "model.id=model")


def test_the_log_of_a_run_has_no_bars(ran: Ended) -> None:
    assert "finetune completed" in ran.log
    assert not has_bars(ran.log), ran.log
    assert "Loading weights" not in ran.log


def test_a_base_model_named_relative_to_the_run_is_found_from_elsewhere(tiny: Tiny, ran: Ended, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()  # another of that name, and no model
    env = os.environ | {"AMAZON_FT_HOME": str(tiny.home), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    words = ["ask", "tiny", "--title", "Chaleira", "--max-new-tokens", "2"]
    ended = forked.run(["-m", "flows.cli", *words], cwd=tmp_path, env=env)
    assert ended.returncode == 0, ended.stderr


def test_the_log_of_an_export_has_no_bars(tiny: Tiny, ran: Ended, tmp_path: Path) -> None:
    ended = amazon_ft(tiny, tiny.home.parent, "export", "tiny", str(tmp_path / "out"), "--format", "gguf")
    assert (tmp_path / "out" / "model.gguf").is_file()
    assert not has_bars(ended.log), ended.log
