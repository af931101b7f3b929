"""Remote files are fetched once, again when they changed, whole or not at all, and no token of theirs is written down."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest

from tasks.reading.downloads import fetch
from tasks.reading.sources import locate_source
from tasks.refs import InputError


def located(*sources: str) -> list[str]:
    return [Path(file.url).name for file in locate_source(sources).files]


def contents(url: str) -> list[str]:
    return [file.read_text() for file in fetch(url)]


def refusal(*sources: str) -> str:
    with pytest.raises(InputError) as refused:
        locate_source(sources)
    return str(refused.value)


class Handler(SimpleHTTPRequestHandler):
    """Serves files; of short/NAME it says more bytes than it sends, of less/NAME only when asked how many there are."""

    gotten: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.gotten.append(self.path)
        self.answer(7 * self.path.startswith("/short/"))

    def do_HEAD(self) -> None:
        self.answer(7 * self.path.startswith(("/short/", "/less/")))

    def answer(self, more: int) -> None:
        file = Path(self.directory) / self.path.partition("?")[0].rpartition("/")[2]
        if not file.exists():
            self.send_error(404, "File not found")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(file.stat().st_size + more))
        self.send_header("Last-Modified", self.date_time_string(file.stat().st_mtime))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(file.read_bytes())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """URL of a web server for the directory `files`."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.json").write_text("a.json")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "files"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def remote(tmp_path: Path, served: str) -> Path:
    """The file behind a.json."""
    assert served
    return tmp_path / "files" / "a.json"


def test_what_did_not_change_is_fetched_once(served: str) -> None:
    Handler.gotten.clear()
    first = fetch(f"{served}/a.json")
    assert fetch(f"{served}/a.json") == first
    assert Handler.gotten == ["/a.json"]
    assert first[0].read_text() == "a.json"


@pytest.mark.parametrize("text", ["b.json", "longer than before"])
def test_what_changed_is_fetched_again(served: str, remote: Path, text: str) -> None:
    assert contents(f"{served}/a.json") == ["a.json"]
    remote.write_text(text)
    os.utime(remote, (10**9, 10**9))
    assert contents(f"{served}/a.json") == [text]


def test_copies_of_last_time_serve_where_nobody_can_be_asked(served: str, remote: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = fetch(f"{served}/a.json")
    remote.unlink()
    assert fetch(f"{served}/a.json") == first
    assert "a.json: 404, message='File not found'" in caplog.text
    first[0].write_text("spoilt")
    with pytest.raises(OSError, match="404"):
        fetch(f"{served}/a.json")


@pytest.mark.parametrize("spoil", [lambda file: file.write_text("A.json"), lambda file: file.unlink()])
def test_a_copy_that_was_spoilt_is_fetched_again(served: str, spoil: Callable[[Path], object]) -> None:
    (file,) = fetch(f"{served}/a.json")
    spoil(file)
    assert contents(f"{served}/a.json") == ["a.json"]


def test_files_of_one_name_are_all_fetched_in_the_order_of_their_paths(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for folder in "ba":
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "trn.json").write_text(folder)
            archive.writestr(f"{folder}/trn.json", folder)
    assert contents(f"local://{tmp_path}/*/trn.json") == ["a", "b"]
    assert contents(f"zip://*/trn.json::file://{tmp_path}/all.zip") == ["a", "b"]
    assert located(f"local://{tmp_path}/*/trn.json") == ["trn.json", "trn.json"]


@pytest.mark.parametrize(
    ("kind", "why"), [("short", "payload is not completed"), ("less", "cut short: got 6 bytes; expected 13")]
)
def test_a_download_cut_short_is_refused_with_the_reason_and_leaves_nothing(served: str, home: Path, kind: str, why: str) -> None:
    message = refusal(f"{served}/{kind}/a.json")
    assert message.startswith(f"ingest.sources: {served}/{kind}/a.json: ")
    assert why in message
    assert [path.name for path in (home / "downloads").rglob("*") if path.is_file()] == []


def test_who_can_not_be_reached_is_said_with_the_reason() -> None:
    assert refusal("http://127.0.0.1:9/x.json").startswith("ingest.sources: http://127.0.0.1:9/x.json: Connect call failed")


def test_a_token_is_neither_written_down_nor_said(served: str, home: Path) -> None:
    assert located(f"{served}/a.json?token=SECRET") == ["a.json"]
    written = [path for path in (home / "downloads").rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if "SECRET" in str(path) or b"SECRET" in path.read_bytes()]
    message = refusal(f"{served}/none.json?token=SECRET")
    assert f"{served}/none.json?...: 404, message='File not found'" in message
    assert "SECRET" not in message


def test_url_of_nothing_is_named_and_leaves_nothing(served: str, home: Path) -> None:
    message = refusal(f"{served}/none.json", "memory://nothing", "nosuch://a.json", f"{served}/also-none.json")
    assert f"ingest.sources: {served}/none.json: " in message
    assert "; memory://nothing: " in message
    assert "; nosuch://a.json: Protocol not known: nosuch; " in message
    assert f"{served}/also-none.json: " in message
    assert not list((home / "downloads").glob("*"))


def test_fsspec_urls_may_be_chained_and_hold_globs(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("one.json", "1")
        archive.writestr("two.json", "2")
    assert located(f"zip://*.json::file://{tmp_path}/all.zip") == ["one.json", "two.json"]
    fsspec.filesystem("memory").pipe("/shards/x.json", b"x")
    assert located("memory://shards/*.json") == ["x.json"]
