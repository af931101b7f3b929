"""What runs is what was digested, whatever is edited meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.checkout import Checkout

pytestmark = pytest.mark.heavy

LATE = """
from pathlib import Path
import tasks.finetune
hf = Path("tasks/training/hf.py")
{change}
from tasks.training import hf
from tasks.caching.identity import code_digests
print(hasattr(hf, "ADDED"), code_digests(["tasks.training.hf"])["tasks.training.hf"])
"""
RATE = "from tasks.caching.identity import code_digests; from tasks.helper import RATE; print(RATE)"
NOT_COMPILED = "import builtins; from tasks.caching import identity; builtins.compile = None; from tasks import helper"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout.copy_to(tmp_path / "checkout")


@pytest.mark.parametrize("change", ["hf.write_text(hf.read_text() + '\\nADDED = 1\\n')", "hf.unlink()"])
def test_what_is_imported_after_an_edit_is_what_was_digested_before_it(checkout: Checkout, change: str) -> None:
    _, before = checkout.run("-c", LATE.format(change="")).stdout.split()
    assert checkout.run("-c", LATE.format(change=change)).stdout.split() == ["False", before]


def write_helper(checkout: Checkout, text: str) -> Path:
    file = checkout.path / "tasks" / "helper.py"
    file.write_text(text)
    os.utime(file, (1, 1))
    return file


def test_bytecode_of_an_edit_that_kept_size_and_time_is_not_run(checkout: Checkout) -> None:
    for rate in "12":
        write_helper(checkout, f"RATE = {rate}\n")
        assert checkout.run("-c", RATE, PYTHONDONTWRITEBYTECODE="").stdout == f"{rate}\n"


def test_bytecode_that_is_younger_than_its_source_saves_compiling(checkout: Checkout) -> None:
    write_helper(checkout, "RATE = 1\n")
    checkout.run("-c", RATE, PYTHONDONTWRITEBYTECODE="")
    checkout.run("-c", NOT_COMPILED)
