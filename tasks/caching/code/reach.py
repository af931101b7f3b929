"""Refusals of what a stage's key could not see its code do, each with its line and the way out.

Code comes in by import statements alone, and files as inputs. Text that the key leaves out (docstrings, messages of
PipelineErrors, log lines) is for people: no stage may read it as data.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator

from tasks.caching.code.loading import FIRST_PARTY
from tasks.caching.code.syntax import BUILTIN, Syntax

CODE = "brings in code that its key can't see: got {}; expected import statements. Import it by its name."
FILE = (
    "looks for files beside the code, which its key can't see: got {}; expected inputs and constants. "
    "Give the file to the stage as an input, or write its text into the code."
)
MODULE = "hands on modules whose use its key can't see: got {}; expected what is used of them. Import that by its name."
TEXT = (
    "reads text that its key leaves out (docstrings, messages, log lines): got {}; expected values and constants. "
    "Give what is needed of it a name of its own."
)
STRANGER = (
    "imports code from outside flows, tasks and the installed libraries, which its key can't see: got {}; expected code of "
    "theirs. Move it there."
)
FORBIDDEN = {
    **dict.fromkeys(("builtins", "importlib", "importlib.metadata.entry_points", "pydoc", "runpy", "site", "zipimport"), CODE),
    **dict.fromkeys(("sys.meta_path", "sys.modules", "sys.path", "sys.path_hooks"), CODE),
    **dict.fromkeys(("importlib.resources", "importlib_resources", "jinja2.PackageLoader", "pkg_resources", "pkgutil"), FILE),
    **dict.fromkeys(("linecache", "logging.config", "logging.handlers", "sys.exc_info", "sys.exception", "traceback"), TEXT),
    "importlib.metadata": "",
}
"""{full name: why neither it nor what is below it may be used}; the longest name that fits decides."""
FUNCTIONS = dict.fromkeys(("compile", "eval", "exec", "globals"), CODE)
"""Forbidden as names, not as methods."""
WORDS = {
    **dict.fromkeys(("__builtins__", "__globals__", "__import__"), CODE),
    **dict.fromkeys(("__cached__", "__file__", "__loader__", "__path__", "__spec__"), FILE),
    **dict.fromkeys(("__cause__", "__code__", "__context__", "__doc__", "__traceback__", "addFilter", "addHandler"), TEXT),
    **dict.fromkeys(("basicConfig", "FileHandler", "StreamHandler", "model_json_schema", "use_attribute_docstrings"), TEXT),
    **dict.fromkeys(("getcomments", "getdoc", "getfile", "getmodule", "getsource", "getsourcefile", "getsourcelines"), TEXT),
}
"""Forbidden wherever they stand as a name, an attribute, a keyword or a string."""
SPELT: dict[type[ast.expr | ast.alias | ast.keyword], str] = {
    ast.Name: "id",
    ast.Attribute: "attr",
    ast.Constant: "value",
    ast.alias: "name",
    ast.keyword: "arg",
}
WHOLE = {"inspect", "logging", "sys"}
"""Modules that may be used, but not handed on."""
ASKING = {f"{BUILTIN}.isinstance", f"{BUILTIN}.type"}
OTHER_ERRORS = {f"{BUILTIN}.{name}" for name in vars(builtins)} - {f"{BUILTIN}.BaseException", f"{BUILTIN}.Exception"}
"""Python's own names that are no PipelineError."""

Refusal = tuple[int, str]


def refusals(syntax: Syntax, is_package: Callable[[str], bool], is_stranger: Callable[[str], bool]) -> list[Refusal]:
    """(line, message) of all that a module must not do, by line."""
    found = {*_forbidden(syntax), *_handed_on(syntax, is_package), *_messages_read(syntax)}
    for node, full in syntax.named:
        if isinstance(node, ast.stmt) and is_stranger(top := full.split(".")[0]):
            found.add((node.lineno, STRANGER.format(top)))
    return sorted(found)


def _forbidden(syntax: Syntax) -> Iterator[Refusal]:
    looked_into = _looked_into(syntax)
    for node, full in syntax.named:
        above = (full.rsplit(".", depth)[0] for depth in range(full.count(".") + 1))
        name = next((name for name in above if name in FORBIDDEN), "")
        if id(node) not in looked_into and FORBIDDEN.get(name):
            yield node.lineno, FORBIDDEN[name].format(name)
    for kind, field in SPELT.items():
        for node in syntax.all(kind):
            word = getattr(node, field)
            if why := (WORDS | FUNCTIONS if kind is ast.Name else WORDS).get(word):
                yield node.lineno, why.format(word)


def _handed_on(syntax: Syntax, is_package: Callable[[str], bool]) -> Iterator[Refusal]:
    """Packages and modules that are not just looked into."""
    looked_into = _looked_into(syntax)
    for node, full in syntax.named:
        match node:
            case ast.Import(names=aliases):
                is_whole = any(alias.asname and alias.name == full for alias in aliases) and is_package(full)
            case ast.ImportFrom():
                is_whole = full.rpartition(".")[2] in ("*", *FIRST_PARTY) or is_package(full)
            case _:
                is_whole = id(node) not in looked_into and (full in WHOLE or is_package(full))
        if is_whole:
            yield node.lineno, MODULE.format(full)


def _looked_into(syntax: Syntax) -> set[int]:
    return {id(node.value) for node in syntax.all(ast.Attribute)}


def _messages_read(syntax: Syntax) -> Iterator[Refusal]:
    """A caught PipelineError that is used for more than to raise or tell it again, or to ask for its type."""
    harmless = {id(name) for part in _harmless(syntax) for name in ast.walk(part)}
    for handler in syntax.all(ast.ExceptHandler):
        if handler.name and _may_catch(syntax, handler.type):
            uses = (use for use in ast.walk(handler) if isinstance(use, ast.Name) and use.id == handler.name)
            yield from ((use.lineno, TEXT.format(use.id)) for use in uses if id(use) not in harmless)


def _harmless(syntax: Syntax) -> Iterator[ast.AST]:
    for node in syntax.all(ast.Raise):
        yield from (part for part in (node.exc, node.cause) if isinstance(part, ast.Name))
    for call in syntax.all(ast.Call):
        if id(call) in syntax.telling or syntax.stands_for(call.func, ASKING):
            yield from (*call.args, *call.keywords)


def _may_catch(syntax: Syntax, kind: ast.expr | None) -> bool:
    """Whether what a handler catches may be a PipelineError."""
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind] if kind else []
    caught = {full for one in kinds for full in syntax.meanings(one)} - OTHER_ERRORS
    return any(full[0] in "<?" or full.split(".")[0] in FIRST_PARTY for full in caught)
