"""Names and rooms keep their rules: a name is borne once, a docstring promises, a room has at most a dozen doors."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).parents[1]
ROOMS = ("flows", "tasks")
MAX_MODULES = 12
MAX_STAGES = 16
"""Of tasks/ itself: the stages, their settings and their references."""

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> dict[str, ast.Module]:
    """{path: its tree} of every module of flows/ and tasks/."""
    paths = [path for room in ROOMS for path in sorted((PROJECT / room).rglob("*.py"))]
    return {str(path.relative_to(PROJECT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def borne_twice(*kinds: type[Definition]) -> dict[str, list[str]]:
    """{name: modules} of the public definitions at the top of modules whose name is no one's own."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for path, tree in modules().items():
        for node in tree.body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                places[node.name].append(path)
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of the docstrings of a module, its classes, functions and constants."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text
            case _:
                pass


def test_no_class_bears_the_name_of_another() -> None:
    assert borne_twice(ast.ClassDef) == {}


def test_no_function_bears_the_name_of_another() -> None:
    """What several modules of one Protocol define is a method of theirs."""
    assert borne_twice(ast.FunctionDef, ast.AsyncFunctionDef) == {}


def test_docstrings_promise() -> None:
    found = [
        f"{path} line {line}" for path, tree in modules().items() for line, text in docstrings(tree) if text.startswith("What ")
    ]
    assert found == []


def test_rooms_have_at_most_a_dozen_doors() -> None:
    doors = Counter(str(Path(path).parent) for path in modules() if not Path(path).name.startswith("__"))
    crowded = {room: count for room, count in doors.items() if count > (MAX_STAGES if room == "tasks" else MAX_MODULES)}
    assert crowded == {}


def test_rooms_only_say_what_they_are_for() -> None:
    signs = {path: tree for path, tree in modules().items() if Path(path).name == "__init__.py"}
    assert len(signs) == len({Path(path).parent for path in modules()})
    assert [path for path, tree in signs.items() if len(tree.body) != 1 or ast.get_docstring(tree) is None] == []
