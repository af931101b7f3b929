"""No process outlives the one that it works for, and none of them for long what told it to end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.running.supervisor import end_processes, guarded
from tests.support.checkout import PROJECT
from tests.support.database import place_database

pytestmark = pytest.mark.heavy

GUARDED = """
import subprocess
from flows.running.supervisor import INNER, guarded
child = subprocess.Popen(guarded({inner}"http.server", "0"), start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""
SERVER = """
import psutil, time
from flows.server.ephemeral import prefect_server
with prefect_server():
    print(psutil.Process().children()[0].pid, flush=True)
    time.sleep(900)
"""
STUBBORN = """
import os, signal, subprocess, sys
if sys.argv[1:] == ["child"]:
    from flows.running import supervisor
    supervisor.END_SECONDS = 0.2
    supervisor._run_inner(os.getppid(), ["stubborn"])
else:
    child = subprocess.Popen([sys.executable, __file__, "child"], stdout=subprocess.PIPE)
    child.stdout.readline()
    print(child.pid, flush=True)
    child.wait()
"""
RUNNER = """
import pathlib, signal, subprocess, sys, time
def end(*_):
    time.sleep(0.5)
    pathlib.Path("left").touch()
    sys.exit()
if sys.argv[1:]:
    signal.signal(signal.SIGTERM, end)
    print("on", flush=True)
else:
    subprocess.run([sys.executable, __file__, "run"], start_new_session=True)
time.sleep(900)
"""
"""As `prefect flow-run execute`: its run is in a session of its own, and SIGTERM ends the one without the other."""
WILL_NOT_END = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(900)"


def child_of_a_killed_parent(*command: str, **env: str) -> psutil.Process:
    """The process that a program told of before it was killed."""
    parent = psutil.Popen(
        [sys.executable, *command], cwd=PROJECT, env={**psutil.Process().environ(), **env}, stdout=subprocess.PIPE, text=True
    )
    with parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        return child


@pytest.mark.parametrize("inner", ["", "INNER, "])
def test_guarded_process_ends_with_a_parent_that_is_killed(inner: str) -> None:
    child_of_a_killed_parent("-c", GUARDED.format(inner=inner)).wait(120)


def test_prefect_server_ends_with_a_parent_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    place_database(tmp_path / "prefect", tmp_path_factory)
    server = child_of_a_killed_parent("-c", SERVER, PREFECT_HOME=str(tmp_path / "prefect"))
    server.wait(120)


def test_inner_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(STUBBORN)
    (tmp_path / "stubborn.py").write_text(WILL_NOT_END)
    child_of_a_killed_parent(str(program), PYTHONPATH=f"{PROJECT}:{tmp_path}").wait(120)


def test_what_runs_in_a_container_ends_before_its_first_process(tmp_path: Path) -> None:
    (tmp_path / "runner.py").write_text(RUNNER)
    command = [sys.executable, "-m", "flows.running.supervisor", "container", "runner"]
    env = {**psutil.Process().environ(), "PYTHONPATH": f"{PROJECT}:{tmp_path}"}
    with psutil.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "on\n"
        first.terminate()
        assert first.wait(60) == 0
    assert (tmp_path / "left").exists()


def test_process_that_will_not_end_is_killed_and_waited_for() -> None:
    with psutil.Popen([sys.executable, "-c", WILL_NOT_END], stdout=subprocess.PIPE) as stubborn:
        stubborn.stdout.readline()
        end_processes([stubborn], 0.2)
        assert stubborn.returncode == -signal.SIGKILL


def test_process_that_is_gone_needs_no_ending() -> None:
    gone = psutil.Popen(["true"])
    gone.wait()
    end_processes([gone], 0.2)
    assert gone.returncode == 0


def test_exit_code_is_the_commands_own_unless_it_was_told_to_end() -> None:
    assert subprocess.run(guarded("no_such_module"), cwd=PROJECT, stderr=subprocess.DEVNULL, check=False).returncode == 1
    with psutil.Popen(guarded("http.server", "0"), cwd=PROJECT, stderr=subprocess.DEVNULL) as process:
        while not process.children():
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 0
