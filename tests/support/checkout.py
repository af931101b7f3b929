"""A copy of the project's code that a test may edit, run as its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.support import forked

PROJECT = Path(__file__).parents[2]


class Ended(Protocol):
    """A process that came to its end."""

    @property
    def returncode(self) -> int | None: ...
    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...


def run_cold(arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in a process of its own."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Checkout:
    """flows/, tasks/ and deployments/ under a directory of the test."""

    path: Path

    @classmethod
    def copy_to(cls, path: Path) -> Checkout:
        for name in ("flows", "tasks", "deployments"):
            shutil.copytree(PROJECT / name, path / name)  # bytecode goes with it: it holds for what is not edited
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

    def run(self, *arguments: str, check: bool = True, cold: bool = False, **env: str) -> Ended:
        """`python ARGUMENTS` in the copy, by a process that has the libraries imported, or a cold one."""
        environment = {**os.environ, "PYTHONPATH": str(self.path), "PYTHONDONTWRITEBYTECODE": "1", **env}
        start = run_cold if cold else forked.run
        ended = start(arguments, cwd=self.path, env=environment)
        assert not check or ended.returncode == 0, ended.stderr[-4000:]
        return ended

    def amazon_ft(self, *arguments: str, **options: Any) -> Ended:
        """The command line of the copy."""
        return self.run("-m", "flows.cli", *arguments, **options)

    def plan(self, *arguments: str, **options: Any) -> dict[str, dict[str, Any]]:
        """{stage: step} of `amazon-ft plan`."""
        output = self.amazon_ft("plan", *arguments, "--json", **options).stdout
        return {step["name"]: step for step in json.loads(output)["stages"]}
