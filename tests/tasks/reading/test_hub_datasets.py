"""Data sets of the Hub are read by owner, name, revision and path; the Hub's routes are answered by a server here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.checkout import PROJECT
from tests.support.rows import WRITERS

pytestmark = pytest.mark.heavy

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
LOCATE = """
import json, sys
from tasks.reading.sources import locate_source
from tasks.refs import InputError
try:
    print(json.dumps([[file.url, file.digest] for file in locate_source((sys.argv[1],)).files]))
except InputError as error:
    print(json.dumps(str(error)))
"""


class Hub(BaseHTTPRequestHandler):
    """The data set org/pans with two revisions. Source of the routes: https://huggingface.co/docs/hub/api."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {}
    """{commit: {path: content}}."""
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(body.get("paths", []))

    def answer(self, paths: list[str] | None = None) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        match path.strip("/").split("/"):
            case ["api", "datasets", "org", "pans", "revision", name] if commit := self.commit(name):
                self.send({"id": "org/pans", "sha": commit, "siblings": []})
            case ["api", "datasets", "org", "pans"]:
                self.send({"id": "org/pans", "sha": COMMITS["main"], "siblings": []})
            case ["api", "datasets", "org", "pans", "paths-info", name] if commit := self.commit(name):
                self.send([entry for entry in self.entries(commit, "", True) if entry["path"] in (paths or [])])
            case ["api", "datasets", "org", "pans", "tree", name, *folder] if commit := self.commit(name):
                self.send(self.entries(commit, "/".join(folder), "recursive=true" in self.path.lower()))
            case ["datasets", "org", "pans", "resolve", name, *file] if commit := self.commit(name):
                self.send_file(commit, self.files[commit].get("/".join(file)))
            case _:
                self.send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def commit(self, name: str) -> str | None:
        return COMMITS.get(name) or (name if name in self.files else None)

    def entries(self, commit: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for path, content in self.files[commit].items():
            rest = path.removeprefix(f"{folder}/" if folder else "")
            if folder and rest == path:
                continue
            for end in range(1, len(rest.split("/"))):
                name = "/".join([*filter(None, [folder]), *rest.split("/")[:end]])
                found[name] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
            found[path] = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": path}
        depth = folder.count("/") + bool(folder)
        return [entry for path, entry in found.items() if recursive or path.count("/") == depth]

    def send_file(self, commit: str, content: bytes | None) -> None:
        if content is None:
            self.send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "X-Linked-Size": str(len(content))}
        self.write(content, 200, etag)

    def send(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.write(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def write(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the server; revision v1 has other rows than main."""
    folder = tmp_path_factory.mktemp("hub")
    for revision, commit in COMMITS.items():
        rows = [{"title": f"Pan {number}", "content": revision} for number in range(3)]
        parquet, lines = (WRITERS[name](folder / f"{revision}.{name}", rows).read_bytes() for name in ("parquet", "jsonl"))
        names = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet")
        Hub.files[commit] = dict.fromkeys(names, parquet) | {"raw/pans.jsonl": lines, "README.md": b"# Pans"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def located(hub: str, home: Path, source: str) -> Any:
    """What a process of its own finds, for the Hub's library reads its settings once."""
    own = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf"), "NO_PROXY": "127.0.0.1"}
    env = os.environ | own | {"AMAZON_FT_HOME": str(home), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", LOCATE, source], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_data_set_stands_for_the_parquet_files_of_its_training_split_and_is_fetched_once(hub: str, home: Path) -> None:
    found = located(hub, home, "hf://datasets/org/pans")
    names = [f"train-0000{number}-of-00002.parquet" for number in range(2)]
    assert [Path(url).name for url, _ in found] == names
    assert {one for _, one in found} == {digest(Hub.files[COMMITS["main"]][f"data/{names[0]}"])}
    Hub.asked.clear()
    assert located(hub, home, "hf://datasets/org/pans") == found
    assert not [line for line in Hub.asked if line.startswith("GET") and "/resolve/" in line]


@pytest.mark.parametrize(("revision", "commit"), [("", "main"), ("@v1", "v1"), (f"@{COMMITS['v1']}", "v1")])
def test_a_file_of_a_revision_is_read_as_it_is_there(revision: str, commit: str, hub: str, home: Path) -> None:
    [[url, found]] = located(hub, home, f"hf://datasets/org/pans{revision}/raw/*.jsonl")
    assert (Path(url).name, found) == ("pans.jsonl", digest(Hub.files[COMMITS[commit]]["raw/pans.jsonl"]))


def test_a_data_set_of_a_revision_stands_for_its_training_split(hub: str, home: Path) -> None:
    found = located(hub, home, "hf://datasets/org/pans@v1")
    assert {one for _, one in found} == {digest(Hub.files[COMMITS["v1"]]["data/train-00000-of-00002.parquet"])}


def test_a_data_set_that_is_not_there_is_named(hub: str, home: Path) -> None:
    message = located(hub, home, "hf://datasets/org/lids/raw/x.jsonl")
    assert message.startswith("ingest.sources: hf://datasets/org/lids/raw/x.jsonl: ")
