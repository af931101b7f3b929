"""Experiment trackers: told of a run's settings as it begins, of each logged step while it trains, of the rest at its end.

A tracker is an observer of a run on a thread of its own, so it can neither stop nor slow a training. A training on a worker
tells of its steps itself, under the run that it trains for. A run whose training is served from the cache tells of its steps
from their log, as one that trained.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flows.reports.results import Results, flat, read_lines
from tasks.caching.events import Event, ModelSaved, RunBegan, RunEnded, StageEnded, StepsLogged, TrainingLeft
from tasks.refs import Adapter, ConfigError, home

if TYPE_CHECKING:
    from tasks.config import TrackingConfig

STEP_FIGURES = ("loss", "grad_norm", "learning_rate", "tokens", "memory_gib", "held_out_loss")
FILES = ("README.md", "lineage.json", "metrics.json", "recipe.yaml", "generations.jsonl")

Steps = Sequence[tuple[int, Mapping[str, float]]]
"""(step, figures), steps from 1."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker lists it."""

    id: str
    name: str
    params: Mapping[str, Any]
    config: TrackingConfig


@dataclass(frozen=True)
class Outcome:
    """A run's results as a tracker is told of them."""

    metrics: Mapping[str, float]
    """Such as base.nll."""
    digests: Mapping[str, str]
    """{stage: SHA-256 of its output}."""
    files: Sequence[Path]


class Tracker(Protocol):
    """A run in an experiment tracker: begun, or gone on with where the run's id is there already."""

    def log(self, steps: Steps) -> None:
        """Add steps."""
        ...

    def conclude(self, outcome: Outcome) -> None:
        """Add what came of the run."""
        ...

    def end(self, state: str) -> None:
        """Mark the run as `FINISHED` or `FAILED`."""
        ...


def check_tracking(config: TrackingConfig) -> None:
    """Refuse a tracker that is not installed, before any work.

    Raises:
        ConfigError: naming the package.
    """
    name = config.report_to
    if name != "none" and not find_spec(name):
        raise ConfigError(f"tracking.report_to: {name} is not installed; expected its library. pip install 'amazon-ft[{name}]'.")


@dataclass
class Tracking:
    """Tells a tracker of a run."""

    config: TrackingConfig
    run: str | None = None
    """The run that this one trains for, by its id."""
    _tracker: Tracker | None = None
    _told: set[int] = field(default_factory=set[int])
    _left: bool = False

    def hear(self, event: Event) -> None:
        """Pass on what a tracker keeps."""
        with redirect_stdout(sys.stderr):  # standard output is for the one who called
            match event:
                case RunBegan(run=run):
                    params = flat({name: section for name, section in run.config.items() if name != "tracking"})
                    tracked = TrackedRun(self.run or run.id, run.title, params, self.config)
                    self._tracker = TRACKERS[self.config.report_to](tracked)
                case StepsLogged(records=records):
                    self._log(records)
                case TrainingLeft():
                    self._left = True
                case StageEnded(value=Adapter(log=log)) if not self._left:
                    self._log(read_lines(log / "train_log.jsonl"))
                case ModelSaved() if self._tracker is not None:
                    self._tracker.conclude(gather(event))
                case RunEnded(run=run) if self._tracker is not None and self.run is None:
                    self._tracker.end("FINISHED" if run.finished else "FAILED")
                case _:
                    pass

    def close(self) -> None:
        """The tracker keeps what it was told."""

    def _log(self, records: Iterable[Mapping[str, Any]]) -> None:
        new = [record for record in records if record["step"] not in self._told]
        if new and self._tracker is not None:
            self._tracker.log([(record["step"], step_figures(record)) for record in new])
            self._told.update(record["step"] for record in new)


