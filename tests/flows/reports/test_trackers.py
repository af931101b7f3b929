"""What a tracker is told of a run can be read back from its own store, while it trains and after."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from flows.recipes import load_recipe, short_digest
from flows.reports.subscribers import subscribers
from flows.reports.trackers import TRACKERS, MlflowTracker, Outcome, TrackedRun, Tracking, check_tracking
from tasks.caching.context import open_run, tell
from tasks.caching.events import ModelSaved, RunBegan, RunEnded, StageEnded, TrainingLeft
from tasks.caching.runs import Run
from tasks.config import TrackingConfig
from tasks.refs import Adapter, ConfigError, Evaluation, SavedModel, home
from tasks.training.watch import Watch
from tests.support.records import write_record
from tests.support.tiny import make_tiny_model, tiny_reference, tiny_tokens
from tests.support.train_tiny import train
from tests.support.tuned import METRICS, artifact_of

pytestmark = pytest.mark.heavy

MLFLOW = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
"""mlflow's SQL store on SQLAlchemy 2.1: https://github.com/mlflow/mlflow/blob/master/mlflow/store/tracking/dbmodels/models.py"""
RECIPE = load_recipe("demo", ["tracking.report_to=mlflow"])
BOARD = load_recipe("demo", ["tracking.report_to=tensorboard"])
STEPS = [{"step": step, "loss": 4.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 50} for step in (1, 2)]
PATIENCE_SECONDS = 120


