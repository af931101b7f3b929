"""Loading of our modules from the bytes that their digests are taken of, so that no edit while a run lives comes between.

A file is read once in a process, when its module is imported or its digest is asked for, whichever is first: what a stage
imports hours later is what its key was made of. Source: the hooks of importlib,
https://docs.python.org/3/reference/import.html#import-hooks
"""

from __future__ import annotations

import gc
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

FIRST_PARTY = ("tasks", "flows")


class Read(NamedTuple):
    """A file as it was when it was read."""

    content: bytes
    stat: os.stat_result


@cache
def read_once(path: str) -> Read:
    """Read a file, once in a process.

    Raises:
        OSError: when it can't be read.
    """
    with Path(path).open("rb") as file:
        return Read(file.read(), os.fstat(file.fileno()))


class LoaderOfRead(SourceFileLoader):
    """Loads a module from what was read of its file; from bytecode only where that is younger."""

    def get_data(self, path: str) -> bytes:
        """The source as it was read, or bytecode.

        Python takes bytecode for that of a source of equal size and time, which an edit may keep; it can't keep the ctime.
        """
        source = read_once(self.path)
        if path == self.path:
            return source.content
        if os.stat(path).st_ctime_ns <= source.stat.st_ctime_ns:  # noqa: PTH116  # importlib's own paths are texts
            raise OSError(f"{path} is older than {self.path}")
        return super().get_data(path)

    def path_stats(self, path: str) -> dict[str, Any]:
        """Size and time of the source as it was read."""
        stat = read_once(path).stat
        return {"mtime": stat.st_mtime, "size": stat.st_size}


class FinderOfRead(MetaPathFinder):
    """Finds our modules where they were first found."""

    def __init__(self) -> None:
        self._found: dict[str, ModuleSpec] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None, _: ModuleType | None = None) -> ModuleSpec | None:
        """Where a module of ours is; None for another's."""
        if fullname not in self._found and fullname.partition(".")[0] in FIRST_PARTY:
            spec = PathFinder.find_spec(fullname, path)
            if spec is not None and spec.origin is not None and isinstance(spec.loader, SourceFileLoader):
                spec.loader = LoaderOfRead(fullname, spec.origin)
                self._found[fullname] = spec
        return self._found.get(fullname)


def collect_rarely() -> None:
    """Let a process look for garbage in all that is old a tenth as often as Python does.

    While torch and transformers are imported, it would go over the modules that are there again and again (tests/bench/LOG.md).
    """
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 100)


def process_of(module: str, function: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of another process that calls a function of ours, whatever lies where this one was started."""
    paths = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    code = f"from {__name__} import {load_what_was_read.__name__} as load; load(); from {module} import {function} as run; run()"
    return [sys.executable, "-P", "-c", code], os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def imported_code() -> dict[str, str]:
    """{path: SHA-256} of the modules of ours that this process has imported."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in FIRST_PARTY]
    paths = [path for module in modules if (path := getattr(module, "__file__", None))]
    return {path: _code_digest(path) for path in paths}


def is_as_read(code: Mapping[str, str]) -> bool:
    """Whether the code that another process has imported is what was read here."""
    return all(_code_digest(path) == digest for path, digest in code.items())


def _code_digest(path: str) -> str:
    return hashlib.sha256(read_once(path).content).hexdigest()


def load_what_was_read() -> None:
    """Let all modules of ours be loaded so that are not yet imported."""
    if not any(isinstance(finder, FinderOfRead) for finder in sys.meta_path):
        sys.meta_path.insert(0, FinderOfRead())