def step_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line of train_log.jsonl that a tracker keeps.

    >>> step_figures({"step": 3, "loss": 1.5, "held_out_loss": None, "seconds": 9.0})
    {'loss': 1.5}
    """
    return {name: record[name] for name in STEP_FIGURES if record.get(name) is not None}


def gather(told: ModelSaved) -> Outcome:
    """Return what there is to tell of a run whose model is saved."""
    results = Results(asdict(told.run))
    files = [*(told.saved.data / name for name in FILES), *([told.page] if told.page else [])]
    kept = ("rows", "tokens", "base", "tuned", "difference")
    figures = {name: results.metrics[name] for name in kept if name in results.metrics}
    return Outcome(
        metrics={name: value for name, value in flat(figures).items() if isinstance(value, (int, float))},
        digests={entry["name"]: entry["digest"] for entry in results.stages if "digest" in entry},
        files=[file for file in files if file.is_file()],
    )


class MlflowTracker:
    """An mlflow run; by default in SQLite, its files beside it."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow.entities import Param, RunTag
        from mlflow.tracking import MlflowClient

        config, place = run.config, place_of("mlflow")
        self._client = client = MlflowClient(tracking_uri=config.uri or f"sqlite:///{place / 'mlflow.db'}")
        found = client.get_experiment_by_name(config.project)
        location = None if config.uri else (place / "artifacts").as_uri()
        experiment = found.experiment_id if found else client.create_experiment(config.project, artifact_location=location)
        there = client.search_runs([experiment], f"tags.`amazon_ft.run` = '{run.id}'")
        self._run = there[0].info.run_id if there else client.create_run(experiment, run_name=run.name).info.run_id
        if there:
            return
        client.log_batch(self._run, tags=[RunTag("amazon_ft.run", run.id)])
        params = [Param(name, str(value)[:6000]) for name, value in run.params.items()]
        for start in range(0, len(params), 100):  # so many at a time are allowed
            client.log_batch(self._run, params=params[start : start + 100])

    def log(self, steps: Steps) -> None:
        """Add steps, as many at a time as are allowed."""
        self._log([(name, value, step) for step, figures in steps for name, value in figures.items()])

    def conclude(self, outcome: Outcome) -> None:
        """Add metrics, digests as tags, files as artifacts."""
        from mlflow.entities import RunTag

        self._log([(name, value, 0) for name, value in outcome.metrics.items()])
        self._client.log_batch(self._run, tags=[RunTag(f"digest.{name}", value) for name, value in outcome.digests.items()])
        for file in outcome.files:
            self._client.log_artifact(self._run, str(file))

    def end(self, state: str) -> None:
        """Give the run its status."""
        self._client.set_terminated(self._run, state)

    def _log(self, figures: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(1000 * time.time()), step) for name, value, step in figures]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics=metrics[start : start + 1000])


class TensorboardTracker:
    """Event files in a directory of the run's own; each line can be read as soon as it is told."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(Path(run.config.uri) / run.id if run.config.uri else place_of("tensorboard") / run.id)
        self._write_text("config", run.params)

    def log(self, steps: Steps) -> None:
        """Add steps."""
        for step, figures in steps:
            for name, value in figures.items():
                self._writer.add_scalar(f"train/{name}", value, step)
        self._writer.flush()

    def conclude(self, outcome: Outcome) -> None:
        """Add metrics and digests; files have no place in it."""
        for name, value in outcome.metrics.items():
            self._writer.add_scalar(f"evaluation/{name.replace('.', '/')}", value, 0)
        self._write_text("digests", outcome.digests)

    def end(self, state: str) -> None:
        """Close the files."""
        del state
        self._writer.close()

    def _write_text(self, title: str, rows: Mapping[str, Any]) -> None:
        self._writer.add_text(title, "\n".join(f"    {key}: {value}" for key, value in rows.items()))


class WandbTracker:
    """A wandb run, where WANDB_MODE and WANDB_API_KEY say."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # the extra `wandb`

        named = {"project": run.config.project, "name": run.name, "id": run.id, "resume": "allow"}
        self._run = wandb.init(config=dict(run.params), dir=place_of("wandb"), **named)
        self._run.define_metric("*", step_metric="step")

    def log(self, steps: Steps) -> None:
        """Add steps."""
        for step, figures in steps:
            self._run.log({"step": step, **figures})

    def conclude(self, outcome: Outcome) -> None:
        """Add metrics and digests to the summary, and files."""
        self._run.summary.update({**outcome.metrics, **_digests(outcome)})
        for file in outcome.files:
            self._run.save(file, base_path=file.parent, policy="now")

    def end(self, state: str) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(state != "FINISHED"))


class TrackioTracker:
    """A trackio run, local unless TRACKIO_SPACE_ID says otherwise; files have no place in it."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(place_of("trackio")))
        import trackio  # pyright: ignore[reportMissingImports]  # the extra `trackio`

        self._trackio: Any = trackio
        trackio.init(project=run.config.project, name=f"{run.name} {run.id}", config=dict(run.params), resume="allow")

    def log(self, steps: Steps) -> None:
        """Add steps."""
        for step, figures in steps:
            self._trackio.log(dict(figures), step=step)

    def conclude(self, outcome: Outcome) -> None:
        """Add metrics and digests."""
        self._trackio.log({**outcome.metrics, **_digests(outcome)})

    def end(self, state: str) -> None:
        """Finish the run."""
        del state
        self._trackio.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "mlflow": MlflowTracker,
    "tensorboard": TensorboardTracker,
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
}


def place_of(tracker: str) -> Path:
    """A tracker's own directory under AMAZON_FT_HOME."""
    path = home() / "tracking" / tracker
    path.mkdir(parents=True, exist_ok=True)
    return path


def _digests(outcome: Outcome) -> dict[str, str]:
    return {f"digest.{name}": digest for name, digest in outcome.digests.items()}
