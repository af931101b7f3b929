"""The README names every module and every command, and nothing that is not there."""

from __future__ import annotations

import re

import pytest
from typer.main import get_command

from flows.cli.main import app
from tests.support.checkout import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")
TREE = README.split("## Where things are")[1].split("\n## ")[0]


@pytest.mark.parametrize("package", ["flows", "tasks"])
def test_tree_names_every_module_and_no_other(package: str) -> None:
    there = {path.name for path in (PROJECT / package).rglob("*.py")} - {"__init__.py"}
    section = TREE.split(f"    {package}/ ")[1].split("    deployments/" if package == "tasks" else "    tasks/ ")[0]
    assert set(re.findall(r"\b\w+\.py\b", section)) == there


def test_every_link_leads_to_a_file() -> None:
    missing = [link for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README) if not (PROJECT / link).exists()]
    assert missing == []


def test_every_command_is_described() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert [name for name in commands if f"amazon-ft {name}" not in README] == []
