"""Registering anew leaves what was edited on the server, and brings the rest up to date; against a real server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from flows.choices import PoolType
from flows.cli.main import app
from flows.server import deploy, registration
from tests.support.checkout import PROJECT

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

POOLS = (deploy.CPU_POOL, deploy.CUDA_POOL)
SHIPPED = json.loads((PROJECT / "deployments" / "pools" / "process.json").read_text())


@pytest.fixture
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    """Of a server without work pools, before and after."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        remove_pools(client)
        yield client
        remove_pools(client)


def remove_pools(client: SyncPrefectClient) -> None:
    for pool in client.read_work_pools():
        client.delete_work_pool(pool.name)


def template_on(client: SyncPrefectClient, pool: str = deploy.CPU_POOL) -> dict[str, Any]:
    return client.read_work_pool(pool).base_job_template


def variables_on(client: SyncPrefectClient, pool: str = deploy.CPU_POOL) -> dict[str, Any]:
    return template_on(client, pool)["variables"]["properties"]


def put_template(client: SyncPrefectClient, template: dict[str, Any], pool: str = deploy.CPU_POOL) -> None:
    """As the UI does."""
    from prefect.client.schemas.actions import WorkPoolUpdate

    client.update_work_pool(pool, WorkPoolUpdate(base_job_template=template))


def edit(client: SyncPrefectClient) -> dict[str, Any]:
    """Give the runs of pool cpu another environment, as the UI's form of defaults does; what the server then has."""
    template = template_on(client)
    template["variables"]["properties"]["env"]["default"]["AMAZON_FT_DATA"] = "/mine"
    put_template(client, template)
    return template


def ship_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this version ship job templates that say something else of the working directory."""
    shutil.copytree(PROJECT / "deployments", path)
    file = path / "pools" / "process.json"
    file.write_text(file.read_text().replace("Where the process starts", "Where a new version starts"))
    monkeypatch.setattr(deploy, "DEPLOYMENTS", path)


@pytest.mark.parametrize("before", ["ours", "of 0.1.0"])
def test_an_edited_template_is_kept_and_how_to_take_ours_is_said(client: SyncPrefectClient, before: str) -> None:
    deploy.set_up_pools(PoolType.PROCESS, 1)
    if before == "of 0.1.0":
        put_template(client, SHIPPED)
    edited = edit(client)
    said: list[str] = []
    deploy.set_up_pools(PoolType.PROCESS, 1, say=said.append)
    assert template_on(client) == edited
    assert said[:2] == [
        "work pool cpu: its job template was edited on the server and is kept. For ours in its place: amazon-ft deploy --pools "
        "process --overwrite-templates, or delete the pool (prefect work-pool delete cpu) and deploy again.",
        "work pool cuda: brought up to date",
    ]


def test_a_template_that_nobody_edited_follows_a_new_version(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    deploy.set_up_pools(PoolType.PROCESS, 1, say=said.append)
    ship_another(tmp_path / "next", monkeypatch)
    deploy.set_up_pools(PoolType.PROCESS, 1, say=said.append)
    assert all("a new version" in variables_on(client, pool)["working_dir"]["description"] for pool in POOLS)
    told = [line for line in said if line.startswith("work pool")]
    assert told == [f"work pool {pool}: {done}" for done in ("created", "brought up to date") for pool in POOLS]


def test_a_template_of_0_1_0_is_ours_as_long_as_it_is_the_shipped_one(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    client.create_work_pool(WorkPoolCreate(name="cpu", type="process", base_job_template=SHIPPED))
    deploy.set_up_pools(PoolType.PROCESS, 1)
    ship_another(tmp_path / "next", monkeypatch)
    deploy.set_up_pools(PoolType.PROCESS, 1)
    assert "a new version" in variables_on(client)["working_dir"]["description"]


def test_an_edit_is_still_one_when_a_new_version_comes(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy.set_up_pools(PoolType.PROCESS, 1)
    edited = edit(client)
    ship_another(tmp_path / "next", monkeypatch)
    deploy.set_up_pools(PoolType.PROCESS, 1)
    assert template_on(client) == edited


def test_the_number_of_trainings_is_brought_up_to_date_beside_an_edited_template(
    client: SyncPrefectClient, prefect_api: str
) -> None:
    deploy.set_up_pools(PoolType.PROCESS, 1)
    put_template(client, edited := template_on(client, "cuda") | {"mine": True}, "cuda")
    deploy.set_up_pools(PoolType.PROCESS, 3)
    assert client.read_work_pool("cuda").concurrency_limit == 3
    assert template_on(client, "cuda") == edited


@pytest.mark.parametrize("kind", PoolType)
def test_every_pool_has_a_queue_that_goes_first_and_keeps_the_rank_that_somebody_gave_it(
    client: SyncPrefectClient, kind: PoolType
) -> None:
    def ranks(pool: str) -> dict[str, int | None]:
        return {queue.name: queue.priority for queue in client.read_work_queues(work_pool_name=pool)}

    deploy.set_up_pools(kind, 1)
    assert [ranks(pool) for pool in POOLS] == [{"urgent": 1, "default": 2}] * 2
    client.update_work_queue(client.read_work_queue_by_name("urgent", work_pool_name="cuda").id, priority=3)
    deploy.set_up_pools(kind, 1)
    assert ranks("cuda") == {"default": 2, "urgent": 3}


def test_what_we_write_is_the_shipped_template_and_its_digest(client: SyncPrefectClient, prefect_api: str) -> None:
    deploy.set_up_pools(PoolType.PROCESS, 1)
    written = template_on(client)
    assert written["variables"].pop("$comment").startswith("amazon-ft ")
    assert written == SHIPPED


def test_the_command_keeps_an_edited_template_unless_it_is_told_to_overwrite(
    client: SyncPrefectClient, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deployments, which it registers too, are test_registration.py's."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    monkeypatch.setattr(registration, "register", lambda choices, say: None)

    def command(*options: str) -> str:
        done = CliRunner().invoke(app, ["deploy", *options])
        assert done.exit_code == 0, done.output
        assert f"registered at {prefect_api}: work pools cpu and cuda" in done.stderr
        return done.stderr

    deploy.set_up_pools(PoolType.PROCESS, 1)
    edited = edit(client)
    assert "work pool cpu: its job template was edited on the server and is kept." in command()
    assert template_on(client) == edited
    assert "is kept" not in command("--overwrite-templates")
    assert template_on(client) != edited
    assert "AMAZON_FT_DATA" not in variables_on(client)["env"]["default"]
