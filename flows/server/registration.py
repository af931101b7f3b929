"""The deployments of deployments/prefect.yaml, registered by `prefect deploy --all`.

Prefect clears whatever the file leaves open. What somebody chose for a deployment (a schedule that is on, a concurrency limit,
a work queue) is therefore written into the copy of the file that Prefect reads: a limit that was cleared and set again would
have forgotten the run that goes on.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows.choices import CollisionStrategy
from flows.recipes import SHIPPED
from tasks.refs import ConfigError, PipelineError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.schemas.objects import DeploymentSchedule
    from prefect.client.schemas.responses import DeploymentResponse

PREFECT_FILE = SHIPPED.parent / "prefect.yaml"
UNLIMITED = "none"


@dataclass(frozen=True)
class Choices:
    """{deployment: what a command chose for it}; it goes before the file, and this before the server."""

    limits: Mapping[str, dict[str, Any] | None] = field(default_factory=dict[str, dict[str, Any] | None])
    queues: Mapping[str, str] = field(default_factory=dict[str, str])


def read_choices(limits: Sequence[str], strategy: CollisionStrategy | None, queues: Sequence[str]) -> Choices:
    """Return what the command's options say: limits as `demo=1` or `demo=none`, one strategy for all of them, queues as
    `demo=urgent`.

    Raises:
        ConfigError: for another form, or a deployment that there is not.
    """
    if strategy and not limits:
        raise ConfigError(
            f"deploy --collision-strategy: no limit to collide with: got {strategy}; expected --concurrency-limit too."
        )
    wanted = strategy or CollisionStrategy.ENQUEUE
    return Choices(
        limits={name: _read_limit(name, value, wanted) for name, value in _pairs("--concurrency-limit", limits)},
        queues=dict(_pairs("--queue", queues)),
    )


def _pairs(option: str, texts: Iterable[str]) -> list[tuple[str, str]]:
    names = [deployment["name"] for deployment in _read_file()["deployments"]]
    pairs = [(text, *text.partition("=")[::2]) for text in texts]
    for text, name, value in pairs:
        if name not in names or not value:
            raise ConfigError(f"deploy {option}: got {text}; expected NAME=VALUE of a deployment, one of {', '.join(names)}.")
    return [(name, value) for _, name, value in pairs]


def _read_limit(name: str, value: str, strategy: CollisionStrategy) -> dict[str, Any] | None:
    """As prefect.yaml has it."""
    if value == UNLIMITED:
        return None
    if not value.isdecimal() or not int(value):
        raise ConfigError(f"deploy --concurrency-limit: {name}: got {value}; expected a number from 1, or {UNLIMITED}.")
    return {"limit": int(value), "collision_strategy": strategy.value}


def register(choices: Choices, *, say: Callable[[str], None]) -> None:
    """Register every deployment of prefect.yaml; what was chosen on the server for what the file leaves open stays so.

    Raises:
        PipelineError: when Prefect refuses, with what it said.
    """
    before = _deployments()
    say("registering the deployments")
    file = _read_file()
    file["deployments"] = [_chosen(each, before.get(_full_name(each)), choices) for each in file["deployments"]]
    _deploy_all(file)
    _switch_on({deployment.id: [each for each in deployment.schedules if each.active] for deployment in before.values()})
    for name, deployment in sorted(_deployments().items()):
        done = "brought up to date" if name in before else "created"
        say(f"deployment {name}: {done}, version {deployment.version}")


def _read_file() -> dict[str, Any]:
    return yaml.safe_load(PREFECT_FILE.read_text(encoding="utf-8"))


def _full_name(deployment: Mapping[str, Any]) -> str:
    """As the server has it; a flow is named like its function."""
    return f"{deployment['entrypoint'].rpartition('.')[2].replace('_', '-')}/{deployment['name']}"


def _chosen(said: Mapping[str, Any], there: DeploymentResponse | None, choices: Choices) -> dict[str, Any]:
    """A deployment of the file, and what else was chosen for it."""
    name, pool = said["name"], said["work_pool"]
    limit = said.get("concurrency_limit", _limit_on_server(there))
    queue = pool.get("work_queue_name", there and there.work_queue_name)
    return {
        **said,
        "concurrency_limit": choices.limits.get(name, limit),
        "work_pool": {**pool, "work_queue_name": choices.queues.get(name, queue)},
    }


def _limit_on_server(there: DeploymentResponse | None) -> dict[str, Any] | None:
    if there is None or there.global_concurrency_limit is None:
        return None
    options = there.concurrency_options.model_dump(mode="json", exclude_none=True) if there.concurrency_options else {}
    return {"limit": there.global_concurrency_limit.limit, "collision_strategy": CollisionStrategy.ENQUEUE.value, **options}


def _deploy_all(file: Mapping[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / PREFECT_FILE.name
        path.write_text(yaml.safe_dump(dict(file), sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PipelineError(f"deploy: prefect deploy: ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")


def _deployments() -> dict[str, DeploymentResponse]:
    """{name: deployment} of both flows. Registering anew puts the file's schedules, which are off, in the place of theirs."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    with get_client(sync_client=True) as client:
        found: dict[str, DeploymentResponse] = {}
        for flow in ("amazon-ft", "amazon-ft-train"):
            ours = FlowFilter(name=FlowFilterName(any_=[flow]))
            found |= {f"{flow}/{each.name}": each for each in client.read_deployments(flow_filter=ours)}
    return found


def _switch_on(before: Mapping[UUID, list[DeploymentSchedule]]) -> None:
    """Switch on again what was on: the file's schedule if it is the same, else one of its own."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for deployment, schedules in before.items():
            now = client.read_deployment(deployment).schedules
            for wanted in schedules:
                same = next((each for each in now if each.schedule == wanted.schedule), None)
                if same is None:
                    client.create_deployment_schedules(deployment, [(wanted.schedule, True)])
                elif not same.active:
                    client.update_deployment_schedule(deployment, same.id, active=True)
