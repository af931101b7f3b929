"""What is registered with a server, and what it starts: the forms, the job templates, the compose file, the images.

No Docker daemon, cluster or GPU is needed: job templates go through the worker classes that would use them.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from flows.choices import PoolType
from flows.recipes import shipped_names
from flows.running import pools, supervisor
from flows.running.child import RESTARTS
from flows.server import deploy, registration
from tasks.caching.identity import source_digest
from tasks.refs import ConfigError
from tests.support.checkout import PROJECT
from tests.support.prefect_file import BUILD, PUSH, step, with_images

POOLS = sorted((PROJECT / "deployments" / "pools").glob("*.json"))
HEARTBEAT = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}

SUPERVISED = "python -m flows.running.supervisor container prefect flow-run execute"
"""The first process of a container gets its SIGTERM, and Prefect's would take no notice of it."""


def template(name: str) -> dict[str, Any]:
    return json.loads((PROJECT / "deployments" / "pools" / f"{name}.json").read_text())


def prepared(worker: Any, name: str, **values: Any) -> Any:
    """The job that a worker would start from a template."""
    from prefect.client.schemas.objects import Flow, FlowRun

    configuration = asyncio.run(worker.job_configuration.from_template_and_values(template(name), values))
    flow_run = FlowRun(id=uuid4(), flow_id=uuid4(), name="demo 40 rows 00000000")
    configuration.prepare_for_flow_run(flow_run, flow=Flow(id=flow_run.flow_id, name="amazon-ft"))
    return configuration


def test_prefect_yaml_names_every_shipped_recipe_and_the_training() -> None:
    settings = yaml.safe_load(registration.PREFECT_FILE.read_text())
    names = {item["name"]: item for item in settings["deployments"]}
    assert sorted(names) == sorted([*shipped_names(), "cuda"])
    assert all(names[name]["parameters"]["config"] == f"{{{{ recipes.{name} }}}}" for name in shipped_names())
    assert f"amazon-ft-train/{'cuda'}" == pools.TRAINING
    assert {item["work_pool"]["name"] for item in names.values()} == {pools.CPU_POOL, pools.CUDA_POOL}


def test_read_recipes_gives_what_the_files_say_and_a_valid_recipe() -> None:
    from tasks.config import Recipe

    recipes = deploy.read_recipes()
    assert sorted(recipes) == shipped_names()
    assert "weight_decay" not in recipes["demo"]["finetune"]
    assert all(Recipe.model_validate(recipe).name == name for name, recipe in recipes.items())


def test_version_tells_the_release_and_the_code_and_may_be_an_images_tag() -> None:
    release = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    told = deploy.read_version()["version"]
    assert told == f"{release}-{source_digest('flows.amazon_ft')[:12]}"
    assert re.fullmatch(r"[\w.-]{1,128}", told)
    deployments = yaml.safe_load(registration.PREFECT_FILE.read_text())["deployments"]
    assert {item["version"] for item in deployments} == {"{{ code.version }}"}


def test_steps_for_images_are_prefects_own_and_every_deployment_runs_the_image_of_its_pool() -> None:
    pytest.importorskip("prefect_docker", exc_type=ImportError)
    from prefect.cli.deploy._models import PrefectYamlModel
    from prefect.utilities.importtools import import_object

    settings = with_images()
    PrefectYamlModel.model_validate(settings)
    for deployment in settings["deployments"]:
        pool = deployment["work_pool"]
        for name in (BUILD, PUSH):
            inspect.signature(import_object(name)).bind(
                **{key: value for key, value in step(deployment, name).items() if key != "id"}
            )
        built = step(deployment, BUILD)
        assert (built["dockerfile"], built["tag"]) == (
            f"docker/Dockerfile.{pool['name']}",
            f"{pool['name']}-{{{{ code.version }}}}",
        )
        assert pool["job_variables"] == {"image": f"{{{{ {built['id']}.image }}}}"}
        assert built["id"] != "image", "a step's outputs, `image` among them, hide the ids of the steps"
        assert all("image" in template(f"{kind}-{pool['name']}")["variables"]["properties"] for kind in ("docker", "kubernetes"))
        needed = settings["build"] if "parameters" in deployment else settings["build"][1:]
        assert deployment["build"][:-1] == needed, "the recipe and the version, as without an image"


