"""What a run shows in the Prefect UI, made and sent on a thread of its own.

Nothing here can hold up or end a run: work is queued, an error is logged once, and the end of the run waits for the queue a
few seconds at most.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from flows.reports.results import marked_rows, read_json, read_lines, row_lengths
from flows.running.deployed import flow_run_id
from flows.running.naming import run_tags
from tasks.caching.runs import current_run
from tasks.caching.stage import telling
from tasks.caching.store import MANIFEST
from tasks.evaluation.verdict import Verdict
from tasks.refs import Adapter, Artifact, Evaluation, Products, Source, Split, Tokenizer
from tasks.reporting import markdown as report
from tasks.reporting.model_card import comparison
from tasks.training.backend import Report
from tasks.training.progress import listening

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient

    from tasks.config import Recipe

logger = logging.getLogger(__name__)

END_SECONDS = 10.0
"""How long the end of a run waits for the last artifacts."""
SHOWN_ROWS = 2
SHOWN_ANSWERS = 4

Job = Callable[["SyncPrefectClient"], None]

_board: ContextVar[Board | None] = ContextVar("board", default=None)


class Queue:
    """Calls to the server of the settings that the caller has, one after another, on a thread of their own."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[tuple[Job, threading.Event] | None] = queue.Queue()
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name="artifacts", daemon=True)
        self._failed = False
        self._thread.start()

    def put(self, job: Job) -> threading.Event:
        """Do it some time; the event is set when it was done or failed."""
        done = threading.Event()
        self._jobs.put((job, done))
        return done

    def close(self) -> None:
        """Wait for what is left, a few seconds at most."""
        self._jobs.put(None)
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            while (entry := self._jobs.get()) is not None:
                job, done = entry
                try:
                    job(client)
                except Exception:
                    if not self._failed:
                        logger.warning("An artifact of this run could not be shown; the run goes on.", exc_info=True)
                    self._failed = True
                finally:
                    done.set()


@dataclass
class Board:
    """The artifacts of one flow run; each is made once and then updated."""

    run: UUID
    prefix: str
    jobs: Queue
    _ids: dict[str, UUID] = field(default_factory=dict[str, "UUID"])

    def show(self, key: str, description: str, make: Callable[[], object], *, kind: str = "markdown") -> threading.Event:
        """Queue an artifact; `make` is called on the queue's thread. The event is set when it was sent."""
        return self.jobs.put(lambda client: self._send(client, key, description, make(), kind))

    def _send(self, client: SyncPrefectClient, key: str, description: str, data: object, kind: str) -> None:
        from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

        if key in self._ids:
            client.update_artifact(self._ids[key], ArtifactUpdate(data=data, description=description))
            return
        full_key = f"{self.prefix}-{key}"
        made = ArtifactCreate(key=full_key, type=kind, description=description, data=data, flow_run_id=self.run)
        self._ids[key] = client.create_artifact(made).id


class LiveTraining:
    """Hears of a training: a progress bar and the loss curve.

    It is called on a thread of its own that hands it the newest report (tasks/training/progress.py), so it may wait for the
    server: reports that come meanwhile are left out instead of piling up.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._points: list[tuple[int, float]] = []

    def report(self, report: Report) -> None:
        """Move the bar and the curve on."""
        self._points.append((report.step, report.loss))
        points, done = list(self._points), 100.0 * report.step / max(report.steps, 1)
        left = f"step {report.step} of {report.steps}, {report.eta_seconds:,.0f} s left"
        self._board.show("training-progress", left, lambda: done, kind="progress")
        self._board.show("training", left, lambda: _training(points, report)).wait()

    def close(self) -> None:
        """The curve stays as it is."""


@contextmanager
def shown(recipe: Recipe) -> Generator[None]:
    """Show the stages and trainings of the block in the UI, if a worker runs it from a deployment."""
    run = flow_run_id()
    if run is None:
        yield
        return
    board = Board(run, recipe.name, Queue())
    board.jobs.put(lambda client: _tag(client, run, run_tags(recipe)))
    token = _board.set(board)
    with telling(lambda name, inputs, value: _show_stage(board, name, inputs, value)), listening(LiveTraining(board)):
        try:
            yield
        finally:
            _board.reset(token)
            if (record := current_run()) is not None:
                stages = [dict(stage) for stage in record.stages]
                board.show("stages", "what each stage did and why", lambda: report.lineage(stages))
            board.jobs.close()


def current_board() -> Board | None:
    """The board of the `shown` block that this is in."""
    return _board.get()


def show_model(path: Path) -> None:
    """The saved model's place, and a link to it."""
    if (board := current_board()) is None:
        return
    files = [(file.name, file.stat().st_size) for file in sorted(path.iterdir()) if file.name != MANIFEST]
    board.show("model", f"the tuned model: {path}", lambda: report.output(str(path), socket.gethostname(), files))
    board.show("model-link", "the tuned model", path.as_uri, kind="link")


