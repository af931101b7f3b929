"""What a run does before its first stage, while a large source is digested."""

from __future__ import annotations

import json
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from subprocess import Popen

import pytest

from flows import pipeline
from flows.recipes import build_recipe
from tasks.caching import files
from tasks.config import Recipe
from tasks.reading.files import apart
from tasks.text import encoding
from tests.support.here import make_here
from tests.support.tiny import make_tiny_model
from tests.support.tiny_recipe import TINY


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe on rows of a file and a tiny model."""
    source, model = tmp_path / "trn.json", make_tiny_model(tmp_path / "model")
    rows = [{"uid": str(row), "title": f"Pan {row}", "content": f"Cast iron, {row} kg."} for row in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    time.sleep(files.RACY_SECONDS * 1.5)  # the digest of a file that was just written is not kept
    changes = {"name": "tiny", "ingest": {"sources": [str(source)]}, "model": TINY["model"] | {"id": str(model)}}
    return build_recipe(TINY | changes)


def test_a_large_source_is_digested_aside_and_the_tokenizer_loaded_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = list[Path](), encoding.load_tokenizer_json
    monkeypatch.setattr(files, "ASIDE_BYTES", 1)
    monkeypatch.setattr(encoding, "load_tokenizer_json", lambda path: loaded.append(path) or load(path))
    digested_here, read = list[str](), files.read_digest
    monkeypatch.setattr(files, "read_digest", lambda file: digested_here.append(file.name) or read(file))
    assert "tokenize" in make_here(recipe, "tokenize")
    assert loaded == [Path(recipe.model.id)]
    assert recipe.ingest.sources[0] not in map(str, digested_here)


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_begun_while_a_large_source_is_digested_ends_with_ingest(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    begun, begin = list[Popen[bytes]](), apart._begin  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(apart, "_begin", lambda: begun.append(begin()) or begun[-1])
    monkeypatch.setattr(files, "ASIDE_BYTES", 1)
    monkeypatch.setattr(pipeline, "processes_beside", lambda *_: 2)
    if fails:
        monkeypatch.setattr(pipeline, "read_products", lambda *_: pytest.fail("no products"))
    with pytest.raises(pytest.fail.Exception) if fails else nullcontext():
        make_here(recipe, "ingest")
    assert [process.poll() for process in begun] == [-signal.SIGKILL] * 2


def test_nothing_is_loaded_ahead_for_a_small_source(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_ahead", lambda _: pytest.fail("was loaded"))
    assert make_here(recipe, "ingest") == ["ingest"]
