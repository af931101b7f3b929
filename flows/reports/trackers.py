"""Tells an experiment tracker of a finished run: settings, every step, the evaluation, lineage digests, files.

A run never fails of it, and nothing of it is part of a stage: what it tells is read from the run's record, so a run that
was served from the cache is told as one that trained.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.reports.results import Results, flat
from flows.running.naming import run_name
from tasks.caching.runs import current_run
from tasks.refs import ConfigError, SavedModel, home

if TYPE_CHECKING:
    from tasks.config import Recipe, TrackingConfig

logger = logging.getLogger(__name__)

STEP_FIGURES = ("loss", "grad_norm", "learning_rate", "tokens", "memory_gib", "held_out_loss")
FILES = ("README.md", "lineage.json", "metrics.json", "recipe.yaml", "generations.jsonl")


@dataclass(frozen=True)
class Told:
    """What a tracker is told of a run."""

    name: str
    run: str
    params: dict[str, Any]
    steps: list[tuple[int, dict[str, float]]]
    """(step, figures), steps from 1."""
    metrics: dict[str, float]
    """Such as base.nll."""
    digests: dict[str, str]
    """{stage: SHA-256 of its output}."""
    files: list[Path]


def check_tracking(config: TrackingConfig) -> None:
    """Refuse a tracker that is not installed, before any work.

    Raises:
        ConfigError: naming the package.
    """
    name = config.report_to
    if name != "none" and not find_spec(name):
        raise ConfigError(f"tracking.report_to: {name} is not installed; expected its library. pip install 'amazon-ft[{name}]'.")


def track(recipe: Recipe, saved: SavedModel, page: Path | None) -> None:
    """Tell the recipe's tracker of the present run; a warning where that fails."""
    config, run = recipe.tracking, current_run()
    if config.report_to == "none" or run is None:
        return
    tell = {"mlflow": tell_mlflow, "tensorboard": tell_tensorboard, "trackio": tell_trackio, "wandb": tell_wandb}
    try:
        with redirect_stdout(sys.stderr):  # standard output is for the one who called
            tell[config.report_to](gather(asdict(run), recipe, saved, page), config)
    except Exception as error:
        logger.warning("%s could not be told of this run (%s: %s).", config.report_to, type(error).__name__, error)
        logger.debug("tracking", exc_info=True)
        return
    logger.info("%s was told of this run.", config.report_to)


def gather(record: Mapping[str, Any], recipe: Recipe, saved: SavedModel, page: Path | None) -> Told:
    """What there is to tell of a run's record."""
    results = Results(record)
    files = [saved.data / name for name in FILES]
    return Told(
        name=run_name(recipe),
        run=record["id"],
        params=flat(recipe.model_dump(mode="json", exclude={"tracking"})),
        steps=[
            (line["step"], {name: line[name] for name in STEP_FIGURES if line.get(name) is not None}) for line in results.training
        ],
        metrics={name: value for name, value in flat(_means(results.metrics)).items() if isinstance(value, (int, float))},
        digests={entry["name"]: entry["digest"] for entry in results.stages if "digest" in entry},
        files=[file for file in [*files, *([page] if page else [])] if file.is_file()],
    )


def _means(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for name in ("rows", "tokens", "base", "tuned", "difference") if name in metrics}


def tell_mlflow(told: Told, config: TrackingConfig) -> None:
    """An mlflow run; by default in SQLite, its files beside it."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=config.uri or f"sqlite:///{_place('mlflow') / 'mlflow.db'}")
    found = client.get_experiment_by_name(config.project)
    location = None if config.uri else (_place("mlflow") / "artifacts").as_uri()
    experiment = found.experiment_id if found else client.create_experiment(config.project, artifact_location=location)
    run = client.create_run(experiment, run_name=told.name).info
    now = run.start_time
    steps = [Metric(name, value, now, step) for step, figures in told.steps for name, value in figures.items()]
    figures = [*steps, *(Metric(name, value, now, 0) for name, value in told.metrics.items())]
    params = [Param(name, str(value)[:6000]) for name, value in told.params.items()]
    tags = [RunTag("amazon_ft.run", told.run), *(RunTag(f"digest.{name}", digest) for name, digest in told.digests.items())]
    client.log_batch(run.run_id, params=params[:100], tags=tags)
    for start in range(100, len(params), 100):  # so many at a time are allowed
        client.log_batch(run.run_id, params=params[start : start + 100])
    for start in range(0, len(figures), 1000):
        client.log_batch(run.run_id, metrics=figures[start : start + 1000])
    for file in told.files:
        client.log_artifact(run.run_id, str(file))
    client.set_terminated(run.run_id)


def tell_tensorboard(told: Told, config: TrackingConfig) -> None:
    """An event file in a directory of the run's own."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(Path(config.uri) / told.run if config.uri else _place("tensorboard") / told.run) as writer:
        for step, figures in told.steps:
            for name, value in figures.items():
                writer.add_scalar(f"train/{name}", value, step)
        for name, value in told.metrics.items():
            writer.add_scalar(f"evaluation/{name.replace('.', '/')}", value, 0)
        for title, rows in (("config", told.params), ("digests", told.digests)):
            writer.add_text(title, "\n".join(f"    {key}: {value}" for key, value in rows.items()))


def tell_wandb(told: Told, config: TrackingConfig) -> None:
    """A wandb run, where WANDB_MODE and WANDB_API_KEY say."""
    import wandb  # pyright: ignore[reportMissingImports]  # the extra `wandb`

    run = wandb.init(project=config.project, name=told.name, config=told.params, dir=_place("wandb"))
    for step, figures in told.steps:
        run.log(figures, step=step)
    run.summary.update({**told.metrics, **{f"digest.{name}": digest for name, digest in told.digests.items()}})
    for file in told.files:
        run.save(file, base_path=file.parent, policy="now")
    run.finish()


def tell_trackio(told: Told, config: TrackingConfig) -> None:
    """A trackio run, local unless TRACKIO_SPACE_ID says otherwise; files have no place in it."""
    os.environ.setdefault("TRACKIO_DIR", str(_place("trackio")))
    import trackio  # pyright: ignore[reportMissingImports]  # the extra `trackio`

    digests = {f"digest.{name}": digest for name, digest in told.digests.items()}
    trackio.init(project=config.project, name=f"{told.name} {told.run}", config={**told.params, **digests})
    for step, figures in told.steps:
        trackio.log(figures, step=step)
    trackio.log(told.metrics)
    trackio.finish()


def _place(name: str) -> Path:
    path = home() / "tracking" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


__all__ = ["Told", "check_tracking", "gather", "track"]
