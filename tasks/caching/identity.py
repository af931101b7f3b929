"""What makes two runs of a stage the same: its code and its inputs.

    key = sha256(stage name, stage version, digest of its code, canonical inputs, FORMAT_VERSION)

A wrong hit must be impossible, a needless rerun rare. Code is compared as a syntax tree without docstrings, comments and
positions, of the stage's module and of every first-party module it imports, transitively. Values count by content; fields
marked `aside` do not count. Library versions are not in the key: a CPU and a GPU machine share results, golden tests guard
the bytes of each stage, and a stage's `version` is raised when they change.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.machinery import SourceFileLoader
from typing import Any, cast

from pydantic import BaseModel

from tasks.refs import Artifact, PipelineError

FORMAT_VERSION = 1
"""Stands for the machinery below the stages; raise it to rerun everything."""

FIRST_PARTY = ("tasks", "flows")
OUTSIDE = ("tasks.config", "tasks.refs", "tasks.caching", "tasks.reporting.markdown", "tasks.training.progress")
"""Modules and rooms that are not followed: config counts by value, markdown and progress only tell, and FORMAT_VERSION stands
for the rest."""

BACKENDS = frozenset({"tasks.training.fast.backend", "tasks.training.hf", "tasks.training.unsloth"})
"""Of these only the chosen one counts, named among the roots by its stage, and what it imports."""


def canonical(value: object) -> Any:
    """The JSON that a stage's input counts as.

    >>> canonical(Artifact(kind="products", digest="ab", rows=3))
    'ab'
    >>> canonical({"b": 1, "a": (1.5, None)})
    {'a': [1.5, None], 'b': 1}

    Raises:
        TypeError: for a value with no canonical form.
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Artifact):
        return value.digest
    if isinstance(value, BaseModel):
        return {name: canonical(getattr(value, name)) for name in sorted(counted_fields(type(value)))}
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value)
        return {key: canonical(items[key]) for key in sorted(items)}
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in cast("Iterable[object]", value)]
    raise TypeError(f"{type(value).__name__} has no canonical form; pass a config section, a reference or plain values")


def counted_fields(model: type[BaseModel]) -> Iterator[str]:
    """Names of the fields that are not marked `aside`."""
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if not (isinstance(extra, dict) and extra.get("aside")):
            yield name


def stage_key(name: str, version: int, code: Mapping[str, str], inputs: object) -> str:
    """SHA-256 (64 hex digits) of everything that decides a stage's output."""
    text = json.dumps([FORMAT_VERSION, name, version, code, inputs], sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def code_digests(roots: Iterable[str]) -> dict[str, str]:
    """{module: digest of its code} for the modules and all first-party modules that they import.

    A backend is followed only from another one: name the chosen one among the roots.

    Raises:
        PipelineError: when a module's source can't be read.
    """
    found: dict[str, str] = {}
    waiting = sorted(roots)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found[module] = module_digest(module)
        waiting.extend(name for name in imported_modules(module) if _counts(name, module))
    return dict(sorted(found.items()))


def _counts(module: str, importer: str) -> bool:
    if any(module == outside or module.startswith(f"{outside}.") for outside in OUTSIDE):
        return False
    return module not in BACKENDS or importer in BACKENDS


PARSE_ATTEMPTS = 5
"""Python 3.11 counts the depth of all threads' parsing together, so that one fails now and then where another parses too
(`AST constructor recursion depth mismatch`). Source: https://github.com/python/cpython/issues/106905."""


@cache
def module_digest(module: str) -> str:
    """SHA-256 of a module's code; equal on Python 3.11 to 3.13, for a checkout and an installed wheel."""
    return hashlib.sha256(json.dumps(_without_docstrings(_parse(module)), ensure_ascii=False).encode()).hexdigest()


@cache
def imported_modules(module: str) -> tuple[str, ...]:
    """First-party modules named by the import statements anywhere in a module, parents included."""
    names: set[str] = set()
    for node in ast.walk(_parse(module)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module)
            names.add(base)
            if _is_package(base):
                names.update(f"{base}.{alias.name}" for alias in node.names)
    parents = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    first_party = (name for name in names | parents if name.split(".")[0] in FIRST_PARTY)
    return tuple(sorted(name for name in first_party if importlib.util.find_spec(name)))


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    package = module if _is_package(module) else module.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module) if module.split(".")[0] in FIRST_PARTY else None
    return spec is not None and spec.submodule_search_locations is not None


def _parse(module: str) -> ast.Module:
    source = _source(module)
    for _ in range(PARSE_ATTEMPTS):
        with suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    loader = spec.loader if spec else None
    source = loader.get_source(module) if isinstance(loader, SourceFileLoader) else None
    if source is None:
        raise PipelineError(f"{module}: source not found; its code decides what is cached. Install amazon-ft with its .py files.")
    return source


def _without_docstrings(node: ast.AST) -> list[Any]:
    """A syntax tree as nested lists, without docstrings, positions, None fields and empty lists.

    Leaving out what is empty makes the tree equal across Python versions, which add optional fields to nodes.
    """
    fields: list[Any] = []
    for name, value in ast.iter_fields(node):
        plain = _plain(name, value)
        if isinstance(node, ast.Constant) and name == "value":
            plain = _constant(value)
        if plain is not None and plain != []:
            fields.append([name, plain])
    return [type(node).__name__, fields]


def _plain(name: str, value: object) -> Any:
    if isinstance(value, list):
        items = cast("list[object]", value)
        kept = items[1:] if name == "body" and _is_docstring(items) else items
        return [_plain("", item) for item in kept]
    if isinstance(value, ast.AST):
        return _without_docstrings(value)
    return None if value is None else _constant(value)


def _is_docstring(body: list[object]) -> bool:
    match body:
        case [ast.Expr(value=ast.Constant(value=str())), *_]:
            return True
        case _:
            return False


def _constant(value: object) -> str:
    return f"{type(value).__name__}:{value!r}"
