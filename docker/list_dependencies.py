"""The project's dependencies as a requirements file, so that an image can install them before it has the code.

usage: python list_dependencies.py [EXTRA ...]
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def dependencies(project: dict[str, object], extras: list[str]) -> list[str]:
    """Those of the project and of the extras, in the order of pyproject.toml."""
    optional = project["optional-dependencies"]
    assert isinstance(optional, dict)
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]  # type: ignore[misc]


if __name__ == "__main__":
    settings = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    sys.stdout.write("\n".join(dependencies(settings, sys.argv[1:])) + "\n")
