"""The command line: its groups, and how a command ends."""

from __future__ import annotations

import os
import sys

import typer

from flows.cli import bench, cache, history, models, runs, servers, sources
from flows.cli.options import FAILED, WRONG_INPUT, Debug, err
from flows.running.interruption import Interrupted, be_interruptible
from tasks.caching.code.loading import collect_rarely

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From a product file to a fine-tuned language model.",
)
for group in (runs, history, sources, servers, models):
    app.add_typer(group.app)
app.add_typer(cache.app, name="cache")
app.add_typer(bench.app, name="bench")


@app.callback()
def any_command(debug: Debug = False) -> None:
    """Options of every command."""
    del debug  # _fail looks for it, wherever it stands


def main() -> None:
    """Run the command line; a user's mistake ends with one message and an exit code, never a stack trace."""
    collect_rarely()
    be_interruptible()
    _reach_this_machine_directly()
    try:
        app()
    except Interrupted as end:
        err.print("interrupted; finished stages are kept")
        sys.exit(end.exit_code)
    except Exception as error:
        _fail(error)


def _reach_this_machine_directly() -> None:
    """Keep a proxy for the network from being asked for the server on this machine."""
    for name in ("NO_PROXY", "no_proxy"):
        listed = os.environ.get(name, "").split(",")
        os.environ[name] = ",".join(filter(None, dict.fromkeys([*listed, "127.0.0.1", "localhost"])))


def _fail(error: Exception) -> None:
    if "--debug" in sys.argv:
        raise error
    from tasks.refs import ConfigError, InputError, PipelineError

    if isinstance(error, PipelineError):
        message, code = str(error), WRONG_INPUT if isinstance(error, (ConfigError, InputError)) else FAILED
    else:
        advice = "This is not your doing: run amazon-ft --debug ... for the stack trace."
        message, code = f"{type(error).__name__}: {error}\n{advice}", FAILED
    err.print(message, style="red", markup=False, highlight=False)
    sys.exit(code)
