"""A module's syntax tree, and what of it counts for a stage's key.

What no artifact can hold is left out: comments, docstrings, annotations of locals, and the arguments of raised PipelineErrors
and of logging calls, unless they do something. reach.py refuses code that reads such text as data.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from importlib.util import resolve_name
from typing import Any, TypeVar, cast

from tasks import refs

BUILTIN = "<builtin>"
"""Stands before what a module binds nowhere."""
ERRORS = {
    f"{refs.__name__}.{name}"
    for name, value in vars(refs).items()
    if isinstance(value, type) and issubclass(value, refs.PipelineError) and value.__init__ is Exception.__init__
}
LOGGING = {"critical", "debug", "error", "exception", "info", "log", "warning"}
PURE = {f"{BUILTIN}.{name}" for name in ("abs", "bool", "float", "int", "len", "repr", "round", "str", "type")}
"""Functions that only look at what they get; none uses up an iterator."""
STEADY = (ast.Attribute, ast.BinOp, ast.Dict, ast.FormattedValue, ast.JoinedStr, ast.List, ast.Set, ast.Tuple, ast.UnaryOp)
"""Expressions that do what their parts do, each part once."""
BRANCHING = (ast.BoolOp, ast.Compare, ast.IfExp)
"""Expressions that do nothing if their parts do nothing."""
SKIPPED = {"ctx", "kind", "type_comment", "type_ignores"}
"""Fields that the place tells, or that have no effect."""
BINDING: dict[type[ast.AST], str] = {
    **dict.fromkeys((ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar), "name"),
    **dict.fromkeys((ast.Global, ast.Nonlocal), "names"),
    ast.arg: "arg",
    ast.MatchMapping: "rest",
}
"""{kind of node: its field that holds what it binds}; imports and assigned names apart."""

Node = TypeVar("Node", bound=ast.AST)


class Syntax:
    """The tree of a module, and what its names stand for."""

    def __init__(self, tree: ast.Module, package: str = "") -> None:
        """Relative imports, which begin at the package, are made absolute."""
        self._tree = tree
        self._nodes: dict[type[ast.AST], list[Any]] = defaultdict(list)
        for node in _walk(tree):
            self._nodes[type(node)].append(node)
        for node in self.all(ast.ImportFrom):
            node.module, node.level = resolve_name("." * node.level + (node.module or ""), package), 0
        self._bound: dict[str, set[str]] = defaultdict(set)
        for name, full in self._bindings():
            self._bound[name].add(full)

    def all(self, kind: type[Node]) -> list[Node]:
        """All nodes of a kind."""
        return self._nodes[kind]

    def _bindings(self) -> Iterator[tuple[str, str]]:
        """Names that the module binds, each with the full name of what it stands for; `?...` where no import tells."""
        for alias in (alias for node in self.all(ast.Import) for alias in node.names):
            yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0], alias.name.split(".")[0])
        for node in self.all(ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        for node, bound in ((node, getattr(node, field)) for kind, field in BINDING.items() for node in self._nodes[kind]):
            yield from ((name, _own(node)) for name in (cast("list[str]", bound) if isinstance(bound, list) else [bound]))
        yield from ((node.id, _own(node)) for node in self.all(ast.Name) if not isinstance(node.ctx, ast.Load))

    def meanings(self, node: ast.AST) -> set[str]:
        """The full names that an expression may stand for."""
        if isinstance(node, ast.Name):
            return self._bound.get(node.id) or {f"{BUILTIN}.{node.id}"}
        if isinstance(node, ast.Attribute):
            return {f"{full}.{node.attr}" for full in self.meanings(node.value)}
        return {"?"}

    def stands_for(self, node: ast.AST, wanted: Iterable[str]) -> bool:
        """Whether an expression certainly is one of the wanted."""
        meanings = self.meanings(node)
        return len(meanings) == 1 and meanings <= set(wanted)

    @cached_property
    def named(self) -> list[tuple[ast.stmt | ast.expr, str]]:
        """(node, full name) of what is imported, and of all uses of it."""
        imported = [(node, alias.name) for node in self.all(ast.Import) for alias in node.names]
        imported += [(node, f"{node.module}.{alias.name}") for node in self.all(ast.ImportFrom) for alias in node.names]
        uses = ((node, full) for kind in (ast.Name, ast.Attribute) for node in self._nodes[kind] for full in self.meanings(node))
        return [*imported, *((node, full) for node, full in uses if full[0] not in "<?")]

    # What counts

    @cached_property
    def telling(self) -> set[int]:
        """Ids of the calls that log, or make a PipelineError that is raised: no artifact can hold their arguments."""
        loggers = {name for node in self._tree.body for name in self._loggers(node)}
        raised = {id(node.exc) for node in self.all(ast.Raise)}
        calls = [call for call in self.all(ast.Call) if self._logs(call, loggers)]
        calls += [call for call in self.all(ast.Call) if id(call) in raised and self.stands_for(call.func, ERRORS)]
        calls += [call for node in self._tree.body for call in self._calls_of_maker(node, raised)]
        return {id(call) for call in calls}

    def _loggers(self, node: ast.stmt) -> list[str]:
        """The name that a statement gives a logger, if the module gives it to nothing else."""
        match node:
            case ast.Assign(targets=[ast.Name(id=name) as target], value=ast.Call(func=func)):
                return [name] if self._bound[name] == {_own(target)} and self.stands_for(func, ["logging.getLogger"]) else []
            case _:
                return []

    def _logs(self, call: ast.Call, loggers: set[str]) -> bool:
        match call.func:
            case ast.Attribute(value=ast.Name(id=name), attr=attr):
                return name in loggers and attr in LOGGING
            case _:
                return False

    def _calls_of_maker(self, node: ast.stmt, raised: set[int]) -> list[ast.Call]:
        """The calls of a private function that only makes a PipelineError, if each is raised; and the call that makes it."""
        match node:
            case ast.FunctionDef(name=name, decorator_list=[], body=[*_, ast.Return(value=ast.Call() as made)]):
                if not (name.startswith("_") and self._bound[name] == {_own(node)} and self.stands_for(made.func, ERRORS)):
                    return []
                uses = [use for use in self.all(ast.Name) if use.id == name]
                calls = [call for call in self.all(ast.Call) if id(call) in raised and call.func in uses]
                is_plain = sum(not _is_idle(part, node) for part in node.body) == 1 and not self._done_by(made)
                return [made, *calls] if is_plain and len(uses) == len(calls) else []
            case _:
                return []

    def _done_by(self, call: ast.Call) -> list[ast.AST]:
        """The parts of a call's arguments that do more than tell something, in order."""
        return [done for argument in (*call.args, *call.keywords) for done in self._done(argument)]

    def _done(self, node: ast.AST) -> list[ast.AST]:
        parts = [done for child in ast.iter_child_nodes(node) for done in self._done(child)]
        match node:
            case ast.Constant() | ast.Name():
                return []
            case ast.Call(func=ast.Attribute(value=ast.Constant(value=str()), attr="join"), args=[joined]):
                return [joined]
            case ast.Call(func=func) if self.stands_for(func, PURE):
                return parts
            case ast.Compare(ops=operators) if any(isinstance(operator, (ast.In, ast.NotIn)) for operator in operators):
                return [node]  # may use up an iterator
            case ast.expr() if not isinstance(node, STEADY) and (parts or not isinstance(node, BRANCHING)):
                return [node]
            case _:
                return parts

    def write_counted(self) -> str:
        """The tree written out without what does not count.

        Leaving out what is empty makes it equal across Python versions, which add optional fields to nodes.
        """
        words: list[str] = []
        self._write(self._tree, words.append, local=False)
        return "\n".join(words)

    def _write(self, node: ast.AST, write: Callable[[str], None], *, local: bool) -> None:
        """Append the words of a node; `local` within a function."""
        if isinstance(node, ast.Constant):
            write(f"{type(node.value).__name__} {node.value!a}")
        elif id(node) in self.telling:
            call = cast("ast.Call", node)
            write("Telling")
            self._write_list([call.func, *self._done_by(call)], write, local=local)
        else:
            node = _without_annotation(node) if local and isinstance(node, ast.AnnAssign) else node
            local = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (local and not isinstance(node, ast.ClassDef))
            write(type(node).__name__)
            for name in _fields(type(node)):
                if kept := [part for part in _parts(node, name) if not _is_idle(part, node)]:
                    write(name)
                    self._write_list(kept, write, local=local)
            write(".")

    def _write_list(self, items: list[Any], write: Callable[[str], None], *, local: bool) -> None:
        for item in items:
            if isinstance(item, ast.AST):
                self._write(item, write, local=local)
            else:
                write(f"{item!a}")
        write(";")


def _own(node: ast.AST) -> str:
    """Stands for what this node binds, and no import."""
    return f"?{id(node)}"


@cache
def _fields(kind: type[ast.AST]) -> tuple[str, ...]:
    return tuple(name for name in kind._fields if name not in SKIPPED)


def _walk(tree: ast.Module) -> Iterator[ast.AST]:
    waiting: list[Any] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.AST):
            yield node
            for name in _fields(type(node)):
                waiting.extend(_parts(node, name))


def _parts(node: ast.AST, field: str) -> list[Any]:
    value = getattr(node, field, None)
    return cast("list[Any]", value) if isinstance(value, list) else [] if value is None else [value]


def _is_idle(part: Any, parent: ast.AST) -> bool:
    """Whether a part does nothing: a bare constant, such as a docstring, or the empty end that Python 3.12.1 gives f-strings."""
    if isinstance(parent, ast.JoinedStr):
        return isinstance(part, ast.Constant) and part.value == ""
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)


def _without_annotation(node: ast.AnnAssign) -> ast.stmt:
    if node.value is None:
        return ast.AnnAssign(target=node.target, annotation=ast.Constant(value=None), simple=node.simple)
    return ast.Assign(targets=[node.target], value=node.value)
