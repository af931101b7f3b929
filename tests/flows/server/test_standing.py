"""The server that is up for a root is the one its commands use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from flows.server.ephemeral import prefect_server
from flows.server.standing import announced, standing_api


def test_a_run_beside_up_uses_the_server_of_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    home.mkdir()
    with announced("http://127.0.0.1:1/api"):
        with prefect_server() as url:
            assert url == os.environ["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
        assert "PREFECT_API_URL" not in os.environ
    assert standing_api() is None


def test_what_a_killed_up_left_names_no_server(home: Path) -> None:
    home.mkdir()
    script = "import os; from flows.server.standing import announced\nwith announced('http://127.0.0.1:1/api'): os._exit(9)"
    subprocess.run([sys.executable, "-c", script], check=False)
    assert (home / "up.json").is_file()
    assert standing_api() is None


def test_a_second_up_of_a_root_is_refused(home: Path) -> None:
    home.mkdir()
    with announced("http://127.0.0.1:4200/api"):
        done = CliRunner().invoke(app, ["up", "--port", "14299"])
    assert f"up: {home}: a server is up for this root: got http://127.0.0.1:4200/api" in str(done.exception)


def test_status_tells_of_a_server_that_does_not_answer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    home.mkdir()
    with announced("http://127.0.0.1:1/api"):
        now = json.loads(CliRunner().invoke(app, ["status", "--json"]).stdout)
        assert "the server does not answer" in CliRunner().invoke(app, ["status"]).stdout
    assert now == {
        "home": str(home),
        "server": "http://127.0.0.1:1/api",
        "workers": None,
        "running": [],
        "last": None,
        "promoted": [],
    }


def test_status_tells_of_pools_without_workers(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    said = CliRunner().invoke(app, ["status"]).stdout
    assert f"server:   {prefect_api}" in said
    assert "cuda:     no worker is online; amazon-ft worker cuda is one" in said
