"""A golden file changes only by the flag that says so, and the change is printed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

CHECK = 'def test_it(golden):\n    golden("rows.json", "[1]\\n")\n'


def run_pytest(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", directory / "tests", *flags]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_a_golden_file_changes_only_by_its_flag(tmp_path: Path) -> None:
    (tmp_path / "tests" / "golden").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "tests")
    (tmp_path / "tests" / "test_rows.py").write_text(CHECK)
    kept = tmp_path / "tests" / "golden" / "rows.json"
    kept.write_text("[0]\n")
    refused = run_pytest(tmp_path)
    assert refused.returncode == 1
    assert "tests/golden/rows.json differs; if that is meant, run pytest --update-golden" in refused.stdout
    assert kept.read_text() == "[0]\n"
    updated = run_pytest(tmp_path, "--update-golden")
    assert updated.returncode == 0
    assert "--- golden/rows.json\n+++ now\n@@ -1 +1 @@\n-[0]\n+[1]\n" in updated.stdout
    assert kept.read_text() == "[1]\n"
