"""Python programs in processes that begin with the libraries imported, which takes most of a short training's time.

They are forked from multiprocessing's fork server, which has LIBRARIES imported and nothing of ours; each gets the arguments, the
environment and the directory that a process of its own would have. Bars are switched by the environment when the libraries are
imported, Unsloth patches what it finds imported, and Prefect reads its settings once: what depends on these starts cold.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp

LIBRARIES = [
    "tests.support.uncollected",  # first
    "accelerate",
    "asyncpg",
    "datasets",
    "fastapi",
    "jinja2",
    "numpy",
    "peft",
    "polars",
    "pyarrow.dataset",
    "rich.progress",
    "safetensors.torch",
    "sqlalchemy.ext.asyncio",
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
    "typer.main",
    "websockets.client",
    "yaml",
]
OURS = ("flows", "tasks", "tests")

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(LIBRARIES)


class Forked:
    """A program that was started; as much of subprocess.Popen as tests ask for."""

    def __init__(self, arguments: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str], leader: bool = False) -> None:
        """The leader of a process group can be signalled with all that it started, as a terminal does."""
        folder = Path(mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._outputs = (folder / "stdout", folder / "stderr")
        for output in self._outputs:
            output.touch()
        told = (list(map(str, arguments)), str(cwd), dict(env), list(map(str, self._outputs)), leader)
        self._process = _server.Process(target=_become, args=told)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        """Everything that it printed so far."""
        return self._outputs[0].read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        """Everything that it said so far."""
        return self._outputs[1].read_text(encoding="utf-8")

    def poll(self) -> int | None:
        """The exit code, once it ended; of a signal the negative number."""
        return self._process.exitcode

    def wait(self) -> int:
        """The exit code, when it ended."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """As Popen does: to none that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def signal_group(self, number: signal.Signals) -> None:
        """To it, which leads a group, and to all that it started and left in there."""
        os.killpg(self.pid, number)


def run(arguments: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str]) -> Forked:
    """A program that came to its end."""
    started = Forked(arguments, cwd=cwd, env=env)
    started.wait()
    return started


def _become(arguments: list[str], cwd: str, env: dict[str, str], outputs: list[str], leader: bool) -> None:
    """Be `python ARGUMENTS`: `-m MODULE ...`, `-c CODE ...` or `PROGRAM ...`."""
    if leader:
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    gc.enable()
    gc.freeze()  # what was imported stays; collecting it again and again would take longer than a plan
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    os.chdir(cwd)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the platform's, no longer ours
    sys.dont_write_bytecode = bool(env.get("PYTHONDONTWRITEBYTECODE"))
    how, *rest = arguments if arguments[0] in ("-m", "-c") else ("", *arguments)
    first = cwd if how else str(Path(rest[0]).parent)
    sys.path[:0] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = rest
    try:
        if how == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif how == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(rest[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
