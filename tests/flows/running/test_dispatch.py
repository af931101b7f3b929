"""What a training on another machine leaves is found, or it is said why not."""

from __future__ import annotations

import pytest

from flows.recipes import load_recipe
from flows.running import dispatch
from tasks.refs import Artifact, HeldOut, Model, PipelineError, Prepared, Special, Tokenizer


def test_a_worker_that_left_no_record_is_told_of_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "flow_run_id", lambda: "run")
    monkeypatch.setattr(dispatch, "run_child", lambda *_: None)
    rows, tokenizer = Artifact(kind="tokens", digest="t"), Tokenizer(path="/t", digest="t", special=Special(bos=None, eos="</s>"))
    held_out = HeldOut(tokens=rows, texts=rows, template=rows, tokenizer=tokenizer)
    prepared = Prepared(model=Model(path="/m", digest="m", name="m", tokenizer=tokenizer), batches=rows, held_out=held_out)
    with pytest.raises(
        PipelineError, match=r"completed, but finetune is not recorded under .*: first run; expected .* same code"
    ):
        dispatch.dispatch(load_recipe("demo"), prepared, lambda *_: None)