def test_data_directory_is_the_given_one_or_where_the_worker_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/somewhere")
    monkeypatch.delenv("AMAZON_FT_DATA", raising=False)
    assert deploy.enter_data_directory() == {"directory": "/somewhere"}
    monkeypatch.setenv("AMAZON_FT_DATA", "/source")
    assert deploy.enter_data_directory() == {"directory": "/source"}


def test_every_pool_type_has_templates_for_both_pools() -> None:
    for kind in PoolType:
        assert deploy.template_of(kind, pools.CPU_POOL).is_file()
        assert deploy.template_of(kind, pools.CUDA_POOL).is_file()


@pytest.mark.parametrize("path", POOLS, ids=lambda path: path.stem)
def test_template_is_valid_for_prefect_and_every_placeholder_has_a_variable(path: Path) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.utilities.templating import find_placeholders

    content = json.loads(path.read_text())
    WorkPoolCreate(name="p", type=path.stem.split("-")[0], base_job_template=content)
    names = {placeholder.name for placeholder in find_placeholders(content["job_configuration"])}
    assert names == set(content["variables"]["properties"])
    assert HEARTBEAT.items() <= content["variables"]["properties"]["env"]["default"].items()


def test_process_job_sends_heartbeats(prefect_api: str) -> None:
    from prefect.workers.process import ProcessWorker

    job = prepared(ProcessWorker, "process")
    assert HEARTBEAT.items() <= job.env.items()


@pytest.mark.parametrize("pool", ["cpu", "cuda"])
def test_docker_job_asks_for_one_gpu_where_it_trains(prefect_api: str, pool: str) -> None:
    worker = pytest.importorskip("prefect_docker.worker", exc_type=ImportError).DockerWorker
    job = prepared(worker, f"docker-{pool}")
    kwargs = job.container_create_kwargs
    assert job.image == f"amazon-ft:{pool}"
    assert job.volumes == ["amazon-ft_data:/data", "amazon-ft_source:/source:ro"]
    assert (kwargs["user"], kwargs["read_only"], kwargs["tmpfs"]) == ("10001", True, {"/tmp": "exec"})
    assert kwargs.get("shm_size") == ("8g" if pool == "cuda" else None)
    wanted = [{"Driver": "nvidia", "Count": 1, "Capabilities": [["gpu"]]}] if pool == "cuda" else None
    assert kwargs.get("device_requests") == wanted
    assert job.env["AMAZON_FT_HOME"] == "/data"
    assert job.command == SUPERVISED


def test_docker_job_has_the_gpus_memory_user_and_network_of_its_pool(prefect_api: str) -> None:
    worker = pytest.importorskip("prefect_docker.worker", exc_type=ImportError).DockerWorker
    gpus = [{"Driver": "nvidia", "DeviceIDs": ["2"], "Capabilities": [["gpu"]]}]
    job = prepared(worker, "docker-cuda", device_requests=gpus, mem_limit="64g", user="1000:1000", networks=["amazon-ft_default"])
    assert job.container_create_kwargs["device_requests"] == gpus
    assert (job.mem_limit, job.memswap_limit, job.networks) == ("64g", "64g", ["amazon-ft_default"])
    assert job.container_create_kwargs["user"] == "1000:1000"


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_run_on_machines_that_come_and_go_starts_its_lost_training_again(kind: str) -> None:
    env = template(f"{kind}-cpu")["variables"]["properties"]["env"]["default"]
    assert int(env[RESTARTS]) > 0


