"""The artifacts of a run are made once and then updated, at the server of the run's own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from flows.reports.ui import Artifacts
from tasks.caching.events import Detached, ModelSaved, Noticed, RunBegan, StageEnded, StepsLogged
from tasks.caching.runs import Run
from tasks.refs import Adapter, Artifact, SavedModel
from tests.support.tuned import artifact_of

BEGAN = RunBegan(Run("demo", {}))


def artifacts_of(flow_run: UUID) -> list[tuple[str | None, Any]]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    with get_client(sync_client=True) as client:
        rows = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run])))
    return [(row.key, row.data) for row in rows]


def test_artifact_is_made_once_and_then_updated(prefect_api: str) -> None:
    flow_run = uuid4()
    shown = Detached(Artifacts(flow_run), "the Prefect UI", close_seconds=60)
    shown.hear(BEGAN)
    for text in ("# One", "# Two"):
        shown.hear(Noticed("worker", "steps", text))
    shown.close()
    assert artifacts_of(flow_run) == [("demo-worker", "# Two")]


def test_training_is_shown_as_it_goes(prefect_api: str) -> None:
    flow_run = uuid4()
    shown = Artifacts(flow_run)
    shown.hear(BEGAN)
    for step, loss in ((5, 3.5), (10, 2.5)):
        shown.hear(StepsLogged(step, 20, loss, 1.0, 1e-4, 100.0, 7.0))
    shown.close()
    found = dict(artifacts_of(flow_run))
    assert found["demo-training-progress"] == 50
    assert "| loss | 2.5 |" in found["demo-training"]


def test_artifacts_go_to_the_server_of_their_maker(prefect_api: str, caplog: pytest.LogCaptureFixture) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    first, second = uuid4(), uuid4()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        away = Detached(Artifacts(first), "the Prefect UI", close_seconds=60)
    here = Detached(Artifacts(second), "the Prefect UI", close_seconds=60)
    for shown in (away, here):
        shown.hear(BEGAN)
        shown.hear(Noticed("worker", "steps", "# One"))
        shown.close()
    assert artifacts_of(first) == []
    assert artifacts_of(second) == [("demo-worker", "# One")]
    assert "the Prefect UI could not be told of this run (ConnectError: " in caplog.text


def test_no_artifact_leads_to_a_file_which_no_browser_would_open(prefect_api: str, home: Path) -> None:
    flow_run, link = uuid4(), home / "models" / "demo" / "mine"
    link.mkdir(parents=True)
    page = link.with_name("report.html")
    shown = Artifacts(flow_run)
    shown.hear(BEGAN)
    shown.hear(ModelSaved(BEGAN.run, SavedModel(data=Artifact(kind="saved-model", digest="ab"), name="mine"), link, page))
    shown.close()
    found = dict(artifacts_of(flow_run))
    assert "file://" not in str(found)
    assert str(page) in found["demo-report"]
    assert str(link) in found["demo-model"]


def test_a_training_calls_a_mean_a_mean(prefect_api: str, home: Path) -> None:
    steps = [{"step": step, "loss": 4.0 / step} for step in (1, 2)]
    log = artifact_of("training-log", {"train_log.jsonl": "\n".join(map(json.dumps, steps)), "resolved.json": "{}"})
    adapter = Adapter(data=artifact_of("adapter", {"w": "w"}), log=log, summary={"first_loss": 3.0, "last_loss": 2.0})
    flow_run = uuid4()
    shown = Artifacts(flow_run)
    shown.hear(BEGAN)
    shown.hear(StageEnded({"name": "finetune"}, {}, adapter))
    shown.close()
    assert "| mean loss of the first steps | 3 |" in dict(artifacts_of(flow_run))["demo-training"]