@pytest.fixture(scope="module", autouse=True)
def readers() -> None:
    """What reads the stores, imported before a tracker's own thread may be importing it: mlflow stands no two imports at once."""
    import_module("mlflow.tracking")
    import_module("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture
def run(home: Path) -> Iterator[Run]:
    with open_run("demo", RECIPE.model_dump(mode="json")) as run:
        yield run


def adapter() -> Adapter:
    log = artifact_of("log", {"train_log.jsonl": "\n".join(map(json.dumps, STEPS))})
    return Adapter(data=artifact_of("adapter", {"w": "w"}), log=log)


def hear_a_run(tracking: Tracking, run: Run, page: Path | None = None) -> None:
    """Tell a tracker of a run that is served from the cache."""
    for name, value in (
        ("finetune", adapter()),
        ("evaluate", Evaluation(data=artifact_of("evaluation", {"metrics.json": json.dumps(METRICS)}))),
    ):
        write_record(name, value)
        run.stages.append({"name": name, "key": name, "state": "cached", "digest": value.data.digest})
    saved = SavedModel(data=artifact_of("saved-model", {"README.md": "card", "metrics.json": "{}"}), name="m")
    run.finished = True
    events = (
        RunBegan(run),
        StageEnded(run.stages[0], {}, adapter()),
        ModelSaved(run, saved, home() / "link", page),
        RunEnded(run),
    )
    for event in events:
        tracking.hear(event)


def mlflow_client(root: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root / 'tracking' / 'mlflow' / 'mlflow.db'}")


def mlflow_losses(root: Path) -> dict[int, float]:
    client = mlflow_client(root)
    experiment = client.get_experiment_by_name("amazon-ft")
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    return {point.step: point.value for run in found for point in client.get_metric_history(run.info.run_id, "loss")}


def tensorboard_losses(root: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder in (root / "tracking" / "tensorboard").glob("*"):
        events = EventAccumulator(str(folder)).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            return {event.step: event.value for event in events.Scalars("train/loss")}
    return {}


@MLFLOW
@pytest.mark.parametrize(
    ("recipe", "losses"), [(RECIPE, mlflow_losses), (BOARD, tensorboard_losses)], ids=["mlflow", "tensorboard"]
)
def test_the_loss_of_step_5_is_shown_while_step_6_trains(
    recipe: Any, losses: Callable[[Path], dict[int, float]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = tiny_reference(make_tiny_model(home.parent / "tiny")), tiny_tokens(40)
    seen: dict[int, float] = {}
    micro_step, stepped = Watch.micro_step, [0]

    def look(self: Watch, *args: Any) -> None:
        stepped[0] += 1
        if stepped[0] == 6:
            give_up = time.monotonic() + PATIENCE_SECONDS
            while 5 not in seen and time.monotonic() < give_up:
                seen.update(losses(home))
        micro_step(self, *args)

    monkeypatch.setattr(Watch, "micro_step", look)
    with open_run("demo", {}, observers=subscribers(recipe.tracking)):
        log = train(model, rows, batch_size=2, gradient_accumulation=1, logging_steps=1, save_steps=4, max_steps=8).log
    wanted = {step["step"]: step["loss"] for step in map(json.loads, (log / "train_log.jsonl").read_text().splitlines())}
    assert seen == pytest.approx({step: wanted[step] for step in range(1, 6)}, rel=1e-6)
    assert losses(home) == pytest.approx(wanted, rel=1e-6)


@MLFLOW
def test_mlflow_gives_back_params_metrics_digests_and_files(run: Run, home: Path) -> None:
    (home / "report.html").write_text("<html>")
    hear_a_run(Tracking(RECIPE.tracking), run, home / "report.html")
    client = mlflow_client(home)
    (found,) = client.search_runs([client.get_experiment_by_name("amazon-ft").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["finetune.learning_rate"] == "0.002"
    assert len(found.data.params) > 60
    assert (found.data.metrics["base.nll"], found.data.metrics["tuned.perplexity"]) == (3.5, 1.284)
    assert found.data.tags["digest.evaluate"] == run.stages[1]["digest"]
    assert found.data.tags["amazon_ft.run"] == run.id
    assert [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, "loss")] == [(1, 4.0), (2, 2.0)]
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"README.md", "metrics.json", "report.html"}


def test_tensorboard_gives_back_every_step(run: Run, home: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hear_a_run(Tracking(BOARD.tracking), run)
    events = EventAccumulator(str(home / "tracking" / "tensorboard" / run.id)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 4.0), (2, 2.0)]
    assert events.Scalars("evaluation/tuned/nll")[0].value == 0.25


@MLFLOW
def test_a_training_on_a_worker_tells_of_its_steps_under_the_run_that_it_trains_for(run: Run, home: Path) -> None:
    parent, worker = Tracking(RECIPE.tracking), Tracking(RECIPE.tracking, run.id)
    parent.hear(RunBegan(run))
    parent.hear(TrainingLeft("demo"))
    child = Run("demo", {}, parent=run.id)
    for event in (RunBegan(child), StageEnded({}, {}, adapter()), RunEnded(child)):
        worker.hear(event)
    parent.hear(StageEnded({}, {}, adapter()))
    client = mlflow_client(home)
    (found,) = client.search_runs([client.get_experiment_by_name("amazon-ft").experiment_id])
    assert (found.info.status, found.data.tags["amazon_ft.run"]) == ("RUNNING", run.id)
    assert [point.step for point in client.get_metric_history(found.info.run_id, "loss")] == [1, 2]


@MLFLOW
def test_a_long_training_is_told_in_whole(home: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{home.parent / 'own.db'}"
    config = TrackingConfig(report_to="mlflow", project="mine", uri=uri)
    tracker = MlflowTracker(TrackedRun("id", "name", {f"p{index}": index for index in range(230)}, config))
    tracker.log([(step, {"loss": 1.0, "tokens": 2.0}) for step in range(1, 1301)])
    tracker.conclude(Outcome({}, {}, []))
    client = MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert len(client.get_metric_history(found.info.run_id, "tokens")) == 1300
    assert len(found.data.params) == 230


def test_a_tracker_that_fails_is_a_warning(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(TRACKERS, "mlflow", lambda _: 1 / 0)
    with caplog.at_level(logging.WARNING), open_run("demo", {}, observers=subscribers(RECIPE.tracking)) as run:
        tell(RunBegan(run))
    assert caplog.messages == ["mlflow could not be told of this run (ZeroDivisionError: division by zero); the run goes on."]


def test_a_tracker_that_is_not_installed_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.reports.trackers.find_spec", lambda _: None)
    check_tracking(TrackingConfig())
    with pytest.raises(ConfigError, match=r"wandb is not installed; .* pip install 'amazon-ft\[wandb\]'"):
        check_tracking(TrackingConfig(report_to="wandb"))


@MLFLOW
def test_tracking_is_no_part_of_what_a_run_is(run: Run, home: Path) -> None:
    assert short_digest(RECIPE) == short_digest(load_recipe("demo"))
    Tracking(RECIPE.tracking).hear(RunBegan(run))
    client = mlflow_client(home)
    (found,) = client.search_runs([client.get_experiment_by_name("amazon-ft").experiment_id])
    assert not any(name.startswith("tracking") for name in found.data.params)
