"""What no artifact can hold does not count for a key; all else does."""

from __future__ import annotations

import ast
from textwrap import dedent

import pytest

from tasks.caching.code.syntax import Syntax

HEAD = """
import logging
from tasks import refs
from tasks.refs import ConfigError as Wrong, InputError

logger = logging.getLogger(__name__)
"""


def counted(source: str) -> str:
    return Syntax(ast.parse(dedent(source))).write_counted()


def body(statement: str) -> str:
    """A function's only statement, in a module with a logger and errors."""
    return counted(f"{HEAD}\ndef f(x, y, rows):\n    {statement}\n")


def test_comments_docstrings_and_layout_do_not_count() -> None:
    plain = "class A:\n    x: int = 1\n    def f(self, x):\n        return x + 1\n"
    dressed = '''
        """Module."""

        class A:
            """Class."""

            x: int = 1
            """Attribute."""

            def f(
                self,
                x,
            ):
                """Function."""
                # why
                return x + 1
                """Never reached."""
    '''
    assert counted(plain) == counted(dressed)


@pytest.mark.parametrize("edit", ["x + 2", "x - 1", "y + 1", "1 + x", "x + 1.0", "x + True", "x + '1'", "(x + 1,)", "x + b'1'"])
def test_every_edit_of_an_expression_counts(edit: str) -> None:
    assert body("return x + 1") != body(f"return {edit}")


def test_returned_string_is_no_docstring() -> None:
    assert body("return 'a'") != body("return 'b'")


def test_trees_that_differ_by_their_nesting_alone_differ() -> None:
    assert counted("f(a, [b], c)") != counted("f(a, [b, c])")
    assert counted("if a:\n    b()\nc()") != counted("if a:\n    b()\n    c()")
    assert counted("x = ['a', 'b']") != counted("x = ['a'], 'b'")


def test_annotations_of_locals_do_not_count_and_all_others_do() -> None:
    assert body("z: list[int] = x; return z") == body("z: set[int] = x; return z") == body("z = x; return z")
    assert body("z: int; return x") == body("z: str; return x") != body("return x")
    assert counted("z: int = 1") != counted("z: str = 1")
    assert counted("def f():\n    class A:\n        z: int = 1") != counted("def f():\n    class A:\n        z: str = 1")
    assert counted("def f(z: int): pass") != counted("def f(z: str): pass")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('raise InputError("a")', 'raise InputError(f"b {x!r} {len(rows):,}")'),
        ('raise InputError("a") from x', "raise InputError(str(x.y), x + 1) from x"),
        ('raise Wrong("a" if x else y.z)', 'raise Wrong("b")'),
        ('raise refs.NoSpaceError("a")', "raise refs.NoSpaceError()"),
        ('logger.info("a %s", x)', 'logger.info("b %s %s", x, not y)'),
        ('logger.warning("a")', "logger.warning('b', exc_info=True, extra={'x': [x, -1]})"),
        ('logger.log(1, "a %s", ", ".join(rows))', 'logger.log(2, "b %s", "; ".join(rows))'),
        ('logger.info("a %s", x < y)', 'logger.info("b %s", x and y)'),
    ],
)
def test_arguments_of_raised_errors_and_logging_calls_do_not_count(before: str, after: str) -> None:
    assert body(before) == body(after)


@pytest.mark.parametrize(
    "argument",
    [
        "(z := x)",
        "x.pop()",
        "next(rows)",
        "list(rows)",
        "sorted(rows)",
        "[row for row in rows]",
        "', '.join(rows)",
        "x in rows",
        "*rows",
        "x[y]",
        "x and y.write()",
        "x if y else rows.close()",
        "f'{x.read():>{y.write()}}'",
        "(yield x)",
        "str(x.read())",
        "extra=x.read()",
    ],
)
def test_what_an_argument_does_counts(argument: str) -> None:
    assert body(f"logger.info('a', {argument})") == body(f"logger.info('b %s', {argument})") != body("logger.info('a')")
    raised = [body(f"raise InputError({message}, {argument})") for message in ("'a'", "'b'")]
    assert raised[0] == raised[1] != body("raise InputError('a')")


def test_the_order_of_what_arguments_do_counts() -> None:
    assert body("logger.info('a', x.read(), y.read())") != body("logger.info('a', y.read(), x.read())")


@pytest.mark.parametrize(
    "statement",
    [
        "raise ValueError({})",
        "return InputError({})",
        "x.append(InputError({}))",
        "raise x.InputError({})",
        "x.info({})",
        "logger.handle({})",
        "logging.getLogger({})",
        "logger = x; logger.info({})",
        "InputError = x; raise InputError({})",
        "len = x.write; logger.info(len({}))",
        "print({})",
    ],
)
def test_arguments_of_other_calls_count(statement: str) -> None:
    assert body(statement.format("'a'")) != body(statement.format("'b'"))


MAKER = """
def _wrong(what: str) -> InputError:
    return InputError(f"template: {what}.")

def f(x):
    raise _wrong("a")
"""


@pytest.mark.parametrize(("before", "after"), [("template", "chat template"), ('"a"', '"b"')])
def test_private_function_that_only_makes_an_error_that_is_raised_does_not_count(before: str, after: str) -> None:
    assert counted(HEAD + MAKER) == counted(HEAD + MAKER.replace(before, after))


@pytest.mark.parametrize(
    ("of_old", "of_new"),
    [
        ("raise _wrong", "return _wrong"),
        ("_wrong", "wrong"),
        ("return Input", "what = write(what)\n    return Input"),
        ("{what}.", "{write(what)}."),
        ("def _wrong", "@cache\ndef _wrong"),
        ("def f(x)", "def f(_wrong)"),
        ("(x):", "(x):\n    x(_wrong)"),
    ],
)
def test_function_that_does_more_than_make_an_error_counts(of_old: str, of_new: str) -> None:
    module = HEAD + MAKER.replace(of_old, of_new)
    assert counted(module) != counted(module.replace('"a"', '"b"'))
