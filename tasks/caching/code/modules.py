"""Modules by their dotted names: their source, as it was when it was first read, and what they import."""

from __future__ import annotations

import ast
import gc
import hashlib
import sysconfig
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import packages_distributions
from importlib.util import decode_source, find_spec

from tasks.caching.code.loading import FIRST_PARTY, load_what_was_read, read_once
from tasks.caching.code.reach import refusals
from tasks.caching.code.syntax import Syntax
from tasks.refs import PipelineError

PARSE_ATTEMPTS = 5
"""Python 3.11 counts the depth of all threads' parsing together, so that one fails now and then where another parses too
(`AST constructor recursion depth mismatch`). Source: https://github.com/python/cpython/issues/106905."""
INSTALLED = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class Module:
    """The code of a module."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = _source(name)
        self._syntax = Syntax(_parse(self.source), name if has_modules(name) else name.rpartition(".")[0])

    @cached_property
    def imports(self) -> list[str]:
        """First-party modules that the module names, parents included."""
        spelt = {node.value for node in self._syntax.all(ast.Constant) if isinstance(node.value, str)}
        named = {full for full in spelt.union(full for _, full in self._syntax.named) if full.split(".")[0] in FIRST_PARTY}
        names = {full.rsplit(".", depth)[0] for full in named for depth in range(full.count(".") + 1)}
        return sorted(name for name in names if name.replace(".", "").isidentifier() and find_module(name))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what counts; equal on Python 3.11 to 3.13, for a checkout and an installed wheel."""
        return hashlib.sha256(self._syntax.write_counted().encode()).hexdigest()

    @cached_property
    def refusals(self) -> list[str]:
        """The module's breaches of the rules for stages, each with its place."""
        file = f"{self.name.replace('.', '/')}{'/__init__' if has_modules(self.name) else ''}.py"
        found = refusals(self._syntax, _is_package, _is_stranger)
        return [f"{file} line {line}: a stage's code {why}" for line, why in found]


@cache
def read_module(name: str) -> Module:
    """Read a module, once in a process.

    Raises:
        PipelineError: when its source can't be read.
    """
    return Module(name)


def _parse(source: str) -> ast.Module:
    with _without_garbage_collection():
        for _ in range(PARSE_ATTEMPTS):
            with suppress(SystemError):
                return ast.parse(source)
        return ast.parse(source)


@contextmanager
def _without_garbage_collection() -> Generator[None]:
    """A tree has no garbage, and looking for some takes longer than parsing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _source(module: str) -> str:
    spec = find_module(module)
    with suppress(OSError):
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            return decode_source(read_once(spec.origin).content)
    raise PipelineError(f"{module}: source not found; its code decides what is cached. Install amazon-ft with its .py files.")


@cache
def find_module(name: str) -> ModuleSpec | None:
    """Where a module is; nothing but the packages above it is imported for that."""
    parent = name.rpartition(".")[0]
    return find_spec(name) if not parent or has_modules(parent) else None


def has_modules(name: str) -> bool:
    """Whether a module is a package."""
    spec = find_module(name)
    return spec is not None and spec.submodule_search_locations is not None


def _is_package(name: str) -> bool:
    return name.split(".")[0] in FIRST_PARTY and has_modules(name)


@cache
def _is_stranger(top: str) -> bool:
    """Whether a module lies elsewhere than our own and libraries; none that is nowhere does: its import fails."""
    spec = PathFinder.find_spec(top) if top not in FIRST_PARTY else None
    places = [place for place in (spec.origin, *(spec.submodule_search_locations or ())) if place] if spec else []
    return not all(place.startswith(INSTALLED) for place in places) and top not in packages_distributions()


load_what_was_read()
