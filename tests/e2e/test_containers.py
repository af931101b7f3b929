"""Images and compose, really built and run: `make containers`. Takes an engine, compose, and minutes for the first build.

What the build needs here (another base, a mirror, a certificate) is given as docker's own options in AMAZON_FT_BUILD_OPTIONS.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from flows.choices import PoolType
from flows.server.deploy import set_up_pools
from tests.e2e.served import SIZES, Served, answers, until
from tests.support.checkout import PROJECT
from tests.support.prefect_file import BUILD, step, with_images
from tests.support.tiny import make_tiny_model

IMAGE = "amazon-ft:cpu"
ASKED = "AMAZON_FT_CONTAINERS"
LONG = ["finetune.max_steps=800", "finetune.logging_steps=10", "finetune.save_steps=100", "model.id=/source/model"]
"""Settings of a training that is still at it when it is killed."""
THREADS = {"OMP_NUM_THREADS": "1"}
"""For equal sums to the last bit, and because more wait for each other on a busy machine."""

pytestmark = [pytest.mark.containers, pytest.mark.timeout(3600)]


def docker(*arguments: str, check: bool = True, **env: str) -> str:
    """What the command printed."""
    done = subprocess.run(["docker", *arguments], env=os.environ | env, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"docker {shlex.join(arguments)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def image() -> str:
    """The CPU image, built from the Dockerfile as it stands."""
    if not os.environ.get(ASKED):
        pytest.skip("containers are only built and run by `make containers`")
    if shutil.which("docker") is None:
        pytest.skip("no Docker engine is here: the command docker is missing")
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine is here: `docker info` fails")
    options = shlex.split(os.environ.get("AMAZON_FT_BUILD_OPTIONS", ""))
    docker("build", "-f", str(PROJECT / "docker" / "Dockerfile.cpu"), "-t", IMAGE, *options, str(PROJECT), DOCKER_BUILDKIT="1")
    return IMAGE


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What containers see at /source: a tiny model."""
    path = tmp_path_factory.mktemp("source")
    make_tiny_model(path / "model")
    for each in (path, *path.rglob("*")):
        each.chmod(0o755)
    path.parent.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def volume() -> Iterator[str]:
    name = f"amazon-ft-test-{uuid4().hex[:8]}"
    docker("volume", "create", name)
    yield name
    docker("volume", "rm", "--force", name)


def run_demo(image: str, volume: str, source: Path, *overrides: str) -> dict[str, str]:
    """`docker run IMAGE run demo` with nothing but /data to write to; {stage: state}."""
    options = ["--rm", "--read-only", "--cap-drop", "ALL", "-v", f"{volume}:/data", "-v", f"{source}:/source:ro"]
    options += [word for name, value in THREADS.items() for word in ("-e", f"{name}={value}")]
    settings = [word for setting in overrides for word in ("--set", setting)]
    printed = docker("run", *options, image, "run", "demo", "--json", *settings)
    return {stage["name"]: stage["state"] for stage in json.loads(printed.splitlines()[-1])["stages"]}


@pytest.fixture(scope="module")
def undisturbed(image: str, volume: str, source: Path) -> dict[str, str]:
    return run_demo(image, volume, source, *SIZES, *LONG)


def adapters(listed: str) -> set[str]:
    return {line.strip() for line in listed.splitlines() if line.strip()}


def test_a_small_run_completes_as_nobody_special_and_is_cached_afterwards(
    undisturbed: dict[str, str], image: str, volume: str, source: Path
) -> None:
    assert undisturbed["finetune"] == undisturbed["save"] == "completed"
    assert docker("run", "--rm", image, "id", "-u").strip() == "10001"
    assert set(run_demo(image, volume, source, *SIZES, *LONG).values()) == {"cached"}


def test_a_container_without_a_command_says_what_it_can_do(image: str) -> None:
    assert "Usage: amazon-ft" in docker("run", "--rm", image)


