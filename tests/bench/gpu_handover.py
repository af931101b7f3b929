"""Both recipes on a real Prefect server, from a root whose data stages were made on another machine, with a kill in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.gpu_prepare import data_settings

if TYPE_CHECKING:
    from tests.bench.gpu_session import Session

DEPLOYED_STEPS = 100
KILL_AT = 50
KILLED_SAVE_STEPS = 20
RECIPES = ("as-written", "default")
DATA_STAGES = ("ingest", "sample", "sharegpt", "template", "tokenize")


def both_deployed(session: Session, found: dict[str, Any]) -> None:
    """as-written, its training killed and run again, and default by `prefect deployment run`, from the carried root.

    default starts when as-written trains: where there are two GPUs both train at once, each on a worker of its own.
    """
    found["plan"] = {recipe: planned(session, recipe) for recipe in RECIPES}
    with served(session) as environment, ThreadPoolExecutor(1) as pool:
        log, settings = session.work / "killed.log", killed_settings(session)
        process = start(environment, "as-written", settings, log)
        work = training_begun(session, process, log)
        other = pool.submit(default, session, environment, found)
        found["killed"], before = killed(session, process, work)
        found["as-written"] = deployed(session, environment, "as-written", settings)
        found["before_and_after_the_kill"] = same_steps(before, found["as-written"].pop("records"))
        other.result()
        found["again"] = {recipe: served_again(session, environment, recipe) for recipe in RECIPES}


def default(session: Session, environment: dict[str, str], found: dict[str, Any]) -> None:
    """Recipe default, deployed, run to its end."""
    found["default"] = deployed(session, environment, "default", settings_of(session))
    found["default"].pop("records")


def killed_settings(session: Session) -> list[str]:
    """The overrides of the run whose training is killed: checkpoints often enough to go on from."""
    steps = 2 if session.rehearse else KILLED_SAVE_STEPS
    return [*settings_of(session), f"finetune.save_steps={steps}", f"finetune.logging_steps={min(10, steps)}"]


def settings_of(session: Session) -> list[str]:
    """The overrides of a deployment run."""
    rows = json.loads((session.home / "prepared.json").read_text())["rows"]
    steps = session.steps(DEPLOYED_STEPS)
    settings = [*data_settings(session.source, session.llama, rows), f"finetune.max_steps={steps}"]
    settings += [f"finetune.warmup_steps={min(100, steps)}", "evaluate.generations=8", "evaluate.max_new_tokens=32"]
    if session.rehearse:
        settings += ["device=cpu", "model.dtype=float32"]
        settings += ["finetune.logging_steps=2", "finetune.save_steps=2"]
    return settings


def planned(session: Session, recipe: str) -> dict[str, str]:
    """{stage: state} of `amazon-ft plan`, before anything runs here.

    Raises:
        AssertionError: when a data stage would run.
    """
    options = [word for setting in settings_of(session) for word in ("--set", setting)]
    command = [sys.executable, "-m", "flows.cli", "plan", recipe, "--json", *options]
    done = subprocess.run(command, env=session.environment("plan"), stdout=subprocess.PIPE, text=True, check=True)
    states = {step["name"]: step["state"] for step in json.loads(done.stdout)["stages"]}
    assert all(states[stage] == "cached" for stage in DATA_STAGES), states
    return states


@contextmanager
def served(session: Session) -> Iterator[dict[str, str]]:
    """A Prefect server with a cpu and a cuda worker, as `amazon-ft up` starts them; the environment to reach it."""
    port = 4263
    quiet = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_HOME": str(session.work / "prefect")}
    environment = session.environment("served") | quiet
    log = session.work / "up.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "flows.cli", "up", "--no-ui", "--port", str(port)]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        give_up = time.monotonic() + 300
        while "prefect deployment run" not in log.read_text():
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"amazon-ft up did not come up: {log.read_text()}\n{logs_of(session)}")
            time.sleep(0.5)
        yield environment | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    finally:
        process.terminate()
        process.wait(120)


def start(
    environment: dict[str, str], recipe: str, settings: Sequence[str], log: Path, *, until: str | None = None
) -> subprocess.Popen[bytes]:
    """`prefect deployment run amazon-ft/RECIPE`, to that stage, watched until its end."""
    parameters = ["--param", f"overrides={json.dumps(list(settings))}", "--param", f"until={json.dumps(until)}"]
    command = [sys.executable, "-m", "prefect", "deployment", "run", f"amazon-ft/{recipe}", *parameters, "--watch"]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def deployed(session: Session, environment: dict[str, str], recipe: str, settings: Sequence[str]) -> dict[str, Any]:
    """One deployment run to its end: the stages of parent and child, and what was trained.

    Raises:
        RuntimeError: when it fails.
        AssertionError: when a data stage ran.
    """
    begun, log = time.time(), session.work / f"{recipe}.log"
    code = start(environment, recipe, settings, log).wait()
    if code:
        raise RuntimeError(f"{recipe}: exit code {code}\n{log.read_text()[-3000:]}\n{logs_of(session)}")
    parent, child = sorted(runs_since(session, begun, recipe), key=lambda record: "ingest" not in names_of(record))
    states = {entry["name"]: entry["state"] for entry in parent["stages"]}
    assert all(states[stage] == "cached" for stage in DATA_STAGES), states
    trained = {entry["name"]: entry for entry in child["stages"]}
    saved = next(entry for entry in parent["stages"] if entry["name"] == "save")
    return {
        "seconds": round(time.time() - begun, 1),
        "parent": states,
        "child": {name: [entry["state"], entry["seconds"], entry["reason"]] for name, entry in trained.items()},
        "saved": sorted(file.name for file in (session.home / saved["path"]).iterdir()),
        **training_of(session, trained["finetune"]["key"]),
        "metrics": metrics_of(session, trained["evaluate"]),
    }


def training_begun(session: Session, process: subprocess.Popen[bytes], log: Path) -> Path:
    """The work directory of the only training so far, as soon as there is one."""
    while not (found := list((session.home / "work").glob("*.lock"))):
        if process.poll() is not None:
            raise RuntimeError(f"ended before it trained: {log.read_text()[-3000:]}\n{logs_of(session)}")
        time.sleep(0.05)
    return found[0].with_suffix("")


def killed(session: Session, process: subprocess.Popen[bytes], work: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Kill a training by SIGKILL at a step: how its run ended, and the steps that it had made."""
    at, log = KILL_AT if not session.rehearse else 4, work / "train_log.jsonl"
    while len(before := steps_of(log)) < at:
        if process.poll() is not None:
            raise RuntimeError(f"ended before step {at}: {(session.work / 'killed.log').read_text()[-3000:]}\n{logs_of(session)}")
        time.sleep(0.05)
    holder, gpus = work.with_suffix(".lock").read_text(), gpus_in_use()
    os.kill(int(holder.split()[1]), 9)
    began = time.monotonic()
    code = process.wait()
    told = {"at_step": before[-1]["step"], "exit_code": code, "seconds_until_told": round(time.monotonic() - began, 1)}
    return told | {"gpus_in_use": gpus}, before


