"""What Prefect is given to register: of a limit and a queue, what a command chose, else the file, else the server.

What they do, on a real server: tests/e2e/test_deployed.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from flows.choices import CollisionStrategy
from flows.server import registration
from flows.server.registration import Choices, read_choices
from tasks.refs import ConfigError

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse

CANCEL, WAIT = ({"limit": limit, "collision_strategy": strategy} for limit, strategy in ((1, "CANCEL_NEW"), (2, "ENQUEUE")))
DEMO = {"name": "demo", "entrypoint": "flows.amazon_ft.amazon_ft", "work_pool": {"name": "cpu"}}


def on_server(limit: dict[str, Any] | None, queue: str) -> DeploymentResponse:
    from prefect.client.schemas.objects import ConcurrencyOptions
    from prefect.client.schemas.responses import DeploymentResponse, GlobalConcurrencyLimitResponse

    number = limit and GlobalConcurrencyLimitResponse(name="deployment:demo", limit=limit["limit"], active_slots=1)
    options = limit and ConcurrencyOptions(collision_strategy=limit["collision_strategy"])
    return DeploymentResponse(
        name="demo", flow_id=uuid4(), work_queue_name=queue, global_concurrency_limit=number, concurrency_options=options
    )


@pytest.mark.parametrize(
    ("chosen", "said", "there", "taken"),
    [
        (None, None, None, (None, "default")),
        (None, None, CANCEL, (CANCEL, "nightly")),
        (None, WAIT, CANCEL, (WAIT, "default")),
        (read_choices(["demo=1"], CollisionStrategy.CANCEL_NEW, ["demo=urgent"]), WAIT, None, (CANCEL, "urgent")),
        (read_choices(["demo=none"], None, ["demo=default"]), None, CANCEL, (None, "default")),
    ],
    ids=["nothing", "on the server", "in the file", "by the command", "taken back"],
)
def test_a_command_goes_before_the_file_and_the_file_before_the_server(
    chosen: Choices | None, said: dict[str, Any] | None, there: dict[str, Any] | None, taken: tuple[dict[str, Any] | None, str]
) -> None:
    file = DEMO | ({"concurrency_limit": said, "work_pool": {"name": "cpu", "work_queue_name": "default"}} if said else {})
    given = registration._chosen(file, on_server(there, "nightly" if there else "default"), chosen or Choices())
    assert (given["concurrency_limit"], given["work_pool"]["work_queue_name"]) == taken


def test_a_deployment_that_the_server_does_not_have_yet_gets_what_the_file_says() -> None:
    given = registration._chosen(DEMO, None, Choices())
    assert given == DEMO | {"concurrency_limit": None, "work_pool": {"name": "cpu", "work_queue_name": None}}


@pytest.mark.parametrize(
    ("limits", "strategy", "queues", "said"),
    [
        (["dmo=1"], None, [], "--concurrency-limit: got dmo=1; expected NAME=VALUE of a deployment, one of default,"),
        (["demo=0"], None, [], "--concurrency-limit: demo: got 0; expected a number from 1, or none."),
        ([], None, ["demo"], "--queue: got demo; expected NAME=VALUE of a deployment"),
        ([], CollisionStrategy.CANCEL_NEW, [], "no limit to collide with: got CANCEL_NEW; expected --concurrency-limit too."),
    ],
)
def test_a_choice_that_is_none_is_refused(limits: list[str], strategy: CollisionStrategy, queues: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_choices(limits, strategy, queues)
    assert said in str(refused.value)
