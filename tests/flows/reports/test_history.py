"""Runs are found by what a person remembers of them, and compared by settings, data and metrics."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import main as cli
from flows.cli.main import app
from flows.reports.history import compare_runs, find_run, first_difference, listing
from flows.reports.results import Results
from tasks.caching import runs
from tasks.caching.context import open_run
from tasks.refs import Evaluation, InputError, home
from tests.support.records import write_record
from tests.support.tuned import METRICS, artifact_of

PAST = [{"id": "20261124T10-ab"}, {"id": "20261124T09-cd"}, {"id": "20261123T09-ef"}]


@pytest.mark.parametrize(
    ("name", "found"), [("last", 0), ("last~0", 0), ("last~2", 2), ("20261123", 2), ("20261124T09-cd", 1), ("20261124T1", 0)]
)
def test_a_run_by_id_beginning_or_age(name: str, found: int) -> None:
    assert find_run(name, PAST) is PAST[found]


@pytest.mark.parametrize(("name", "got"), [("last~3", "none of 3 runs"), ("2027", "none of 3 runs"), ("20261124", "2 runs")])
def test_what_names_no_run_or_several_is_refused(name: str, got: str) -> None:
    with pytest.raises(InputError, match=f"^run {name}: got {got}; expected one, by its id"):
        find_run(name, PAST)


def test_an_exact_id_is_no_beginning_of_another() -> None:
    assert find_run("a", [{"id": "ab"}, {"id": "a"}]) == {"id": "a"}


def test_data_differs_where_the_first_output_does() -> None:
    one = [{"name": name, "digest": digest} for name, digest in (("ingest", "a"), ("sample", "b"), ("finetune", "c"))]
    other = [one[0], one[1] | {"digest": "x"}, one[2] | {"digest": "y"}]
    assert first_difference(one, other) == ("sample", ["b"], ["x"])
    assert first_difference(one, one[:2]) == ("finetune", ["c"], [])
    assert first_difference(one, list(one)) is None


def made(run_id: str, nll: float, uids: list[str], **config: Any) -> dict[str, Any]:
    """A finished run that evaluated so."""
    rows = [{"uids": [uid], "tokens": 4, "base_nll": 3.5, "tuned_nll": nll} for uid in uids]
    metrics = METRICS | {"tuned": {"nll": nll, "perplexity": 2.0}, "per_row": rows}
    evaluation = artifact_of("evaluation", {"metrics.json": json.dumps(metrics)})
    write_record(run_id, Evaluation(data=evaluation))
    entry = {"name": "evaluate", "key": run_id, "digest": evaluation.digest, "state": "completed"}
    run = runs.Run("demo", config, id=run_id, started=float(len(run_id)), stages=[entry], finished=True)
    run.write()
    return json.loads(run.file.read_text())


def test_two_runs_differ_in_settings_data_and_metrics() -> None:
    found = compare_runs(
        made("a", 0.5, ["u1"], finetune={"seed": 1, "lora": {"r": 8}}),
        made("bb", 0.25, ["u1"], finetune={"seed": 1, "lora": {"r": 16}}),
    )
    assert found.config == [("finetune.lora.r", 8, 16)]
    assert found.data is not None
    assert found.data[0] == "evaluate"
    assert found.metrics == [("nll", 0.5, 0.25), ("perplexity", 2.0, 2.0)]
    assert found.same_rows


def test_figures_of_other_rows_are_told_as_such() -> None:
    made("a", 0.5, ["u1"])
    made("bb", 0.25, ["u2"])
    done = CliRunner().invoke(app, ["compare", "last~1", "last"])
    assert "config: the same" in done.output
    assert "measured on different held-out rows" in done.output
    assert json.loads(CliRunner().invoke(app, ["compare", "a", "bb", "--json"]).output)["same_rows"] is False


def test_runs_are_listed_newest_first_with_how_they_ended() -> None:
    made("a", 0.5, ["u1"])
    runs.Run("demo", {}, id="bb", started=2.0, error="ingest: broken").write()
    runs.Run("demo", {}, id="c", started=1.5).write()
    with open_run("demo", {}) as living:
        assert [(run["id"], run["state"], run["nll"]) for run in listing()] == [
            (living.id, "running", None),
            ("bb", "failed", None),
            ("c", "stopped", None),
            ("a", "completed", 0.5),
        ]
    assert "completed" in CliRunner().invoke(app, ["runs"]).output


def of_another_release(record: str) -> str:
    """The record as 0.1.0 wrote it: the reference alone."""
    return json.dumps({"result": json.loads(json.loads(record)["result"])["value"]})


@pytest.mark.parametrize("spoil", [of_another_release, lambda record: record[:-20], lambda record: "[]"])
def test_a_run_whose_record_can_not_be_read_is_listed_without_its_figures(spoil: Callable[[str], str]) -> None:
    run = made("a", 0.5, ["u1"])
    file = home() / "records" / "a"
    file.write_text(spoil(file.read_text()))
    assert [(row["id"], row["state"], row["nll"]) for row in listing()] == [("a", "completed", None)]
    assert Results(run).seconds(run["stages"][0] | {"state": "cached"}) is None
    assert CliRunner().invoke(app, ["runs"]).exit_code == 0


@pytest.mark.parametrize("options", [[], ["--debug"]])
def test_a_mistake_is_one_message_unless_its_stack_is_asked_for(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["amazon-ft", *options, "compare", "nowhere", "last"])
    with pytest.raises(InputError if options else SystemExit):
        cli.main()
    assert ("run nowhere: got none" in capsys.readouterr().err) != bool(options)