def deploy_demo(directory: Path, name: str, *, push: bool) -> subprocess.CompletedProcess[str]:
    """`prefect deploy` of amazon-ft/demo with an image of that name, which is built with the options that are needed here."""
    settings = with_images()
    settings["deployments"] = [each for each in settings["deployments"] if each["name"] == "demo"]
    (demo,) = settings["deployments"]
    options = shlex.split(os.environ.get("AMAZON_FT_BUILD_OPTIONS", ""))
    given = list(zip(options[::2], options[1::2], strict=True))
    step(demo, BUILD)["image_name"] = name
    step(demo, BUILD)["build_args"] = dict(value.split("=", 1) for option, value in given if option == "--build-arg")
    step(demo, BUILD)["secrets"] = [value for option, value in given if option == "--secret"]
    if not push:
        del demo["push"]
    file = directory / "prefect.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--name", "demo", "--prefect-file", str(file)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)


def test_prefect_deploys_an_image_of_this_code_and_nothing_that_the_registry_refused(
    image: str, prefect_api: str, tmp_path: Path
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    nowhere = "127.0.0.1:1/amazon-ft"
    set_up_pools(PoolType.DOCKER, 1)
    with get_client(sync_client=True) as client:
        refused = deploy_demo(tmp_path, nowhere, push=True)
        assert refused.returncode != 0
        assert f"dial tcp {nowhere.split('/')[0]}: connect: connection refused" in refused.stdout + refused.stderr
        with pytest.raises(ObjectNotFound):
            client.read_deployment_by_name("amazon-ft/demo")
        done = deploy_demo(tmp_path, nowhere, push=False)
        assert done.returncode == 0, done.stdout + done.stderr
        demo = client.read_deployment_by_name("amazon-ft/demo")
    assert demo.job_variables["image"] == f"{nowhere}:cpu-{demo.version}"
    has = "from flows.server.deploy import read_version; print(read_version()['version'])"
    assert docker("run", "--rm", demo.job_variables["image"], "python", "-c", has).strip() == demo.version


@pytest.fixture(scope="module")
def composed(image: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, list[str]]]:
    """compose.yaml, brought up from nothing; and the words that its other commands begin with."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, project = f"http://127.0.0.1:{port}", f"amazon-ft-test-{uuid4().hex[:8]}"
    threads = tmp_path_factory.mktemp("compose") / "threads.json"
    threads.write_text(json.dumps({"services": {"cuda-worker": {"environment": THREADS}}}))
    files = [PROJECT / "docker" / "compose.yaml", threads]
    words = ["compose", "--project-name", project, *(word for file in files for word in ("--file", str(file)))]
    given = {
        "POSTGRES_PASSWORD": "p@ss/word:%",
        "AMAZON_FT_PORT": str(port),
        "AMAZON_FT_URL": url,
        "AMAZON_FT_SOURCE": str(source),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        try:
            docker(*words, "up", "--detach", "--wait", "--no-build")
            yield Served(url, source, Path("/source/model"), None), words  # type: ignore[arg-type]
        finally:
            print(docker(*words, "logs", "--no-color", "--tail", "200", check=False))  # shown with what failed
            docker(*words, "down", "--volumes", "--timeout", "60", check=False)


def test_a_deployed_run_survives_the_end_of_server_database_and_worker_and_learns_the_same(
    composed: tuple[Served, list[str]], undisturbed: dict[str, str], image: str, volume: str
) -> None:
    served, words = composed
    settings = json.dumps([*SIZES, *LONG])
    command = ["prefect", "deployment", "run", "amazon-ft/demo", "--param", f"overrides={settings}"]
    docker(*words, "exec", "-T", "cpu-worker", *command)
    run = until(lambda: served.post("flow_runs/filter", flows={"name": {"any_": ["amazon-ft"]}}))[0]["id"]

    def wait_for_checkpoint(other_than: set[str]) -> set[str]:
        listed = ["exec", "-T", "cpu-worker", "sh", "-c", "ls -d /data/work/*/checkpoint-*"]
        return until(lambda: adapters(docker(*words, *listed, check=False)) - other_than)

    seen = wait_for_checkpoint(set())
    docker(*words, "kill", "database", "server")
    docker(*words, "start", "database", "server")
    wait_for_checkpoint(seen)
    docker(*words, "kill", "cuda-worker")
    docker(*words, "start", "cuda-worker")
    ended = served.ended(run)
    assert ended["state_type"] == "COMPLETED", ended["state"]
    trainings = sorted(served.children(run), key=lambda child: child["created"])
    assert [child["state_type"] for child in trainings] == ["CRASHED", "COMPLETED"]
    learnt = adapters(docker(*words, "exec", "-T", "cpu-worker", "ls", "/data/artifacts/adapter"))
    assert learnt == adapters(docker("run", "--rm", "-v", f"{volume}:/data", image, "ls", "/data/artifacts/adapter"))


@pytest.fixture
def pool_of_containers(image: str, source: Path) -> Iterator[tuple[Served, str]]:
    """A server and a worker of each pool, in containers that the engine's socket is given to; and the volume of their runs."""
    name = f"amazon-ft-test-{uuid4().hex[:8]}"
    socket_path = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
    options = ["run", "--detach", "--network", name, "-e", "PREFECT_API_URL=http://server:4200/api"]
    engine = ["-v", f"{socket_path}:/var/run/docker.sock", "--group-add", str(Path(socket_path).stat().st_gid)]
    docker("network", "create", name)
    containers: list[str] = []
    try:
        published = ["--network-alias", "server", "--publish", "127.0.0.1::4200", image]
        containers += docker(*options, *published, "prefect", "server", "start", "--host", "0.0.0.0").split()
        port = docker("port", containers[0], "4200").strip().rpartition(":")[2]
        served = Served(f"http://127.0.0.1:{port}", source, Path("/source/model"), None)  # type: ignore[arg-type]
        until(lambda: answers(served.url))
        docker("run", "--rm", *options[2:], image, "deploy", "--pools", "docker")
        given = {"networks": [name], "volumes": [f"{name}:/data", f"{source}:/source:ro"]}
        served.change_pool("cpu", **given)
        served.change_pool("cuda", env=THREADS, image=image, device_requests=[], **given)
        for pool in ("cpu", "cuda"):
            containers += docker(
                *options, *engine, image, "prefect", "worker", "start", "--pool", pool, "--type", "docker"
            ).split()
        yield served, name
    finally:
        for container in reversed(containers):
            print(docker("logs", "--tail", "100", container, check=False))  # shown with what failed
            docker("rm", "--force", container, check=False)
        docker("volume", "rm", "--force", name, check=False)
        docker("network", "rm", name, check=False)


def test_a_pool_of_containers_makes_run_and_training_in_one_each(
    pool_of_containers: tuple[Served, str], undisturbed: dict[str, str], image: str, volume: str
) -> None:
    served, own = pool_of_containers
    run = served.start(*LONG)
    child = served.child(run)["id"]
    until(lambda: "step 10 of 800" in served.logs(child))
    ids = {run: served.run(run)["infrastructure_pid"], child: served.run(child)["infrastructure_pid"]}
    running = docker("ps", "--no-trunc", "--format", "{{.ID}} {{.Names}}")
    assert all(pid.rpartition(":")[2] in running for pid in ids.values()), (ids, running)
    ended = served.ended(run)
    assert ended["state_type"] == "COMPLETED", served.logs(run)
    print(served.logs(run), served.logs(child), sep="\n")
    learnt, wanted = (
        docker("run", "--rm", "-v", f"{each}:/data", image, "ls", "/data/artifacts/adapter") for each in (own, volume)
    )
    assert adapters(learnt) == adapters(wanted) != set()
