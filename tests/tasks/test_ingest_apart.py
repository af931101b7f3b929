"""Rows that other processes parse and clean are those that one process makes; whatever becomes of the others."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

import tasks.ingest as stage
from flows.bench.products import product_lines
from tasks.config import IngestConfig
from tasks.ingest import ingest
from tasks.reading.columns import AS_WRITTEN, Wanted
from tasks.reading.files import apart
from tasks.reading.files.apart import Cleaner, CleanLines, Crew, crew_of, read_answer, write_answer
from tasks.reading.files.blocks import read_stretches
from tasks.reading.files.stretches import Stretch
from tasks.reading.sources import locate_source
from tasks.refs import InputError, Products
from tests.support import fuzz
from tests.support.checkout import PROJECT

pytestmark = pytest.mark.heavy

GOOD = [b'{"uid": "%d", "title": "Pan &amp; %d", "content": "Cast iron."}' % (number, number % 90) for number in range(100)]
BAD = b'{"uid": "6", "title": "Cut off", "con'


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source counts as large, and there are three cores."""
    monkeypatch.setattr(stage, "ASIDE_BYTES", 1)
    monkeypatch.setattr(stage, "cores", lambda: 3)


def children() -> list[psutil.Process]:
    """The living ones that parse and clean."""
    found = list[psutil.Process]()
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has just ended
            found += [child] * any(apart.__name__ in word for word in child.cmdline())
    return found


def settings(path: Path, **changes: Any) -> IngestConfig:
    wanted: dict[str, Any] = {"sources": (str(path),), "on_bad_row": "quarantine", "max_bad_share": 1}
    return IngestConfig(**wanted | changes)


def run_alone(path: Path, **changes: Any) -> Products:
    config = settings(path, block_bytes=2**16, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "cores", lambda: 1)
        patch.setattr(stage, "crew_of", lambda *_: pytest.fail("started processes"))
        return ingest.fn(locate_source(config.sources), config)


def run(path: Path, block_bytes: int = 500, **changes: Any) -> Products:
    """Run by a crew, on stretches that may be shorter than the settings allow blocks to be."""

    def read(path: Path, config: IngestConfig, wanted: Wanted) -> Iterator[tuple[Stretch, float]]:
        return read_stretches(path, config.model_copy(update={"block_bytes": block_bytes}), wanted)

    config = settings(path, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "read_stretches", read)
        return ingest.fn(locate_source(config.sources), config)


@contextmanager
def told_of() -> Generator[list[tuple[bool, bool]]]:
    """(by another process, done) of each stretch."""
    told = list[tuple[bool, bool]]()
    with pytest.MonkeyPatch.context() as patch:
        for kind in (apart.Cleaner, apart.CleanerApart):

            def clean(self: Any, stretch: Stretch, kind: Any = kind, before: Any = kind.clean) -> Any:
                cleaned = before(self, stretch)
                told.append((kind is apart.CleanerApart, cleaned is not None))
                return cleaned

            patch.setattr(kind, "clean", clean)
        yield told


SOURCES = {
    "good": b"\n".join(GOOD) + b"\n",
    "without a last line break": b"\n".join(GOOD),
    "CRLF": b"\r\n".join(GOOD),
    "byte order mark": b"\xef\xbb\xbf" + b"\n".join(GOOD),
    "bad lines": b"\n".join([*GOOD[:40], BAD, *GOOD[40:], b"\xff", b"", b'{"title": "a"}']),
    "bad first line": b"\n".join([BAD, *GOOD]),
    "blank lines": b"\n\n".join(GOOD),
    "long lines": b"\n".join([*GOOD[:30], *(GOOD[0].replace(b"iron", b"i" * size) for size in (1800, 9999)), *GOOD[30:]]),
    "numbers": b"\n".join(line.replace(b'"uid": "7"', b'"uid": 7') for line in GOOD),
    "without uids": b"\n".join(line.replace(b'"uid"', b'"id"') for line in GOOD),
    "empty for long": b"\n".join([*GOOD[:40], *[b'{"uid": "7", "title": " ", "content": ""}'] * 60]),
    "all bad": b"\n".join([GOOD[0], *[BAD] * 99]),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_a_crew_makes_what_one_process_makes(
    large: None, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stage, "cores", lambda: 2)
    path = tmp_path / "trn.json"
    path.write_bytes(SOURCES[name])
    alone = run_alone(path, max_line_bytes=1024)
    for block_bytes in (1, 500):
        assert run(path, block_bytes, max_line_bytes=1024) == alone
    assert "ended" not in caplog.text


def test_a_crew_makes_of_a_fuzz_corpus_what_one_process_makes(large: None, tmp_path: Path) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(fuzz.corpus(3000, seed=12))
    with told_of() as told:
        assert run(path, 2**15, max_line_bytes=8_000_000) == run_alone(path, max_line_bytes=8_000_000)
    assert {(True, True), (True, False)} <= {*told}


def test_several_files_are_numbered_each_by_itself(large: None, tmp_path: Path) -> None:
    for number, end in enumerate((b"\n", b"")):
        (tmp_path / f"part-{number}.json").write_bytes(b"\n".join([*GOOD[50 * number : 50 * number + 50], BAD]) + end)
    products = run(tmp_path / "part-*.json")
    assert products == run_alone(tmp_path / "part-*.json")
    assert products.rejects is not None
    rejects = map(json.loads, (products.rejects / "rejects.jsonl").read_text().splitlines())
    assert [(reject["file"], reject["line"]) for reject in rejects] == [("part-0.json", 51), ("part-1.json", 51)]


def test_bad_line_is_told_with_its_number(large: None, tmp_path: Path) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"\n".join([*GOOD, BAD]))
    with pytest.raises(InputError, match=r"^trn.json line 101: malformed JSON at character 34"):
        run(path, on_bad_row="fail")


