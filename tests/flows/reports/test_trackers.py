"""What a tracker is told of a run can be read back from its own store."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.recipes import load_recipe
from flows.reports.trackers import Told, check_tracking, gather, tell_mlflow, track
from flows.running.naming import short_digest
from tasks.caching import runs
from tasks.config import TrackingConfig
from tasks.refs import Adapter, ConfigError, Evaluation, SavedModel, home
from tests.support.tuned import METRICS, artifact_of

MLFLOW = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
"""mlflow's SQL store on SQLAlchemy 2.1: https://github.com/mlflow/mlflow/blob/master/mlflow/store/tracking/dbmodels/models.py"""
RECIPE = load_recipe("demo", ["tracking.report_to=mlflow"])
STEPS = [{"step": step, "loss": 4.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 50} for step in (1, 2)]


@pytest.fixture
def run(home: Path) -> Iterator[runs.Run]:
    with runs.run_record("demo", RECIPE.model_dump(mode="json")) as run:
        log = artifact_of("log", {"train_log.jsonl": "\n".join(map(json.dumps, STEPS))})
        note(run, "finetune", Adapter(data=artifact_of("adapter", {"w": "w"}), log=log))
        note(run, "evaluate", Evaluation(data=artifact_of("evaluation", {"metrics.json": json.dumps(METRICS)})))
        yield run


def note(run: runs.Run, name: str, value: Any) -> None:
    (home() / "records").mkdir(exist_ok=True)
    (home() / "records" / name).write_text(json.dumps({"result": value.model_dump_json()}))
    run.stages.append({"name": name, "key": name, "state": "completed", "digest": value.data.digest})


def saved_model() -> SavedModel:
    return SavedModel(data=artifact_of("saved-model", {"README.md": "card", "metrics.json": "{}"}), name="m")


@MLFLOW
def test_mlflow_gives_back_params_metrics_digests_and_files(run: runs.Run, home: Path) -> None:
    from mlflow.tracking import MlflowClient

    (home / "report.html").write_text("<html>")
    track(RECIPE, saved_model(), home / "report.html")
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'tracking' / 'mlflow' / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("amazon-ft").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["finetune.learning_rate"] == "0.002"
    assert len(found.data.params) > 60
    assert (found.data.metrics["base.nll"], found.data.metrics["tuned.perplexity"]) == (3.5, 1.284)
    assert found.data.tags["digest.evaluate"] == run.stages[1]["digest"]
    assert found.data.tags["amazon_ft.run"] == run.id
    assert [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, "loss")] == [(1, 4.0), (2, 2.0)]
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"README.md", "metrics.json", "report.html"}


def test_tensorboard_gives_back_every_step(run: runs.Run, home: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = load_recipe("demo", ["tracking.report_to=tensorboard"])
    track(recipe, saved_model(), None)
    events = EventAccumulator(str(home / "tracking" / "tensorboard" / run.id)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 4.0), (2, 2.0)]
    assert events.Scalars("evaluation/tuned/nll")[0].value == 0.25


@MLFLOW
def test_a_long_training_is_told_in_whole(home: Path) -> None:
    from mlflow.tracking import MlflowClient

    steps = [(step, {"loss": 1.0, "tokens": 2.0}) for step in range(1, 1301)]
    told = Told("name", "id", {f"p{index}": index for index in range(230)}, steps, {}, {}, [])
    uri = f"sqlite:///{home.parent / 'own.db'}"
    tell_mlflow(told, TrackingConfig(report_to="mlflow", project="mine", uri=uri))
    client = MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert len(client.get_metric_history(found.info.run_id, "tokens")) == 1300
    assert len(found.data.params) == 230


def test_a_tracker_that_fails_is_a_warning(
    run: runs.Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flows.reports.trackers.gather", lambda *_: 1 / 0)
    with caplog.at_level(logging.WARNING):
        track(RECIPE, saved_model(), None)
    assert caplog.messages == ["mlflow could not be told of this run (ZeroDivisionError: division by zero)."]


def test_a_tracker_that_is_not_installed_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.reports.trackers.find_spec", lambda _: None)
    check_tracking(TrackingConfig())
    with pytest.raises(ConfigError, match=r"wandb is not installed; .* pip install 'amazon-ft\[wandb\]'"):
        check_tracking(TrackingConfig(report_to="wandb"))


def test_tracking_is_no_part_of_what_a_run_is(run: runs.Run) -> None:
    from dataclasses import asdict

    assert short_digest(RECIPE) == short_digest(load_recipe("demo"))
    told = gather(asdict(run), RECIPE, saved_model(), None)
    assert not any(name.startswith("tracking") for name in told.params)
