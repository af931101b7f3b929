"""Sources are found where they are named, and what is no plain file is refused at once."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from tasks.reading.sources import locate_source
from tasks.refs import InputError

HINT = ". Give paths, globs or URLs of data files, or directories that `datasets` saved."


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("b.json", "a.json", "deep/c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def located(*sources: str) -> list[str]:
    return [Path(file.url).name for file in locate_source(sources).files]


def refusal(*sources: str) -> str:
    with pytest.raises(InputError) as refused:
        locate_source(sources)
    return str(refused.value)


def test_files_come_in_the_order_given_and_a_globs_by_name(files: Path) -> None:
    assert located(f"{files}/b.json", f"{files}/a.json") == ["b.json", "a.json"]
    assert located(f"{files}/*.json") == ["a.json", "b.json"]
    assert located(f"{files}/**/*.json") == ["a.json", "b.json", "c.json"]


def test_each_file_comes_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    assert located("b.json", f"{files}/*.json", f"file://{files}/b.json") == ["b.json", "a.json"]


def test_files_are_known_by_their_content(files: Path) -> None:
    [file] = locate_source((f"{files}/a.json",)).files
    assert (file.digest, file.size_bytes) == (hashlib.sha256(b"a.json").hexdigest(), 6)


def test_what_leads_nowhere_is_said_with_all_else(files: Path) -> None:
    (files / "gone.json").symlink_to(files / "away.json")
    (files / "round.json").symlink_to(files / "round.json")
    message = refusal(f"{files}/*.json", f"{files}/{'x' * 300}.json", "~nobody-of-that-name/a.json")
    assert f"{files}/gone.json: is a link to nothing (No such file or directory); expected a file" in message
    assert "round.json: is a link to nothing (Too many levels of symbolic links)" in message
    assert "File name too long" in message
    assert "~nobody-of-that-name/a.json: " in message


def test_name_that_looks_like_a_glob_is_a_name_first(files: Path) -> None:
    (files / "[ab].json").write_text("brackets")
    assert located(f"{files}/[ab].json") == ["[ab].json"]


def test_everything_that_is_wrong_is_listed(files: Path) -> None:
    os.mkfifo(files / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(files / "socket"))
        message = refusal(*(f"{files}/{name}" for name in ("none.json", "*.gz", "pipe", "deep", "a.json", "socket")), "/dev/zero")
    assert message == (
        f"ingest.sources: {files}/none.json: not found; {files}/*.gz: not found; {files}/pipe: is a named pipe; expected a file; "
        f"{files}/deep: is a directory; expected a file; {files}/socket: is a socket; expected a file; "
        f"/dev/zero: is a device; expected a file{HINT}"
    )


def test_name_that_no_record_could_hold_is_refused(files: Path) -> None:
    (files / os.fsdecode(b"caf\xe9.odd")).write_text("{}")
    with pytest.raises(InputError, match=r"is named in bytes that are no UTF-8; expected a file"):
        locate_source((str(files / "*.odd"),))


def test_unreadable_file_is_named(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root reads every file
        monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "a.json")
    (files / "a.json").chmod(0)
    assert refusal(f"{files}/*.json").startswith(
        f"ingest.sources: {files}/a.json: is closed to this user (check its permissions); expected a file"
    )