def test_rows_are_cleaned_in_both(large: None, tmp_path: Path) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"".join(product_lines(5000)))
    with told_of() as told:
        assert run(path, 2**15) == run_alone(path)
    assert {*told} == {(True, True), (False, True)}
    assert not children()


def test_another_process_declines_what_is_not_well_formed(tmp_path: Path) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(GOOD[0] + b"\n" + BAD + b"\n" + GOOD[1])
    good = Stretch(str(path), 0, len(GOOD[0]) + 1)
    bad = Stretch(str(path), good.size, len(BAD) + 1)
    with crew_of(1, IngestConfig(), AS_WRITTEN) as crew:
        other = crew._idle.get()  # pyright: ignore[reportPrivateUsage]
        for stretch in (good, bad, good, Stretch(str(path), bad.start + bad.size, 2**20)):
            cleaned, here = other.clean(stretch), Cleaner(IngestConfig(), AS_WRITTEN).clean(stretch)
            assert (cleaned is None) == (here is None) == (stretch == bad)
            if cleaned and here:
                assert cleaned.table == here.table
                assert cleaned.hashes.tolist() == here.hashes.tolist()
                assert (cleaned.dropped, cleaned.lines) == (here.dropped, here.lines)
        told = crew._idle  # pyright: ignore[reportPrivateUsage]
        assert told.empty()


def test_an_answer_that_ends_before_its_rows_is_none() -> None:
    table = pa.table({"uid": ["1", "2"], "title": ["a", "b"], "content": ["c", "d"]})
    cleaned = CleanLines(table, np.ones((2, 2), np.uint64), {"empty title": 1}, 3)
    whole, bare = io.BytesIO(), io.BytesIO()
    write_answer(whole, cleaned)
    write_answer(bare, cleaned._replace(table=table[:0], hashes=cleaned.hashes[:, :0]))
    got = read_answer(io.BytesIO(whole.getvalue()))
    assert got is not None
    assert (got.table, got.dropped, got.lines) == (table, {"empty title": 1}, 3)
    end = len(bare.getvalue()) - 8  # the mark of a stream's end
    assert whole.getvalue()[: end - 1] == bare.getvalue()[: end - 1]
    for size in (0, 5, end - 1, end, len(whole.getvalue()) - 9):
        with pytest.raises((ValueError, OSError)):
            read_answer(io.BytesIO(whole.getvalue()[:size]))


def test_columns_are_named_as_they_are_in_any_locale(large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"\n".join(line.replace(b'"uid"', '"código"'.encode()) for line in GOOD))
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    columns = {"uid": "código"}
    with told_of() as told:
        assert run(path, columns=columns) == run_alone(path, columns=columns)
    assert (True, True) in told


def test_a_file_that_changes_while_its_last_stretch_is_read_is_refused(
    large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"\n".join(GOOD))
    before, size = Crew.clean, path.stat().st_size

    def clean(self: Crew, stretch: Stretch) -> Any:
        if stretch.start + stretch.size == size:
            time.sleep(0.5)  # all stretches have been drawn
            path.write_bytes(b"\n".join(reversed(GOOD)))
        return before(self, stretch)

    monkeypatch.setattr(Crew, "clean", clean)
    with pytest.raises(InputError, match="changed while it was read"):
        run(path)


