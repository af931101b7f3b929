"""A training that is lost is started again as often as it is allowed to be, on a real server; the worker here is a thread."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flows.recipes import load_recipe
from flows.running import child
from tasks.caching.context import open_run
from tasks.refs import Artifact, ConfigError, HeldOut, Model, Prepared, Special, Tokenizer


@pytest.fixture(scope="module")
def training(prefect_api: str) -> Iterator[Any]:
    """The id of a deployment amazon-ft-train/cuda."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        name, _, deployment = child.TRAINING.partition("/")
        made = client.create_deployment(client.create_flow_from_name(name), deployment)
        yield made
        client.delete_deployment(made)


@contextmanager
def worker(deployment: Any, *endings: tuple[str, ...]) -> Iterator[list[Any]]:
    """Lets each next run of the deployment pass through the given states; {its ids}, in order."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.client.schemas.objects import State

    seen, over = list[Any](), threading.Event()

    def work() -> None:
        with get_client(sync_client=True) as client:
            mine = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
            known = {run.id for run in client.read_flow_runs(deployment_filter=mine)}
            ready.set()
            while not over.is_set():
                for run in client.read_flow_runs(deployment_filter=mine):
                    if run.id not in known | set(seen):
                        seen.append(run.id)
                        for state in endings[len(seen) - 1]:
                            client.set_flow_run_state(run.id, State(type=state, message=f"{state.lower()} here"))
                over.wait(0.05)

    ready = threading.Event()
    thread = threading.Thread(target=contextvars.copy_context().run, args=[work], daemon=True)  # with Prefect's settings
    thread.start()
    assert ready.wait(60)
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.fixture
def run_child(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(child, "POLL_SECONDS", 0.05)
    rows, tokenizer = Artifact(kind="tokens", digest="t"), Tokenizer(path="/t", digest="t", special=Special(bos=None, eos="</s>"))
    held_out = HeldOut(tokens=rows, texts=rows, template=rows, tokenizer=tokenizer)
    prepared = Prepared(model=Model(path="/m", digest="m", name="m", tokenizer=tokenizer), batches=rows, held_out=held_out)

    def run(restarts: str) -> None:
        monkeypatch.setenv(child.RESTARTS, restarts)
        with open_run("demo", {}):
            child.run_child(load_recipe("demo"), prepared)

    return run


LOST, DONE = ("RUNNING", "CRASHED"), ("RUNNING", "COMPLETED")


def test_a_lost_training_is_started_again(training: Any, run_child: Any) -> None:
    with worker(training, LOST, LOST, DONE) as seen:
        run_child("2")
    assert len(seen) == 3


def test_one_that_is_lost_too_often_is_the_runs_end(training: Any, run_child: Any) -> None:
    with worker(training, LOST, LOST) as seen, pytest.raises(child.ChildError, match=r"crashed: crashed here$"):
        run_child("1")
    assert len(seen) == 2


@pytest.mark.parametrize("ending", [("CRASHED",), ("RUNNING", "FAILED"), ("RUNNING", "CANCELLED")], ids=" ".join)
def test_one_that_never_began_failed_or_was_cancelled_is_not(training: Any, run_child: Any, ending: tuple[str, ...]) -> None:
    with worker(training, ending) as seen, pytest.raises(child.ChildError):
        run_child("2")
    assert len(seen) == 1


@pytest.mark.parametrize(("begun", "state"), [(("PENDING",), "CANCELLED"), (("PENDING", "RUNNING"), "CANCELLING")], ids=" ".join)
def test_a_parent_that_ends_cancels_what_began_and_what_waits_for_a_machine(
    training: Any, run_child: Any, monkeypatch: pytest.MonkeyPatch, begun: tuple[str, ...], state: str
) -> None:
    from prefect.client.orchestration import get_client

    read_state = child._read_state

    def end(run: Any) -> Any:
        if (now := read_state(run)) is not None and now.type == begun[-1]:
            raise KeyboardInterrupt
        return now

    monkeypatch.setattr(child, "_read_state", end)
    with worker(training, begun) as seen, pytest.raises(KeyboardInterrupt):
        run_child("0")
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(seen[0]).state.type == state


def test_anything_but_a_number_is_refused(run_child: Any) -> None:
    with pytest.raises(ConfigError, match=r"^AMAZON_FT_RESTARTS: no number: got often; expected how often .*, such as 3\.$"):
        run_child("often")
