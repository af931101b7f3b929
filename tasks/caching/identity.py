"""The identity of a run of a stage: its code and its inputs.

    key = sha256(stage name, stage version, digest of its code, canonical inputs, FORMAT_VERSION)

A wrong hit must be impossible, a needless rerun rare. Code is compared as a syntax tree without what no artifact can hold
(code/syntax.py), of the stage's module and of every first-party module it imports, transitively; what would escape that is
refused (code/reach.py), and what runs is loaded from the bytes that were compared (code/loading.py). Values count by content;
fields marked `aside` do not count. Library versions are not in the key: a CPU and a GPU machine share results, golden tests
guard the bytes of each stage, and a stage's `version` is raised when they change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, cast

from pydantic import BaseModel

from tasks.caching.code.modules import Module, read_module
from tasks.refs import Artifact, PipelineError

FORMAT_VERSION = 1
"""Stands for the machinery below the stages; raise it to rerun everything."""
OUTSIDE = ("tasks.config", "tasks.refs", "tasks.caching", "tasks.reporting.markdown")
"""Modules and rooms that are not followed: config counts by value, markdown only tells, and FORMAT_VERSION stands for the
rest."""


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


def code_digests(roots: Iterable[str], alternatives: Collection[str] = ()) -> dict[str, str]:
    """{module: digest of its code} for the modules and all first-party modules that they import.

    Of `alternatives`, what a root imports counts only if it is a root itself: they are modules of which an input chooses one.

    Raises:
        PipelineError: when a module's source can't be read, or when a module reaches what its digest can't see; all at once.
    """
    modules = _modules(roots, alternatives)
    if refusals := [refusal for module in modules for refusal in module.refusals]:
        raise PipelineError("\n".join(refusals))
    return {module.name: module.digest for module in modules}


def source_digest(root: str) -> str:
    """SHA-256 over the source, comments and all, of a module and of every first-party module that it imports.

    No key: it tells people which code this is.

    Raises:
        PipelineError: when a module's source can't be read.
    """
    sources = {module.name: module.source for module in _modules([root], (), outside=())}
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()


def remember_code(roots: Iterable[str]) -> None:
    """Read the code that may count, while it is what was imported; what is wrong with it is said when its digest is asked for."""
    with suppress(PipelineError, SyntaxError):
        _modules(roots, ())


def _modules(roots: Iterable[str], alternatives: Collection[str], outside: Collection[str] = OUTSIDE) -> list[Module]:
    chosen = set(roots)
    found: dict[str, Module] = {}
    waiting = sorted(chosen)
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        found[name] = read_module(name)
        others = alternatives if name in chosen and name not in alternatives else ()
        waiting.extend(name for name in found[name].imports if name not in others and not _is_below(name, outside))
    return [found[name] for name in sorted(found)]


def _is_below(module: str, others: Iterable[str]) -> bool:
    return any(module == other or module.startswith(f"{other}.") for other in others)
