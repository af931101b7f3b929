"""A Kubernetes cluster, really used: `make cluster CLUSTER=DIR`, where DIR is a kustomization of deployments/kubernetes.

It says what that cluster needs: the image's name, volumes, addresses. kubectl has to reach it, as an administrator, and namespace
amazon-ft must not be there yet; it is taken away again. The source's claim has to hold a model of any kind at /source/model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.served import SIZES, Served, answers, until
from tests.e2e.test_containers import LONG, adapters
from tests.support.checkout import PROJECT

ASKED = "AMAZON_FT_CLUSTER"
NAMESPACE = "amazon-ft"
LEAST = {"cpu_request": "100m", "memory_request": "200Mi"}
"""What a job of either pool asks for, so that it finds room on a small node."""
LISTING = {"name": "home", "persistentVolumeClaim": {"claimName": "amazon-ft-home"}}

pytestmark = [pytest.mark.containers, pytest.mark.timeout(3600)]


def kubectl(*words: str, given: str | None = None) -> str:
    """What the command printed."""
    done = subprocess.run(["kubectl", "-n", NAMESPACE, *words], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"kubectl {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@contextmanager
def forwarded() -> Iterator[str]:
    """An address of this machine that leads to the server in the cluster."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(["kubectl", "-n", NAMESPACE, "port-forward", "service/server", f"{port}:4200"])
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(url))
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Served]:
    """README.md's commands, and the server behind them; both pools' jobs are small and ask for no GPU."""
    overlay = os.environ.get(ASKED)
    if not overlay:
        pytest.skip("a cluster is only used by `make cluster`")
    if shutil.which("kubectl") is None:
        pytest.skip("no cluster is reached: the command kubectl is missing")
    kubectl("create", "namespace", NAMESPACE)
    try:
        kubectl("create", "secret", "generic", "database", "--from-literal=password=p@ss/word:%")
        kubectl("apply", "-k", overlay)
        for name in ("database", "server", "worker"):
            kubectl("rollout", "status", f"deployment/{name}", "--timeout=600s")
        with forwarded() as url:
            served = Served(url, PROJECT, Path("/source/model"), None)  # type: ignore[arg-type]
            served.change_pool("cpu", **LEAST)
            served.change_pool("cuda", image=image(served), gpus=0, node_selector={}, env={"OMP_NUM_THREADS": "1"}, **LEAST)
            yield served
    finally:
        print(subprocess.run(["kubectl", "-n", NAMESPACE, "get", "pods"], capture_output=True, text=True, check=False).stdout)
        subprocess.run(["kubectl", "delete", "namespace", NAMESPACE], check=False, capture_output=True)


def image(served: Served) -> str:
    """The image of pool `cpu`."""
    return served.get("work_pools/cpu")["base_job_template"]["variables"]["properties"]["image"]["default"]


def deployed(served: Served, home: str, *overrides: str) -> str:
    """The id of a run that `prefect deployment run` submitted, in a root of its own below the claim."""
    for pool in ("cpu", "cuda"):
        served.change_pool(pool, env={"AMAZON_FT_HOME": f"/data/{home}"})
    settings = json.dumps([*SIZES, *overrides, "model.id=/source/model"])
    command = ["prefect", "deployment", "run", "amazon-ft/demo", "--param", f"overrides={settings}"]
    told = kubectl("exec", "deployment/worker", "-c", "cpu", "--", *command)
    found = re.search(r"UUID: ([0-9a-f-]{36})", told)
    assert found is not None, told
    return found[1]


def made_adapters(served: Served, home: str) -> set[str]:
    """The names, which are digests, of a root's adapters; a pod that mounts the claim lists them."""
    mounted = {"name": "list", "image": image(served), "args": ["ls", f"/data/{home}/artifacts/adapter"]}
    pod = {"volumes": [LISTING], "containers": [mounted | {"volumeMounts": [{"name": "home", "mountPath": "/data"}]}]}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"list-{home}"}, "spec": pod | {"restartPolicy": "Never"}}
    kubectl("apply", "-f", "-", given=json.dumps(body))
    until(lambda: kubectl("get", "pod", f"list-{home}", "-o", "jsonpath={.status.phase}") == "Succeeded")
    return adapters(kubectl("logs", f"list-{home}"))


def test_a_training_whose_pod_is_deleted_goes_on_in_another_and_learns_the_same(cluster: Served) -> None:
    run = deployed(cluster, "undisturbed", *LONG)
    assert cluster.ended(run)["state_type"] == "COMPLETED", cluster.logs(run)
    run = deployed(cluster, "disturbed", *LONG)
    child = cluster.child(run)["id"]
    until(lambda: re.search(r"step 2[1-9]0 of 800", cluster.logs(child)))
    kubectl("delete", "pod", "-l", f"prefect.io/flow-run-id={child}", "--wait=false")
    assert cluster.ended(run)["state_type"] == "COMPLETED", cluster.logs(run)
    first, second = sorted(cluster.children(run), key=lambda child: child["created"])
    assert (first["state_type"], second["state_type"]) == ("CRASHED", "COMPLETED")
    goes_on = re.search(r"goes on from step (\d+)", cluster.logs(second["id"]))
    assert goes_on is not None
    assert int(goes_on[1]) > 200, "no checkpoint was written when the pod was told to end, only after step 200"
    assert made_adapters(cluster, "disturbed") == made_adapters(cluster, "undisturbed") != set()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image": "registry.invalid/amazon-ft:none"}, "ErrImagePull|ImagePullBackOff|ErrImageNeverPull"),
        (
            {"node_selector": {"nvidia.com/gpu.present": "true"}, "gpus": 1},
            "didn't match Pod's node affinity/selector|Insufficient",
        ),
        ({"memory_limit": "120Mi", "memory_request": "60Mi"}, "OOMKilled|exit code 137|out of memory"),
    ],
    ids=["an image that is not there", "no node with a GPU", "too little memory"],
)
def test_what_keeps_a_pod_from_its_work_is_said_on_the_page_of_its_run(
    cluster: Served, settings: dict[str, Any], said: str
) -> None:
    before = cluster.change_pool("cuda", **settings)
    run = deployed(cluster, "refused", *LONG)
    try:
        child = cluster.child(run)["id"]
        until(lambda: re.search(said, told(cluster, child)))
    finally:
        cluster.change_pool("cuda", **before)
        cluster.set_state(run, "CANCELLING", force=True)


def told(served: Served, run: str) -> str:
    """All that the page of a run tells: its state and its log."""
    return f"{served.run(run)['state']['message']}\n{served.logs(run)}"


def test_the_workers_may_do_nothing_else_in_the_cluster(cluster: Served) -> None:
    may = ["auth", "can-i", "--as", f"system:serviceaccount:{NAMESPACE}:worker"]
    for wish in (["get", "secrets"], ["create", "pods"], ["list", "pods", "--all-namespaces"], ["delete", "deployments"]):
        done = subprocess.run(["kubectl", "-n", NAMESPACE, *may, *wish], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "no", wish
