"""A copy of the project's code that a test may edit, run as its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Checkout:
    """flows/, tasks/ and deployments/ under a directory of the test."""

    path: Path

    @classmethod
    def copy_to(cls, path: Path) -> Checkout:
        for name in ("flows", "tasks", "deployments"):
            shutil.copytree(PROJECT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        return cls(path)

    def edit(self, file: str, before: str, after: str) -> None:
        """Replace text that must be there."""
        path = self.path / file
        text = path.read_text()
        assert before in text, f"{file} has no {before!r}"
        path.write_text(text.replace(before, after, 1))

    def append(self, file: str, text: str) -> None:
        path = self.path / file
        path.write_text(path.read_text() + text)

    def run(
        self, *arguments: str, python: str = sys.executable, check: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS` in the copy."""
        result = subprocess.run(
            [python, *arguments],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": str(self.path), "PYTHONDONTWRITEBYTECODE": "1", **env},
            capture_output=True,
            text=True,
        )
        assert not check or result.returncode == 0, result.stderr[-4000:]
        return result

    def amazon_ft(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """The command line of the copy."""
        return self.run("-m", "flows.cli", *arguments, **options)

    def plan(self, *arguments: str, **options: Any) -> dict[str, dict[str, Any]]:
        """{stage: step} of `amazon-ft plan`."""
        output = self.amazon_ft("plan", *arguments, "--json", **options).stdout
        return {step["name"]: step for step in json.loads(output)["stages"]}
