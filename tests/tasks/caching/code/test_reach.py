"""What a stage's code must not do is refused where it stands, with the way out."""

from __future__ import annotations

import ast
from textwrap import dedent

import pytest

from tasks.caching.code.reach import refusals
from tasks.caching.code.syntax import Syntax

PACKAGES = {"tasks", "tasks.text"}


def refused(source: str) -> list[tuple[int, str]]:
    """(line, what was got) of each refusal."""
    found = refusals(Syntax(ast.parse(dedent(source))), PACKAGES.__contains__, {"helpers", "tests"}.__contains__)
    return [(line, why.partition(": got ")[2].partition(";")[0]) for line, why in found]


@pytest.mark.parametrize(
    ("source", "got"),
    [
        ("import importlib", "importlib"),
        ("import importlib.util", "importlib"),
        ("from importlib import import_module", "importlib"),
        ("from importlib.util import find_spec as find", "importlib"),
        ("import importlib.resources as data", "importlib.resources"),
        ("from importlib.resources import files", "importlib.resources"),
        ("from importlib.metadata import entry_points", "importlib.metadata.entry_points"),
        ("import pkgutil", "pkgutil"),
        ("import runpy", "runpy"),
        ("from builtins import eval", "builtins"),
        ("from sys import modules", "sys.modules"),
        ("from jinja2 import PackageLoader", "jinja2.PackageLoader"),
        ("from tasks.sample import __doc__ as text", "__doc__"),
        ("import traceback", "traceback"),
        ("import helpers", "helpers"),
        ("from tests.support import tiny", "tests"),
        ("from tasks import text", "tasks.text"),
        ("import tasks.text as t", "tasks.text"),
        ("from tasks.sample import tasks", "tasks.sample.tasks"),
        ("from tasks.sample import *", "tasks.sample.*"),
        ("__import__('x')", "__import__"),
        ("exec('x')", "exec"),
        ("eval('x')", "eval"),
        ("compile('x', 'y', 'exec')", "compile"),
        ("globals()['x']", "globals"),
        ("x = __builtins__", "__builtins__"),
        ("x = __file__", "__file__"),
        ("x = y.__file__", "__file__"),
        ("x = __path__", "__path__"),
        ("x = __spec__", "__spec__"),
        ("x = __loader__", "__loader__"),
        ("x = __doc__", "__doc__"),
        ("x = f.__doc__", "__doc__"),
        ("x = getattr(f, '__doc__')", "__doc__"),
        ("x = f.__code__.co_consts", "__code__"),
        ("x = Model.model_json_schema()", "model_json_schema"),
        ("x = ConfigDict(use_attribute_docstrings=True)", "use_attribute_docstrings"),
        ("x.addHandler(y)", "addHandler"),
    ],
)
def test_ways_around_the_key_are_refused(source: str, got: str) -> None:
    assert refused(f"\n{source}\n") == [(2, got)]


@pytest.mark.parametrize(
    ("source", "got"),
    [
        ("sys.modules['x']", "sys.modules"),
        ("sys.path.append('x')", "sys.path"),
        ("getattr(sys, 'modules')", "sys"),
        ("x = sys", "sys"),
        ("inspect.getsource(f)", "getsource"),
        ("inspect.getdoc(f)", "getdoc"),
        ("jinja2.PackageLoader('x')", "jinja2.PackageLoader"),
        ("logging.FileHandler('x')", "FileHandler"),
        ("x = tasks", "tasks"),
        ("vars(tasks.text)", "tasks.text"),
    ],
)
def test_ways_around_the_key_by_attributes_are_refused(source: str, got: str) -> None:
    assert refused(f"import sys, inspect, jinja2, logging, tasks.text.turns\n\n{source}\n") == [(3, got)]


def test_an_alias_hides_nothing() -> None:
    assert refused("import sys as s\ns.modules") == [(2, "sys.modules")]


def test_a_name_of_two_meanings_hides_nothing() -> None:
    source = "def f():\n    import sys\n    sys.modules\ndef g(sys):\n    sys.modules"
    assert refused(source) == [(3, "sys.modules"), (5, "sys.modules")]


CATCHING = """
try:
    x()
except {} as error:
    {}
"""


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("InputError", "x(str(error))"),
        ("Exception", "x(error.args)"),
        ("(OSError, refs.PipelineError)", "y = error"),
        ("UNKNOWN", "return_(f'{error}')"),
        ("InputError", "raise ValueError(str(error))"),
    ],
)
def test_message_of_a_caught_error_is_no_data(kind: str, use: str) -> None:
    imports = "from tasks import refs; from tasks.refs import InputError"
    assert refused(imports + CATCHING.format(kind, use)) == [(5, "error")]


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("ValueError", "x(str(error))"),
        ("pyarrow.ArrowInvalid", "x(str(error))"),
        ("Exception", "raise error"),
        ("InputError", "raise"),
        ("Exception", "raise InputError(f'{error}') from error"),
        ("Exception", "logger.warning('%s', error)"),
        ("Exception", "x(isinstance(error, InputError), type(error))"),
    ],
)
def test_caught_error_may_be_raised_told_and_asked_for_its_type(kind: str, use: str) -> None:
    imports = "import logging, pyarrow; from tasks.refs import InputError; logger = logging.getLogger(__name__)"
    assert refused(imports + CATCHING.format(kind, use)) == []


def test_what_only_looks_alike_is_not_refused() -> None:
    assert not refused(
        """
        import re, sys, logging, inspect
        import importlib.metadata
        import tasks.text.turns
        import tasks.text.turns as turns
        from importlib.metadata import version
        from tasks.text import encoding

        logger = logging.getLogger(__name__)
        PATTERN = re.compile("x")

        def f(model, compile_):
            model.eval()
            print([*model.modules()], sys.executable, model.path, inspect.signature(f), importlib.metadata.version("x"))
            return tasks.text.turns.find_cut, turns.Field, encoding
        """
    )


def test_message_says_where_what_and_what_to_do() -> None:
    (found,) = refusals(Syntax(ast.parse("x = __file__")), PACKAGES.__contains__, set[str]().__contains__)
    assert found == (
        1,
        "looks for files beside the code, which its key can't see: got __file__; expected inputs and constants. "
        "Give the file to the stage as an input, or write its text into the code.",
    )