def show_verdict(verdict: Verdict) -> None:
    """Whether the model was promoted, and why."""
    if (board := current_board()) is not None:
        told = "promoted" if verdict.promoted else "not promoted"
        board.show("verdict", told, lambda: report.verdict(told, verdict.reasons, verdict.against))


def show_report(path: Path | None) -> None:
    """A link to the run's report, if it could be written."""
    board = current_board()
    if board is not None and path is not None:
        board.show("report", "everything about this run on one page", path.as_uri, kind="link")


def _tag(client: SyncPrefectClient, run: UUID, tags: list[str]) -> None:
    client.update_flow_run(run, tags=sorted({*client.read_flow_run(run).tags, *tags}))


def _show_stage(board: Board, name: str, inputs: Mapping[str, Any], value: BaseModel) -> None:
    """Queue what there is to see of a stage's result."""
    if isinstance(value, Products):
        board.show("source", "lines kept and dropped", lambda: _source(inputs["source"], value))
    elif name == "tokenize" and isinstance(value, Split):
        tokenizer, limit = inputs["tokenizer"], inputs["config"].max_tokens
        board.show("rows", "two training rows, what is trained on marked", lambda: _rows(value.train, tokenizer))
        board.show("token-lengths", "tokens of the training rows", lambda: _lengths(value, limit))
    elif isinstance(value, Adapter):
        board.show("training", f"{value.steps} steps", lambda: _trained(value))
    elif isinstance(value, Evaluation):
        board.show("evaluation", "base against tuned on held-out rows", lambda: _evaluation(value))


def _source(source: Source, products: Products) -> str:
    files = [(Path(file.url).name, file.size_bytes) for file in source.files]
    rejected = products.lines - products.data.rows - sum(products.dropped.values())
    return report.source_profile(files, products.lines, products.data.rows, products.dropped, rejected)


def _rows(tokens: Artifact, tokenizer: Tokenizer) -> str:
    return report.marked_rows(marked_rows(tokens, Path(tokenizer.path), SHOWN_ROWS))


def _lengths(tokens: Split, limit: int) -> str:
    return report.token_lengths(row_lengths(tokens.train), limit, tokens.counts)


def _training(points: list[tuple[int, float]], now: Report) -> str:
    figures = {
        "step": f"{now.step:,} of {now.steps:,}",
        "loss": now.loss,
        "learning rate": now.learning_rate,
        "gradient norm": now.grad_norm,
        "tokens a second": round(now.tokens_per_second),
        "seconds left": round(now.eta_seconds),
    }
    return report.training(points, figures)


def _trained(adapter: Adapter) -> str:
    steps, resolved = read_lines(adapter.log / "train_log.jsonl"), read_json(adapter.log / "resolved.json")
    chosen = {name: resolved.get(name) for name in ("device_name", "dtype", "optimizer", "gradient_checkpointing", "peak_gib")}
    figures = {name.replace("_", " "): value for name, value in (adapter.summary | chosen).items() if value is not None}
    return report.training([(step["step"], step["loss"]) for step in steps], figures)


def _evaluation(value: Evaluation) -> str:
    metrics, said = read_json(value.data / "metrics.json"), read_lines(value.data / "generations.jsonl")
    return report.evaluation(comparison(metrics), said[:SHOWN_ANSWERS])


__all__ = ["Board", "LiveTraining", "Queue", "current_board", "show_model", "show_report", "show_verdict", "shown"]
