"""Deployed: `amazon-ft up`, then `prefect deployment run amazon-ft/demo` from another shell, and what is seen of it.

Only the model's directory and sizes differ from the shipped demo. What may go wrong is in test_deployed_faults.py.
"""

from __future__ import annotations

import html
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.server.deploy import read_version
from tests.e2e.served import PREPARED, SHORT, Served, until


@pytest.fixture(scope="module")
def settings() -> list[str]:
    """Of the finished run."""
    return SHORT


@pytest.fixture(scope="module")
def finished_run(served: Served, settings: list[str]) -> str:
    """A run by Prefect's own command line that found no cuda worker at first; its id."""
    worker = served.process_named("inner", "--name", "cuda-0")
    worker.send_signal(signal.SIGSTOP)
    workers = "work_pools/cuda/workers"
    until(lambda: served.post(f"{workers}/filter"))
    served.request("DELETE", f"{workers}/cuda-0")
    command = [sys.executable, "-m", "prefect", "deployment", "run", "amazon-ft/demo", "--param"]
    done = subprocess.run(
        [*command, f"overrides={json.dumps(served.overrides(*settings))}"],
        env=served.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = until(lambda: served.post("flow_runs/filter", flows={"name": {"any_": ["amazon-ft"]}}))[0]["id"]
    until(lambda: "demo-worker" in served.artifacts(run))
    worker.send_signal(signal.SIGCONT)
    served.ended(run)
    return run


def test_up_says_how_to_use_it_and_that_there_is_no_gpu(served: Served) -> None:
    assert f"export PREFECT_API_URL={served.url}/api" in served.output
    assert "prefect deployment run amazon-ft/" in served.output


def test_every_deployment_is_registered_with_an_inactive_weekly_schedule(served: Served) -> None:
    for name in ("default", "as-written", "fast", "demo"):
        deployment = served.deployment(f"amazon-ft/{name}")
        assert deployment["work_pool_name"] == "cpu"
        assert deployment["parameters"]["config"]["name"] == name
        assert [schedule["active"] for schedule in deployment["schedules"]] == [False]
        assert deployment["enforce_parameter_schema"]
        assert "Recipe" in deployment["parameter_openapi_schema"]["definitions"]
        assert deployment["version"] == read_version()["version"]
    assert served.deployment("amazon-ft-train/cuda")["work_pool_name"] == "cuda"
    assert served.get("work_pools/cuda")["concurrency_limit"] == 1
    assert served.post("automations/filter")[0]["enabled"]


def test_run_completes_and_trains_on_the_cuda_pool(served: Served, finished_run: str) -> None:
    run, child = served.run(finished_run), served.child(finished_run)
    assert (run["state_type"], child["state_type"]) == ("COMPLETED", "COMPLETED"), (run["state"], child["state"])
    assert (run["work_pool_name"], child["work_pool_name"]) == ("cpu", "cuda")
    assert child["deployment_id"] == served.deployment("amazon-ft-train/cuda")["id"]
    assert child["id"] in (served.home / "logs" / "cuda-0.log").read_text()
    assert served.tasks(child["id"]) == dict.fromkeys(("finetune", "baseline", "evaluate"), "Completed")
    tasks = served.tasks(finished_run)
    assert {name: tasks[name] for name in PREPARED} == dict.fromkeys(PREPARED, "Completed")


def test_names_and_tags_say_recipe_size_and_configuration(served: Served, finished_run: str) -> None:
    run, child = served.run(finished_run), served.child(finished_run)
    digest = run["name"].split()[-1]
    assert run["name"] == child["name"] == f"demo 40 rows {digest}"
    assert set(run["tags"]) == set(child["tags"]) == {"amazon-ft", "demo", "40 rows", digest}


def test_missing_worker_is_said_with_the_command_that_starts_one(served: Served, finished_run: str) -> None:
    command = f"export PREFECT_API_URL={served.url}/api AMAZON_FT_HOME={served.home}\namazon-ft worker cuda"
    assert command in until(lambda: served.logs(finished_run))
    assert "begun" in served.artifacts(finished_run)["demo-worker"]["data"]


def test_artifacts_of_both_runs_are_readable(served: Served, finished_run: str) -> None:
    shown = served.artifacts(finished_run)
    data = {key.removeprefix("demo-"): row["data"] for key, row in shown.items()}
    assert "set aside: malformed | 2 " in data["source"]
    assert "⟦" in data["rows"]
    assert "Describe the product." in data["rows"]
    assert "data:image/svg+xml;base64," in data["token-lengths"]
    assert "| nats per token |" in data["evaluation"]
    assert "| finetune | completed |" in data["stages"]
    assert data["verdict"].startswith("# Verdict: ")
    assert str(served.home / "models" / "demo" / "unsloth_model_optimized") in data["model"]
    assert str(served.home / "models" / "demo" / "report.html") in data["report"]
    assert "link" not in {row["type"] for row in shown.values()}, "no browser follows one to a file"
    assert "file://" not in json.dumps(data)
    training = served.artifacts(served.child(finished_run)["id"])
    assert training["demo-training-progress"]["type"] == "progress"
    assert training["demo-training-progress"]["data"] == 100
    assert "data:image/svg+xml;base64," in training["demo-training"]["data"]


def test_logs_of_the_stages_reach_the_server(served: Served, finished_run: str) -> None:
    child = served.child(finished_run)["id"]
    assert until(lambda: "step 4 of 4" in served.logs(child))


def test_the_log_of_a_workers_flow_run_has_no_bars(served: Served, finished_run: str) -> None:
    log = (served.home / "logs" / "cuda-0.log").read_text()
    assert "step 4 of 4" in log
    assert "%|" not in log
    assert "\r" not in log


@pytest.fixture(scope="module")
def heard(served: Served) -> Iterator[list[str]]:
    """What a webhook is told, whose block is custom-webhook/team."""
    bodies: list[str] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch, temporary_settings({PREFECT_API_URL: f"{served.url}/api"}):
            patch.setenv("PREFECT_API_URL", f"{served.url}/api")
            url = f"http://127.0.0.1:{server.server_port}"
            block = CustomWebhookNotificationBlock(name="team", url=url, json_data={"text": "{{subject}} | {{body}}"})
            block.save("team")
        yield bodies
        server.shutdown()


@contextmanager
def no_training(served: Served) -> Iterator[None]:
    """Trainings wait within the block."""
    worker = served.process_named("inner", "--name", "cuda-0")
    worker.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.send_signal(signal.SIGCONT)


def begun(served: Served, run: str) -> dict[str, Any] | None:
    """What became of a run that a worker asked the server to begin."""
    found = served.run(run)
    return None if found["state_name"] in ("Scheduled", "Late", "Pending") else found


@pytest.fixture(scope="module")
def contended(served: Served, finished_run: str, heard: list[str]) -> dict[str, dict[str, Any]]:
    """Runs of two deployments, and the trainings of the first of each, as they were when one training had begun.

    The limit of deployment chat was set as the UI does; `amazon-ft deploy`, while its first run goes on, limits fast, and puts it
    into queue `urgent`. From then on the webhook is told.
    """
    limit = {"concurrency_limit": 1, "concurrency_options": {"collision_strategy": "CANCEL_NEW"}}
    served.request("PATCH", f"deployments/{served.deployment('amazon-ft/chat')['id']}", limit)
    with no_training(served):
        first = served.start(*SHORT, "finetune.seed=3", deployment="chat")
        waiting = served.child(first)["id"]
        served.command("deploy", "--queue", "fast=urgent", "--concurrency-limit", "fast=1", "--notify", "custom-webhook/team")
        beyond = served.start(deployment="chat")
        urgent = served.start(*SHORT, "finetune.seed=4", deployment="fast")
        passing = served.child(urgent)["id"]
        behind = served.start(deployment="fast")
        found = {"beyond": until(lambda: begun(served, beyond)), "behind": until(lambda: begun(served, behind))}
        served.set_state(behind, "CANCELLED")
    found |= {"passing": until(lambda: begun(served, passing)), "waiting": served.run(waiting)}
    for run in (first, urgent):
        served.set_state(run, "CANCELLING")
    for run in (first, urgent, waiting, passing):
        served.ended(run)
    return found


@pytest.mark.slow("deployments registered anew, two deployed runs")
def test_a_run_beyond_the_limit_of_its_deployment_is_cancelled_with_a_reason(
    served: Served, contended: dict[str, dict[str, Any]]
) -> None:
    """Registering anew has forgotten neither the limit nor the run that went on."""
    state = contended["beyond"]["state"]
    assert (state["name"], state["message"]) == ("Cancelled", "Deployment concurrency limit reached.")


def test_a_run_beyond_the_limit_waits_unless_it_was_to_be_cancelled(contended: dict[str, dict[str, Any]]) -> None:
    assert contended["behind"]["state_name"] == "AwaitingConcurrencySlot"


def test_an_urgent_runs_training_passes_one_that_waits(contended: dict[str, dict[str, Any]]) -> None:
    waiting, passing = contended["waiting"], contended["passing"]
    assert (waiting["work_queue_name"], passing["work_queue_name"]) == ("default", "urgent")
    assert waiting["created"] < passing["created"]
    assert waiting["start_time"] is None


def test_the_same_code_registered_anew_is_the_same_version(
    served: Served, finished_run: str, contended: dict[str, dict[str, Any]]
) -> None:
    before, after = served.run(finished_run)["deployment_version"], contended["passing"]["deployment_version"]
    assert before == after == read_version()["version"]
    command = [sys.executable, "-m", "prefect", "deployment", "inspect", "amazon-ft/fast"]
    assert f"'version': '{after}'" in subprocess.run(command, env=served.env, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def again(served: Served, finished_run: str, settings: list[str]) -> str:
    """The same run a second time, once it has ended; its id."""
    run = served.start(*settings)
    served.ended(run)
    return run


@pytest.mark.slow("a deployed run")
def test_a_webhook_hears_that_a_model_was_promoted(contended: dict[str, dict[str, Any]], heard: list[str], again: str) -> None:
    assert until(lambda: any("amazon-ft demo: promoted" in body for body in heard)), heard


@pytest.mark.slow("a deployed run")
def test_second_run_is_all_cached_without_a_child(served: Served, again: str) -> None:
    assert served.run(again)["state_type"] == "COMPLETED"
    assert served.children(again) == []
    assert set(served.tasks(again).values()) == {"Cached"}


@pytest.mark.slow("a deployed run and its training")
def test_failure_of_the_training_reaches_the_parent_and_a_webhook_in_its_own_words(
    served: Served, contended: dict[str, dict[str, Any]], heard: list[str]
) -> None:
    run = served.start(*SHORT, "finetune.max_loss=0.001")
    assert served.ended(run)["state_type"] == "FAILED"
    child, message = served.child(run), served.run(run)["state"]["message"]
    assert "failed: finetune step 1: training diverged" in message
    assert message.endswith(child["state"]["message"])
    told = until(lambda: all("Finished in state" in served.logs(each) for each in (run, child["id"])))
    assert told
    assert "Traceback" not in served.logs(run) + served.logs(child["id"])
    listed = json.loads(served.command("runs", "--json"))
    assert [entry["state"] for entry in listed][:1] == ["failed"]
    log = served.command("logs")
    assert "finetune runs: " in log
    assert message in log
    assert until(lambda: any("Failed" in body and "training diverged" in body for body in heard)), heard


def test_a_notification_block_that_is_not_there_is_named(served: Served) -> None:
    done = served.try_command("deploy", "--notify", "slack-webhook/nobody")
    assert done.returncode == 2
    assert "deploy --notify: no such block on the server: got slack-webhook/nobody; expected" in " ".join(done.stderr.split())


def test_a_wrong_override_is_refused_where_the_run_is_submitted(served: Served) -> None:
    with pytest.raises(httpx.HTTPStatusError) as refused:
        served.start("finetune.learning_rat=1e-4")
    assert "finetune.learning_rat=1e-4" in refused.value.response.text


def page(url: str, profile: Path) -> str:
    """What a browser shows of an address, scripts included."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is on this machine")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    shown = [chromium, *options, "--window-size=1400,1300", "--virtual-time-budget=15000", "--dump-dom", url]
    return html.unescape(subprocess.run(shown, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow("Chromium")
def test_page_of_a_run_shows_its_name_its_training_and_what_stages_said(
    served: Served, finished_run: str, tmp_path: Path
) -> None:
    shown = page(f"{served.url}/runs/flow-run/{finished_run}", tmp_path)
    for text in (
        served.run(finished_run)["name"],
        "sample completed: 40 rows",
        "No worker of work pool cuda is online",
        "Artifacts",
    ):
        assert text in shown


@pytest.mark.slow("Chromium")
def test_pages_of_artifacts_show_text_and_plot(served: Served, finished_run: str, tmp_path: Path) -> None:
    artifacts = served.artifacts(finished_run)
    rows = page(f"{served.url}/artifacts/artifact/{artifacts['demo-rows']['id']}", tmp_path)
    assert "What the model is trained to say" in rows
    training = page(f"{served.url}/artifacts/artifact/{artifacts['demo-training']['id']}", tmp_path)
    assert 'src="data:image/svg+xml;base64,' in training


@pytest.mark.slow("Chromium")
def test_form_asks_for_every_section_and_for_overrides(served: Served, tmp_path: Path) -> None:
    demo = served.deployment("amazon-ft/demo")["id"]
    shown = page(f"{served.url}/deployments/deployment/{demo}/run", tmp_path)
    for text in ("Learning Rate", "Max Steps", "Drop Duplicates", "Optimizer steps; overrides epochs", "overrides"):
        assert text in shown
