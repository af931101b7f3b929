"""All that a server must know before it can run anything: the work pools, the deployments, the automation against zombies.

`amazon-ft deploy` for a server that is there; `amazon-ft up` starts one and calls the same. The functions without an
underscore at the top are the steps of deployments/prefect.yaml.
"""

from __future__ import annotations

import json
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows.choices import PoolType
from flows.recipes import SHIPPED, load_recipe, shipped_names
from flows.running.pools import CPU_POOL, CUDA_POOL, URGENT
from flows.running.quiet import hide_bars
from tasks.caching.code.loading import collect_rarely
from tasks.caching.files import text_digest
from tasks.caching.identity import source_digest
from tasks.refs import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from prefect.client.orchestration import SyncPrefectClient

logger = logging.getLogger(__name__)

DEPLOYMENTS = SHIPPED.parent
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
    collect_rarely()
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


def set_up_pools(pools: PoolType, trainings: int, *, overwrite: bool = False, say: Callable[[str], None] = logger.info) -> None:
    """Create or bring up to date both work pools with their queues, and the automation, of the server at PREFECT_API_URL.

    Args:
        pools: the type of both pools.
        trainings: how many GPUs there are; as many runs of pool `cuda` go on at a time.
        overwrite: whether job templates that were edited on the server give way to ours.
        say: hears of each thing as it is created, brought up to date or left.

    Raises:
        ConfigError: for a pool of another type.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for name, limit in ((CPU_POOL, None), (CUDA_POOL, trainings)):
            say(f"work pool {name}: {_set_up_pool(client, name, pools, limit, overwrite=overwrite)}")
        for name in (CPU_POOL, CUDA_POOL):
            if URGENT not in {queue.name for queue in client.read_work_queues(work_pool_name=name)}:
                client.create_work_queue(URGENT, priority=1, work_pool_name=name)
                say(f"work queue {URGENT} of {name}: created")
        for name, done in _set_up_automations(client).items():
            say(f"automation {name}: {done}")


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
