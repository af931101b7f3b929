"""What a server must know before it can run anything: the work pools, the deployments, the automation against zombies.

`amazon-ft deploy` for a server that is there; `amazon-ft up` starts one and calls the same. The functions without an
underscore at the top are the steps of deployments/prefect.yaml.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from flows.recipes import SHIPPED, load_recipe, shipped_names
from tasks.refs import ConfigError, PipelineError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

DEPLOYMENTS = SHIPPED.parent
PREFECT_FILE = DEPLOYMENTS / "prefect.yaml"
TRAINING = "amazon-ft-train/cuda"
CPU_POOL, CUDA_POOL = "cpu", "cuda"


class PoolType(StrEnum):
    """Where the runs of a pool live; each has a job template in deployments/pools/."""

    PROCESS = "process"
    DOCKER = "docker"
    KUBERNETES = "kubernetes"


def read_recipes() -> dict[str, Any]:
    """Build step: {name: what the shipped recipe says}, defaults left out so that a form shows what was chosen."""
    return {name: load_recipe(name).model_dump(mode="json", exclude_unset=True) for name in shipped_names()}


def enter_data_directory() -> dict[str, str]:
    """Pull step: where relative paths of a recipe begin, AMAZON_FT_DATA, else where the worker was started."""
    return {"directory": os.environ.get("AMAZON_FT_DATA") or os.environ.get("PWD") or str(Path.cwd())}


def set_up(pools: PoolType, trainings: int) -> None:
    """Create or bring up to date both work pools, the automation and the deployments of the server at PREFECT_API_URL.

    Args:
        pools: the type of both pools.
        trainings: how many GPUs there are; as many runs of pool `cuda` go on at a time.

    Raises:
        PipelineError: when the server refuses, with what it said.
    """
    set_up_pools(pools, trainings)
    register()


def set_up_pools(pools: PoolType, trainings: int) -> None:
    """The part of `set_up` that workers need."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        _set_up_pool(client, CPU_POOL, pools, None)
        _set_up_pool(client, CUDA_POOL, pools, trainings)
        _set_up_automations(client)


def register() -> None:
    """Register every deployment of prefect.yaml, as `prefect deploy --all` does."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PipelineError(f"deploy: prefect deploy: ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")


def template_of(pools: PoolType, name: str) -> Path:
    """The job template of a pool; processes need no other one for a GPU."""
    stem = pools.value if pools is PoolType.PROCESS else f"{pools}-{name}"
    return DEPLOYMENTS / "pools" / f"{stem}.json"


def online_workers(pool: str) -> list[str]:
    """Names of the workers that poll a pool now; none when there is no such pool."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
    from prefect.client.schemas.objects import WorkerStatus

    online = WorkerFilter(status=WorkerFilterStatus(any_=[WorkerStatus.ONLINE]))
    with get_client(sync_client=True) as client:
        try:
            return [worker.name for worker in client.read_workers_for_work_pool(pool, worker_filter=online)]
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 404:
                raise
            return []


def _set_up_pool(client: SyncPrefectClient, name: str, pools: PoolType, limit: int | None) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    template = json.loads(template_of(pools, name).read_text())
    try:
        there = client.read_work_pool(name).type
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type=pools.value, base_job_template=template, concurrency_limit=limit))
        return
    if there != pools.value:
        raise ConfigError(
            f"work pool {name}: got one of type {there}; expected {pools}. Delete it (prefect work-pool delete {name}) or "
            f"say --pools {there}."
        )
    client.update_work_pool(name, WorkPoolUpdate(base_job_template=template, concurrency_limit=limit))


def _set_up_automations(client: SyncPrefectClient) -> None:
    from prefect.events.schemas.automations import AutomationCore

    for settings in yaml.safe_load((DEPLOYMENTS / "automations.yaml").read_text())["automations"]:
        automation = AutomationCore.model_validate(settings)
        if not client.read_automations_by_name(automation.name):
            client.create_automation(automation)