def test_what_a_process_that_ends_leaves_undone_is_done_here(
    large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"\n".join(GOOD))
    before = Crew.clean

    def clean(self: Crew, stretch: Stretch) -> Any:
        if stretch.start:
            for child in children():
                child.kill()
        return before(self, stretch)

    monkeypatch.setattr(Crew, "clean", clean)
    assert run(path) == run_alone(path)
    assert caplog.text.count("ended with exit code -9; its part is done in this one") == 1


@pytest.mark.parametrize(
    "command", [["false"], [sys.executable, "-c", "print('null or not')"], [sys.executable, "-c", "print({})"]]
)
def test_a_process_that_answers_nonsense_is_done_without(
    large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"\n".join(GOOD))
    monkeypatch.setattr(apart, "process_of", lambda *_: (command, dict(os.environ)))
    assert run(path) == run_alone(path)
    assert not children()


def test_a_process_that_runs_other_code_is_done_without(
    large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"\n".join(GOOD))
    shutil.copytree(PROJECT / "tasks", tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    command, environment = apart.process_of(apart.__name__, apart.answer_all.__name__)
    edited = environment | {"PYTHONPATH": f"{tmp_path}:{environment['PYTHONPATH']}"}
    monkeypatch.setattr(apart, "process_of", lambda *_: (command, edited))
    assert run(path) == run_alone(path)
    assert caplog.text == ""  # it is what was read just now
    edit = tmp_path / "tasks/reading/cleaning.py"
    edit.write_bytes(edit.read_bytes() + b"\n")
    assert run(path) == run_alone(path)
    assert caplog.text.count("runs code that was edited since this one was started; its part is done in this one") == 1


def test_a_crew_takes_over_what_was_begun_ahead(large: None, tmp_path: Path) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"\n".join(GOOD))
    assert stage.processes_beside([path], IngestConfig(kind="products")) == 2
    apart.begin_ahead(2)
    begun = {child.pid for child in children()}
    apart.begin_ahead(2)
    assert {child.pid for child in children()} == begun
    with crew_of(1, IngestConfig(), AS_WRITTEN) as crew:
        assert crew.clean(Stretch(str(path), 0, 2**20))
        assert {child.pid for child in children()} == begun
    [left] = children()
    assert left.pid in begun
    apart.end_begun()
    assert not children()


def test_no_process_is_left_by_a_stage_that_fails(large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"\n".join([*GOOD, BAD]))
    started = list[int]()
    before = apart.CleanerApart.__init__

    def begin(self: Any, process: Any, task: Any) -> None:
        started.append(process.pid)
        before(self, process, task)

    monkeypatch.setattr(apart.CleanerApart, "__init__", begin)
    with pytest.raises(InputError):
        run(path, on_bad_row="fail")
    assert len(started) == 2
    assert not [pid for pid in started if psutil.pid_exists(pid)]


PARENT = """
import sys, time
from tasks.config import IngestConfig
from tasks.reading.columns import AS_WRITTEN, Wanted
from tasks.reading.files.apart import crew_of
from tasks.reading.files.blocks import read_stretches
from tasks.reading.files.stretches import Stretch
with crew_of(2, IngestConfig(), AS_WRITTEN) as crew:
    crew.clean(Stretch(sys.argv[1], 0, 1000))
    print("ready", flush=True)
    time.sleep(900)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_others_end_with_the_one_that_began_them(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"\n".join(GOOD))
    command = [sys.executable, "-c", PARENT, str(path)]
    environment = os.environ | {"PYTHONPATH": f"{PROJECT}:{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        others = psutil.Process(parent.pid).children()
        assert len(others) == 2
        parent.send_signal(number)
        parent.wait(60)
    _, alive = psutil.wait_procs(others, timeout=60)
    assert not alive


def test_the_others_leave_an_interrupt_to_the_one_that_began_them(tmp_path: Path) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"\n".join(GOOD))
    stretch = Stretch(str(path), 0, 2**20)
    with crew_of(1, IngestConfig(), AS_WRITTEN) as crew:
        assert crew.clean(stretch)
        [child] = children()
        child.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert crew.clean(stretch)
        assert child.is_running()


@pytest.mark.parametrize("case", ["small", "packed", "conversations"])
def test_none_is_started_for_what_it_would_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(stage, "crew_of", lambda *_: pytest.fail("was started"))
    monkeypatch.setattr(stage, "cores", lambda: 3)
    path = tmp_path / "trn.json"
    data = b"\n".join(GOOD)
    if case == "packed":
        monkeypatch.setattr(stage, "ASIDE_BYTES", 1)
        data = gzip.compress(data)
    if case == "conversations":
        monkeypatch.setattr(stage, "ASIDE_BYTES", 1)
        data = b'{"instruction": "a", "output": "b"}\n' * 3
    path.write_bytes(data)
    assert run(path).data.rows