def gpus_in_use() -> int:
    """GPUs of the host that some process computes on; 0 without a driver."""
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid", "--format=csv,noheader"]
    try:
        return len(set(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()))
    except (OSError, subprocess.CalledProcessError):
        return 0


def same_steps(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The steps that a killed training made, and the run that went on made or kept: losses, gradient norms, distances."""
    pairs = list(zip(before, after, strict=False))
    told: dict[str, Any] = {}
    for name in ("loss", "grad_norm"):
        told[name] = [[round(record[name], 5) for record in pair] for pair in pairs]
        told[f"largest_{name}_distance"] = max(abs(one[name] - other[name]) for one, other in pairs)
    return told


def served_again(session: Session, environment: dict[str, str], recipe: str) -> dict[str, str]:
    """The same run once more: {stage: state}, of the parent; there is no child.

    Raises:
        RuntimeError: when it fails.
    """
    begun, log = time.time(), session.work / f"{recipe}-again.log"
    settings = killed_settings(session) if recipe == "as-written" else settings_of(session)
    if start(environment, recipe, settings, log).wait():
        raise RuntimeError(f"{recipe} again: {log.read_text()[-3000:]}\n{logs_of(session)}")
    (parent,) = runs_since(session, begun, recipe)
    return {entry["name"]: entry["state"] for entry in parent["stages"]}


def steps_of(log: Path) -> list[dict[str, Any]]:
    """The steps of a training's log that are written to their end."""
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def training_of(session: Session, key: str) -> dict[str, Any]:
    """Losses, and memory as estimated and as measured, of the training with that key."""
    adapter = json.loads(json.loads((session.home / "records" / key).read_bytes())["result"])
    log = session.home / "artifacts" / adapter["log"]["kind"] / adapter["log"]["digest"][:32]
    records, resolved = steps_of(log / "train_log.jsonl"), json.loads((log / "resolved.json").read_text())
    return {
        "steps": len(records),
        "losses": [round(record["loss"], 4) for record in records],
        "records": records,
        **{name: resolved[name] for name in ("estimated_gib", "peak_gib", "dtype")},
    }


def metrics_of(session: Session, entry: dict[str, Any]) -> dict[str, Any]:
    metrics = json.loads((session.home / entry["path"] / "metrics.json").read_text())
    return {name: metrics[name] for name in ("rows", "tokens", "base", "tuned")}


def runs_since(session: Session, begun: float, recipe: str) -> list[dict[str, Any]]:
    """The records of a recipe's flow runs: the parent's, and the child's if there was one."""
    records = [json.loads(file.read_text()) for file in (session.home / "runs").glob("*.json")]
    return [record for record in records if record["started"] >= begun and record["recipe"] == recipe]


def names_of(record: dict[str, Any]) -> list[str]:
    """The stages of a run."""
    return [entry["name"] for entry in record["stages"]]


def logs_of(session: Session) -> str:
    return "\n".join(f"{file.name}:\n{file.read_text()[-1500:]}" for file in sorted((session.home / "logs").glob("*.log")))
