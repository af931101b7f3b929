"""Checkpoints that a killed training left half sealed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.caching import files
from tasks.training.checkpoints import damage_of, newest_intact, seal


class Killed(BaseException):
    """Stands for a SIGKILL."""


def test_a_seal_that_was_killed_leaves_nothing_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / "adapter").write_bytes(b"weights")

    def killed(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_synced", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # nothing is put in order after a SIGKILL
        with pytest.raises(Killed):
            seal(checkpoint)
    assert len(list(checkpoint.glob(".manifest.json.*"))) == 1
    assert newest_intact(tmp_path) is None
    seal(checkpoint)
    assert sorted(path.name for path in checkpoint.iterdir()) == ["adapter", "manifest.json"]
    assert damage_of(checkpoint) is None
