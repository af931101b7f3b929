"""All that a server must know before it can run anything: the work pools, the deployments, the automation against zombies.

`amazon-ft deploy` for a server that is there; `amazon-ft up` starts one and calls the same. The functions without an
underscore at the top are the steps of deployments/prefect.yaml.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows.choices import PoolType
from flows.recipes import SHIPPED, load_recipe, shipped_names
from flows.running.pools import CPU_POOL, CUDA_POOL
from flows.running.quiet import hide_bars
from tasks.caching.files import text_digest
from tasks.caching.identity import source_digest
from tasks.refs import ConfigError, PipelineError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import DeploymentSchedule
    from prefect.client.schemas.responses import DeploymentResponse

logger = logging.getLogger(__name__)

DEPLOYMENTS = SHIPPED.parent
PREFECT_FILE = DEPLOYMENTS / "prefect.yaml"
VERSION_DIGITS = 12
SEAL = "$comment"
"""Where the variables of a job template, a JSON Schema, hold the digest of what we wrote; who reads the schema passes it over."""


def read_recipes() -> dict[str, Any]:
    """Build step: {name: what the shipped recipe says}, defaults left out so that a form shows what was chosen."""
    return {name: load_recipe(name).model_dump(mode="json", exclude_unset=True) for name in shipped_names()}


def read_version() -> dict[str, str]:
    """Build step: {"version": which code this is}, such as 0.2.0-3fa9c1d2e4b7; an image may have it for its tag.

    It is the package's version, and a digest of the source of all modules that the flow imports: a commit would be another one
    for another README, and the same one for an edit that is not committed.
    """
    return {"version": f"{version('amazon-ft')}-{source_digest('flows.amazon_ft')[:VERSION_DIGITS]}"}


def enter_data_directory() -> dict[str, str]:
    """Pull step: where relative paths of a recipe begin, AMAZON_FT_DATA, else where the worker was started.

    It is the first of ours in a flow run's process, so progress bars are hidden here: what a flow run prints is a log.
    """
    hide_bars()
    return {"directory": os.environ.get("AMAZON_FT_DATA") or os.environ.get("PWD") or str(Path.cwd())}


def server_url() -> str:
    """The API of the server that PREFECT_API_URL or the Prefect profile names.

    Raises:
        ConfigError: when neither does; Prefect would then start a server of its own that ends with the command.
    """
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        raise ConfigError(
            "PREFECT_API_URL: no server: got none; expected the URL of the server's API, such as "
            "http://127.0.0.1:4200/api. Set it, or start everything here with amazon-ft up."
        )
    return url


def set_up(pools: PoolType, trainings: int, *, overwrite: bool = False, say: Callable[[str], None] = logger.info) -> None:
    """Create or bring up to date both work pools, the automation and the deployments of the server at PREFECT_API_URL.

    Args:
        pools: the type of both pools.
        trainings: how many GPUs there are; as many runs of pool `cuda` go on at a time.
        overwrite: whether job templates that were edited on the server give way to ours.
        say: hears of each thing as it is created, brought up to date or left.

    Raises:
        PipelineError: when the server refuses, with what it said.
    """
    set_up_pools(pools, trainings, overwrite=overwrite, say=say)
    register(say=say)


def set_up_pools(pools: PoolType, trainings: int, *, overwrite: bool = False, say: Callable[[str], None] = logger.info) -> None:
    """The part of `set_up` that workers need."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for name, limit in ((CPU_POOL, None), (CUDA_POOL, trainings)):
            say(f"work pool {name}: {_set_up_pool(client, name, pools, limit, overwrite=overwrite)}")
        for name, done in _set_up_automations(client).items():
            say(f"automation {name}: {done}")


def register(*, say: Callable[[str], None] = logger.info) -> None:
    """Register every deployment of prefect.yaml, as `prefect deploy --all` does; schedules that are on stay so."""
    before = _deployments()
    say("registering the deployments")
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PipelineError(f"deploy: prefect deploy: ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    _switch_on({deployment.id: [each for each in deployment.schedules if each.active] for deployment in before.values()})
    for name, deployment in sorted(_deployments().items()):
        if name not in before:
            say(f"deployment {name}: created")
        elif deployment.updated != before[name].updated:
            say(f"deployment {name}: brought up to date")


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


def template_of(pools: PoolType, name: str) -> Path:
    """The job template of a pool; processes need no other one for a GPU."""
    stem = pools.value if pools is PoolType.PROCESS else f"{pools}-{name}"
    return DEPLOYMENTS / "pools" / f"{stem}.json"


def _set_up_pool(client: SyncPrefectClient, name: str, pools: PoolType, limit: int | None, *, overwrite: bool) -> str:
    """Create a pool or bring it up to date; which of it was done."""
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    template = _sealed(json.loads(template_of(pools, name).read_text()))
    try:
        there = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type=pools.value, base_job_template=template, concurrency_limit=limit))
        return "created"
    if there.type != pools.value:
        raise ConfigError(
            f"work pool {name}: got one of type {there.type}; expected {pools}. Delete it (prefect work-pool delete {name}) or "
            f"say --pools {there.type}."
        )
    client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=limit))
    if overwrite or _sealed(there.base_job_template) in (there.base_job_template, template):
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
        return "brought up to date"
    return (
        "its job template was edited on the server and is kept. For ours in its place: amazon-ft deploy "
        f"--pools {pools} --overwrite-templates, or delete the pool (prefect work-pool delete {name}) and deploy again."
    )


def _sealed(template: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the digest of what it says; equal to itself unless it was edited since we wrote it.

    0.1.0 wrote none: its templates are ours where they say what the shipped ones do.
    """
    variables = {name: value for name, value in template.get("variables", {}).items() if name != SEAL}
    digest = text_digest(json.dumps({**template, "variables": variables}, sort_keys=True))
    return {**template, "variables": {**variables, SEAL: f"amazon-ft {digest}"}}


def _set_up_automations(client: SyncPrefectClient) -> dict[str, str]:
    """Create those that are not there; {name: what was done}."""
    from prefect.events.schemas.automations import AutomationCore

    done: dict[str, str] = {}
    for settings in yaml.safe_load((DEPLOYMENTS / "automations.yaml").read_text())["automations"]:
        automation = AutomationCore.model_validate(settings)
        there = client.read_automations_by_name(automation.name)
        if not there:
            client.create_automation(automation)
        done[automation.name] = "left as it is" if there else "created"
    return done
