"""The artifacts of a deployed run in the Prefect UI: made as its events come, then updated."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from flows.reports.results import marked_rows, read_lines, read_optional_json, row_lengths
from tasks.caching.events import Event, ModelSaved, Noticed, RunBegan, RunEnded, StageEnded, StepsLogged
from tasks.caching.manifest import MANIFEST
from tasks.caching.runs import Run
from tasks.refs import Adapter, Artifact, Evaluation, Products, Source, Split, Tokenizer
from tasks.reporting import markdown
from tasks.reporting.model_card import comparison_table

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient

SHOWN_ROWS = 2
SHOWN_ANSWERS = 4
SUMMARY = {"first_loss": "mean loss of the first steps", "last_loss": "mean loss of the last steps"}
"""Of a training: means over finetune.logging_steps."""


class Artifacts:
    """Hears of a run, on a thread of its own (tasks/caching/events.py): it may wait for the server."""

    def __init__(self, flow_run: UUID) -> None:
        self._flow_run, self._recipe = flow_run, ""
        self._open = ExitStack()
        self._ids: dict[str, UUID] = {}
        self._points: list[tuple[int, float]] = []

    def hear(self, event: Event) -> None:
        """Show what there is to see of an event."""
        match event:
            case RunBegan(run=run):
                self._recipe = run.recipe
                self._name(run)
            case StageEnded(inputs=inputs, value=value) if value is not None:
                self._show_stage(event.entry["name"], inputs, value)
            case StepsLogged():
                self._show_training(event)
            case Noticed():
                self.show(event.topic, event.summary, event.text)
            case ModelSaved():
                self._show_model(event)
            case RunEnded():
                self.show("stages", "what each stage did and why", markdown.stages_table(event.run.stages))
            case _:
                pass

    def close(self) -> None:
        """Leave what is shown, and the server."""
        self._open.close()

    def show(self, key: str, description: str, data: object, *, kind: str = "markdown") -> None:
        """Make an artifact, or bring it up to date."""
        from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

        if key in self._ids:
            self._client.update_artifact(self._ids[key], ArtifactUpdate(data=data, description=description))
            return
        full_key = f"{self._recipe}-{key}"
        made = ArtifactCreate(key=full_key, type=kind, description=description, data=data, flow_run_id=self._flow_run)
        self._ids[key] = self._client.create_artifact(made).id

    @cached_property
    def _client(self) -> SyncPrefectClient:
        from prefect.client.orchestration import get_client

        return self._open.enter_context(get_client(sync_client=True))

    def _name(self, run: Run) -> None:
        if run.tags:
            tags = sorted({*self._client.read_flow_run(self._flow_run).tags, *run.tags})
            self._client.update_flow_run(self._flow_run, name=run.title, tags=tags)

    def _show_training(self, now: StepsLogged) -> None:
        self._points.append((now.step, now.loss))
        left = f"step {now.step} of {now.steps}, {now.eta_seconds:,.0f} s left"
        self.show("training-progress", left, 100.0 * now.step / max(now.steps, 1), kind="progress")
        self.show("training", left, _training(self._points, now))

    def _show_model(self, told: ModelSaved) -> None:
        files = [(file.name, file.stat().st_size) for file in sorted(told.link.iterdir()) if file.name != MANIFEST]
        self.show("model", f"the tuned model: {told.link}", markdown.model_files(str(told.link), socket.gethostname(), files))
        verdict = told.run.verdict or {"promoted": False, "reasons": (), "against": ()}
        word = "promoted" if verdict["promoted"] else "not promoted"
        self.show("verdict", word, markdown.verdict_lines(word, verdict["reasons"], verdict["against"]))
        self._emit(word, str(told.link), verdict["reasons"])
        if told.page is not None:
            self.show("report", f"report.html: {told.page}", markdown.report_file(str(told.page), socket.gethostname()))

    def _emit(self, verdict: str, model: str, reasons: Iterable[str]) -> None:
        """The event that automations wait for (deployments/notifications.yaml)."""
        from prefect.events import emit_event

        emit_event(
            event=f"amazon-ft.model.{verdict.replace(' ', '-')}",
            resource={"prefect.resource.id": f"amazon-ft.recipe.{self._recipe}", "prefect.resource.name": self._recipe},
            payload={"recipe": self._recipe, "verdict": verdict, "model": model, "reasons": "; ".join(reasons)},
        )

    def _show_stage(self, name: str, inputs: Mapping[str, Any], value: BaseModel) -> None:
        if isinstance(value, Products):
            self.show("source", "lines kept and dropped", _source(inputs["source"], value))
        elif name == "tokenize" and isinstance(value, Split):
            tokenizer, limit = inputs["tokenizer"], inputs["config"].max_tokens
            self.show("rows", "two training rows, what is trained on marked", _rows(value.train, tokenizer))
            self.show("token-lengths", "tokens of the training rows", _lengths(value, limit))
        elif isinstance(value, Adapter):
            self.show("training", f"{value.steps} steps", _trained(value))
        elif isinstance(value, Evaluation):
            self.show("evaluation", "base against tuned on held-out rows", _evaluation(value))


def _source(source: Source, products: Products) -> str:
    files = [(Path(file.url).name, file.size_bytes) for file in source.files]
    rejected = products.lines - products.data.rows - sum(products.dropped.values())
    return markdown.source_profile(files, products.lines, products.data.rows, products.dropped, rejected)


def _rows(tokens: Artifact, tokenizer: Tokenizer) -> str:
    return markdown.marked_text(marked_rows(tokens, Path(tokenizer.path), SHOWN_ROWS))


def _lengths(tokens: Split, limit: int) -> str:
    return markdown.token_lengths(row_lengths(tokens.train), limit, tokens.counts)


def _training(points: list[tuple[int, float]], now: StepsLogged) -> str:
    figures = {
        "step": f"{now.step:,} of {now.steps:,}",
        "loss": now.loss,
        "learning rate": now.learning_rate,
        "gradient norm": now.grad_norm,
        "tokens a second": round(now.tokens_per_second),
        "seconds left": round(now.eta_seconds),
    }
    return markdown.training_curve(points, figures)


def _trained(adapter: Adapter) -> str:
    steps, resolved = read_lines(adapter.log / "train_log.jsonl"), read_optional_json(adapter.log / "resolved.json")
    chosen = {name: resolved.get(name) for name in ("device_name", "dtype", "optimizer", "gradient_checkpointing", "peak_gib")}
    figures = {SUMMARY.get(name, name.replace("_", " ")): value for name, value in (adapter.summary | chosen).items()}
    known = {name: value for name, value in figures.items() if value is not None}
    return markdown.training_curve([(step["step"], step["loss"]) for step in steps], known)


def _evaluation(value: Evaluation) -> str:
    metrics, said = read_optional_json(value.data / "metrics.json"), read_lines(value.data / "generations.jsonl")
    return markdown.answers_compared(comparison_table(metrics), said[:SHOWN_ANSWERS])
