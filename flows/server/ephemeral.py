"""A Prefect server for one process: started with it, ended with it, however it ends.

Prefect's own ephemeral server stays behind when its parent is killed; this one runs guarded (flows/running/supervisor.py), in a
session of its own, so that a run which is interrupted can still tell it how it ended.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

from flows.running.supervisor import INNER, end_processes, guarded
from flows.server.standing import standing_api
from tasks.caching.context import check_root
from tasks.refs import PipelineError, home

START_SECONDS = 180
STOP_SECONDS = 5.0
SERVER = ("prefect.server.api.server:create_app", "--factory", "--host", "127.0.0.1", "--log-level", "error", "--lifespan", "on")
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",  # only pages ask for them, and it is a quarter of the start
    "PREFECT_LOGGING_LEVEL": "ERROR",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}


@contextmanager
def prefect_server() -> Generator[str]:
    """The API to run against: PREFECT_API_URL when it is set, else of the server that is up for this root, else of one of our
    own for the block: two servers on one SQLite database lock each other out.

    Raises:
        InputError: when nothing can be written under AMAZON_FT_HOME.
        PipelineError: when the server does not come up; names its log.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        yield url
        return
    check_root()
    if url := standing_api():
        with _named(url):
            yield url
        return
    log = home() / "prefect-server.log"
    with log.open("wb") as output:
        port = _free_port()
        command = guarded(INNER, "uvicorn", *SERVER, "--port", str(port))
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | QUIET, start_new_session=True)
        url = f"http://127.0.0.1:{port}/api"
        try:
            with _named(url):
                wait_until_healthy(url, process, log)
                yield url
        finally:
            end_processes([process], STOP_SECONDS)


@contextmanager
def _named(url: str) -> Generator[None]:
    os.environ["PREFECT_API_URL"] = url
    try:
        yield
    finally:
        _send_last_logs()
        del os.environ["PREFECT_API_URL"]


def _send_last_logs() -> None:
    """Hand the server what Prefect's log thread still holds; at the exit it would try for a minute to reach one that is gone."""
    if "prefect.logging.handlers" in sys.modules:
        from prefect.logging.handlers import APILogHandler

        APILogHandler().flush()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(url: str, process: psutil.Popen, log: Path) -> None:
    """Return once the server answers.

    Raises:
        PipelineError: when it does not, or ends before; names its log.
    """
    import httpx

    give_up = time.monotonic() + START_SECONDS
    with httpx.Client() as client:
        while time.monotonic() < give_up and process.poll() is None:
            try:
                if client.get(f"{url}/health", timeout=2).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
    raise PipelineError(f"Prefect server: did not answer within {START_SECONDS} s; expected {url}/health. Its log is {log}.")