@pytest.mark.parametrize("pool", ["cpu", "cuda"])
def test_kubernetes_job_asks_for_one_gpu_where_it_trains(prefect_api: str, pool: str) -> None:
    worker = pytest.importorskip("prefect_kubernetes.worker", exc_type=ImportError).KubernetesWorker
    pod = prepared(worker, f"kubernetes-{pool}").job_manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    gpu = pool == "cuda"
    assert container["resources"]["limits"].get("nvidia.com/gpu") == (1 if gpu else None)
    assert pod["nodeSelector"] == ({"nvidia.com/gpu.present": "true"} if gpu else {})
    assert [entry["key"] for entry in pod["tolerations"]] == (["nvidia.com/gpu"] if gpu else [])
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    assert claims == {"amazon-ft-home", "amazon-ft-source"}
    assert {"name": "AMAZON_FT_HOME", "value": "/data"} in container["env"]
    assert container["args"] == SUPERVISED.split()
    assert pod["terminationGracePeriodSeconds"] > supervisor.RUN_SECONDS + supervisor.END_SECONDS


def test_schedules_that_are_on_stay_on_when_deployments_are_registered_anew(prefect_api: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    weekly, daily = CronSchedule(cron="0 3 * * 1"), CronSchedule(cron="0 3 * * *")
    with get_client(sync_client=True) as client:
        flow = client.create_flow_from_name("scheduled")
        schedules = [DeploymentScheduleCreate(schedule=each, active=True) for each in (weekly, daily)]
        deployment = client.create_deployment(flow, "scheduled", schedules=schedules)
        before = {deployment: client.read_deployment(deployment).schedules}
        for each in client.read_deployment(deployment).schedules:
            client.delete_deployment_schedule(deployment, each.id)
        client.create_deployment_schedules(deployment, [(weekly, False)])  # what the file says
        registration._switch_on(before)
        now = {each.schedule.cron: each.active for each in client.read_deployment(deployment).schedules}
        client.delete_deployment(deployment)
    assert now == {weekly.cron: True, daily.cron: True}


def test_without_a_server_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(ConfigError, match=r"^PREFECT_API_URL: no server"):
        deploy.server_url()


def test_automation_is_one_that_prefect_accepts() -> None:
    from prefect.events.schemas.automations import AutomationCore

    (settings,) = yaml.safe_load((PROJECT / "deployments" / "automations.yaml").read_text())["automations"]
    automation = AutomationCore.model_validate(settings)
    assert automation.trigger.within.total_seconds() == 90
    assert "prefect.flow-run.Completed" in automation.trigger.expect


COMPOSE = ["compose.yaml", "compose.gpu.yaml"]


def test_compose_takes_its_password_from_the_environment_and_listens_on_loopback() -> None:
    text = (PROJECT / "docker" / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    assert "POSTGRES_PASSWORD:-" not in text
    assert text.count("${POSTGRES_PASSWORD:?") == 2
    assert services["server"]["ports"] == ["127.0.0.1:${AMAZON_FT_PORT:-4200}:4200"]
    assert services["cpu-worker"]["volumes"] == services["cuda-worker"]["volumes"]


def test_compose_file_asks_for_a_gpu_only_in_its_overlay() -> None:
    plain, overlay = (yaml.safe_load((PROJECT / "docker" / file).read_text())["services"] for file in COMPOSE)
    assert not any("deploy" in service for service in plain.values())
    (device,) = overlay["cuda-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["device_ids"], device["capabilities"]) == ("nvidia", ["0"], ["gpu"])
    assert set(overlay) == {"cuda-worker"}


def test_every_lasting_service_tells_whether_it_is_well() -> None:
    services = yaml.safe_load((PROJECT / "docker" / "compose.yaml").read_text())["services"]
    assert [name for name, service in services.items() if "healthcheck" not in service] == ["deploy"]


@pytest.mark.parametrize("file", COMPOSE)
def test_compose_file_fits_its_schema(file: str) -> None:
    if find_spec("check_jsonschema") is None:
        pytest.skip("check-jsonschema is not installed")
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(PROJECT / "docker" / file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_dockerfile_passes_hadolint(file: str) -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(PROJECT / "docker" / file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_image_runs_as_nobody_special_from_a_pinned_base_that_may_be_another(file: str) -> None:
    lines = (PROJECT / "docker" / file).read_text().splitlines()
    assert "USER 10001" in lines
    (base,) = [line.split("=", 1) for line in lines if re.match(r"ARG \w+_IMAGE=", line)]
    assert re.search(r":\d+\.\d+", base[1])
    stages = {line.split()[-1] for line in lines if re.match(r"FROM .* AS ", line)}
    bases = {line.split()[1] for line in lines if line.startswith("FROM")}
    assert bases - stages == {f"${{{base[0].removeprefix('ARG ')}}}"}


@pytest.mark.parametrize("file", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_image_needs_no_registry_but_its_bases_and_names_its_version(file: str) -> None:
    text = (PROJECT / "docker" / file).read_text()
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert not text.startswith("# syntax")
    assert f"image.version={project['version']} " in text
    assert "HEALTHCHECK" not in text, "a container that runs a job answers no questions"


def test_image_gets_the_dependencies_of_pyproject() -> None:
    done = subprocess.run(
        [sys.executable, "docker/list_dependencies.py", "cuda", "docker"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    listed = done.stdout.splitlines()
    assert any(line.startswith("prefect>=") for line in listed)
    assert any(line.startswith("unsloth>=") for line in listed)
    assert any(line.startswith("prefect-docker>=") for line in listed)


def test_docker_context_holds_all_that_the_images_copy() -> None:
    allowed = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for file in ("Dockerfile.cpu", "Dockerfile.cuda"):
        copies = [line.split() for line in (PROJECT / "docker" / file).read_text().splitlines() if line.startswith("COPY")]
        wanted = {source for words in copies if not words[1].startswith("--from=") for source in words[1:-1]}
        assert wanted <= allowed
        assert all((PROJECT / source).exists() for source in wanted)


def manifests() -> list[dict[str, Any]]:
    files = sorted((PROJECT / "deployments" / "kubernetes").glob("*.yaml"))
    return [item for file in files for item in yaml.safe_load_all(file.read_text())]


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {item["metadata"]["name"]: item for item in manifests() if item["kind"] == kind}


def test_kustomization_names_every_manifest() -> None:
    folder = PROJECT / "deployments" / "kubernetes"
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert sorted([*listed, "kustomization.yaml"]) == sorted(path.name for path in folder.glob("*.yaml"))


def test_cluster_has_the_claims_and_the_namespace_that_the_job_templates_name() -> None:
    (kustomization,) = (item for item in manifests() if item["kind"] == "Kustomization")
    for pool in ("cpu", "cuda"):
        variables = template(f"kubernetes-{pool}")["variables"]["properties"]
        assert variables["namespace"]["default"] == kustomization["namespace"]
        assert {variables[name]["default"] for name in ("home_claim", "source_claim")} <= set(of_kind("PersistentVolumeClaim"))


def test_workers_of_a_cluster_may_do_with_jobs_and_pods_what_they_have_to_and_no_more() -> None:
    rules = of_kind("Role")["worker"]["rules"]
    assert {rule["resources"][0]: rule["verbs"] for rule in rules} == {
        "jobs": ["get", "list", "watch", "create", "delete"],
        "pods": ["list", "watch"],
        "pods/log": ["get"],
    }
    assert "*" not in json.dumps(rules)
    assert not of_kind("ClusterRole")


def test_pods_of_a_cluster_run_as_nobody_special_on_a_root_that_may_only_be_read() -> None:
    pods = [of_kind("Deployment")[name]["spec"]["template"]["spec"] for name in ("server", "worker")]
    pods += [
        template(f"kubernetes-{pool}")["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
        for pool in ("cpu", "cuda")
    ]
    for pod in pods:
        assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 10001)
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            closed = container["securityContext"]
            assert closed == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/tmp", "/data"}
