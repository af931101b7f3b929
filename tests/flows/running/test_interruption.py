"""A signal ends a process wherever it is, and with the code of that signal; a second Ctrl-C at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from flows.running.interruption import TWICE_SECONDS
from tests.support.checkout import PROJECT

PROGRAM = """
import signal, sys, time
from flows.running.interruption import Interrupted, be_interruptible
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
be_interruptible()
try:
    try:
        print("on", flush=True)
        time.sleep(900)
    except Exception:
        print("caught", flush=True)
    finally:
        print("lets go", flush=True)
        time.sleep({seconds})
except Interrupted as end:
    sys.exit(end.exit_code)
"""


@pytest.mark.parametrize(
    ("how", "seconds"), [(signal.SIGTERM, 0.2), (signal.SIGINT, 0.2), (signal.SIGHUP, 0), (signal.SIGINT, 900)]
)
def test_a_signal_sent_twice_is_one_and_ctrl_c_later_on_waits_for_nothing(how: signal.Signals, seconds: float) -> None:
    command = [sys.executable, "-c", PROGRAM.format(seconds=seconds)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        process.send_signal(how)
        assert process.stdout.readline() == "lets go\n"
        process.send_signal(how)  # `timeout` does so
        if seconds == 900:
            time.sleep(TWICE_SECONDS)
            process.send_signal(signal.SIGINT)
        code = process.wait(60)
        assert (code if code >= 0 else 128 - code) == 128 + how  # as a shell has it: Python may have let go of signals already
