"""The document's job on one GPU, measured: all of it in one go, or phase by phase, without network; results as JSON.

usage: python -m tests.bench.gpu_session CARRIED WORK RESULTS [--phases setup,timing,handover,small,tests] [--rehearse]

CARRIED is what tests/bench/gpu_prepare.py made on a CPU machine. WORK is scratch that later phases find again. RESULTS is
written after each phase, so that a killed session keeps what it has measured.

    setup      unpack the root, grow the product file, make the models                              GPU: minutes
    timing     the document's code and ours on the same texts: seconds a step, memory, seconds to the first step, logits
    handover   a Prefect server with a cpu and a cuda worker; as-written (killed at a step, run again) and default
    small      SmolLM2-135M: losses against three runs of the document's code; both recipes judged on the same answers
    tests      pytest -m gpu

--rehearse does all of it on a CPU with a tiny model: it shows that the script runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.bench.gpu_prepare import ARMS, SMALL_STEPS, data_settings, grow

SEEDS = (3407, 1, 2)
DOCUMENT_RUNS = 3
PARITY_STEPS = 30
TIMED_STEPS = 30
WARMUP_STEPS = 5
TIMED_TEXTS, MORE_TEXTS = 5_000, 20_000
DEPLOYED_STEPS = 100
KILL_AT = 50
KILLED_SAVE_STEPS = 20
DATA_STAGES = ("ingest", "sample", "sharegpt", "template", "tokenize")
LLAMA3_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
    "pad_token_id": 128_255,
    "tie_word_embeddings": False,
}
TINY = {
    "vocab_size": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Session:
    """Where things lie, and how large everything is."""

    carried: Path
    work: Path
    rehearse: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def home(self) -> Path:
        return self.work / "home"

    @property
    def llama(self) -> Path:
        return self.work / "llama-3-8b"

    @property
    def source(self) -> Path:
        return self.work / "trn.json"

    def steps(self, wanted: int) -> int:
        return min(wanted, 6) if self.rehearse else wanted

    def texts(self, wanted: int) -> int:
        return wanted // 50 if self.rehearse else wanted

    def environment(self, scratch: str) -> dict[str, str]:
        """For a process that starts cold: compiled code in a directory of its own."""
        caches = {name: str(self.work / "caches" / scratch / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        return os.environ | caches | {"AMAZON_FT_HOME": str(self.home), "HF_HUB_OFFLINE": "1"}


# setup


def setup(session: Session, found: dict[str, Any]) -> None:
    """The carried root, the product file that it was made from, and a Llama-3-8B with random weights in NF4."""
    started = time.monotonic()
    shutil.rmtree(session.work, ignore_errors=True)
    session.home.mkdir(parents=True)
    with tarfile.open(session.carried / "root.tar.xz") as root:
        root.extractall(session.home, filter="data")
    prepared = json.loads((session.home / "prepared.json").read_text())
    grow(session.carried / "products.jsonl", session.source, prepared["rows"])
    unpacked = time.monotonic()
    make_llama(session)
    found |= {"seconds_unpack": round(unpacked - started, 1), "seconds_model": round(time.monotonic() - unpacked, 1)}


def make_llama(session: Session) -> None:
    """The base model as unsloth/llama-3-8b-bnb-4bit has it, stored in NF4; the weights are random, the tokenizer is not."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tasks.backends.loading import load_base

    shape = LLAMA3_8B | (TINY if session.rehearse else {})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(session.device):
        model = LlamaForCausalLM(LlamaConfig(**shape, dtype="bfloat16"))
    torch.set_default_dtype(torch.float32)
    wide = session.llama if session.rehearse else session.work / "llama-16bit"
    model.save_pretrained(wide, max_shard_size="5GB")
    del model
    if not session.rehearse:
        load_base(wide, "bfloat16", load_in_4bit=True, device="cuda").save_pretrained(session.llama, max_shard_size="5GB")
        shutil.rmtree(wide)
        torch.cuda.empty_cache()
    shutil.copytree(session.carried / "tok", session.llama, dirs_exist_ok=True)


# timing


def timing(session: Session, found: dict[str, Any]) -> None:
    """The document's code and ours in turn, each cold, each alone on the machine."""
    texts, tokens = artifact_of(session, "as-written", "template"), artifact_of(session, "as-written", "tokenize")
    few, many = (first_of(session, texts, tokens, session.texts(rows)) for rows in (TIMED_TEXTS, MORE_TEXTS))
    everything = first_of(session, None, tokens, None)
    steps = session.steps(TIMED_STEPS)
    for name, kind, rows, count in (
        ("document", "document", few, steps),
        ("ours", "ours", few, steps),
        ("document_more_texts", "document", many, 1),
        ("ours_all_rows", "ours", everything, 1),
    ):
        found[name] = measured(session, name, kind, rows, steps=count)
    found["compared"] = compare_timing(session, found)
    found["plain_logits"] = measured(session, "ours", "plain", few, found["ours"]["adapter"], steps=steps)


def compare_timing(session: Session, results: dict[str, Any]) -> dict[str, Any]:
    """Ratios of ours to the document's; its seconds to the first step extrapolated to all texts."""
    theirs, mine = results["document"], results["ours"]
    few, many, all_rows = (
        session.texts(TIMED_TEXTS),
        session.texts(MORE_TEXTS),
        json.loads((session.home / "prepared.json").read_text())["rows"],
    )
    at_few, at_many = theirs["seconds_to_first_step"], results["document_more_texts"]["seconds_to_first_step"]
    extrapolated = at_few + (at_many - at_few) / (many - few) * (all_rows - few)
    ours_first = results["ours_all_rows"]["seconds_to_first_step"]
    memory = [side["peak_allocated_gib"] for side in (mine, theirs)]
    return {
        "same_tokens_each_step": theirs["tokens_of_steps"] == mine["tokens_of_steps"],
        "step_time_ratio": round(mine["seconds_per_step"] / theirs["seconds_per_step"], 4),
        "peak_memory_ratio": round(memory[0] / memory[1], 4) if all(memory) else None,
        "document_seconds_to_first_step": {few: at_few, many: at_many, all_rows: round(extrapolated, 1)},
        "ours_seconds_to_first_step": {all_rows: ours_first},
        "first_step_ratio": round(ours_first / extrapolated, 4),
    }


def measured(session: Session, name: str, kind: str, rows: Path, *arguments: str, steps: int, **settings: Any) -> dict[str, Any]:
    """What one training in a process of its own prints.

    Raises:
        RuntimeError: with the end of its log, when it fails.
    """
    model = settings.pop("model", session.llama)
    work = session.work / "measured" / name
    work.mkdir(parents=True, exist_ok=True)
    request = {"model": str(model), "rows": str(rows), "steps": steps, "device": session.device, "work": str(work), **settings}
    request |= {"warmup_steps": min(WARMUP_STEPS, steps)}
    (work / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "tests.bench.gpu_train", kind, str(work / "request.json"), *arguments]
    log = work / f"{kind}.log"
    with log.open("w") as output:
        done = subprocess.run(command, env=session.environment(name), stdout=output, stderr=subprocess.STDOUT, check=False)
    lines = [line for line in log.read_text().splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{name}: exit code {done.returncode}\n{log.read_text()[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def artifact_of(session: Session, recipe: str, stage: str) -> Path:
    """The directory of what a data stage made on the CPU machine."""
    told = json.loads((session.home / "prepared.json").read_text())["told"][recipe]
    entry = next(entry for entry in told["stages"] if entry["name"] == stage)
    return session.home / entry["path"]


def first_of(session: Session, texts: Path | None, tokens: Path, rows: int | None) -> Path:
    """A directory with tokens.arrow, and texts.json if wanted, of the first rows; all without a number."""
    import pyarrow as pa

    target = session.work / "rows" / f"{rows or 'all'}"
    target.mkdir(parents=True, exist_ok=True)
    if rows is None:
        (target / "tokens.arrow").unlink(missing_ok=True)
        (target / "tokens.arrow").symlink_to(tokens / "tokens.arrow")
    else:
        with pa.memory_map(str(tokens / "tokens.arrow")) as source:
            table = pa.ipc.open_stream(source).read_all().slice(0, rows)
            with pa.OSFile(str(target / "tokens.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    if texts is not None:
        with pa.memory_map(str(texts / "texts.arrow")) as source:
            found = pa.ipc.open_stream(source).read_all().slice(0, rows)["text"].to_pylist()
        (target / "texts.json").write_text(json.dumps(found, ensure_ascii=False))
    return target


# handover


def handover(session: Session, found: dict[str, Any]) -> None:
    """Both recipes by `prefect deployment run`; their data stages come from the carried root, and nothing of them runs."""
    found["plan"] = {recipe: planned(session, recipe) for recipe in ARMS}
    with served(session) as environment:
        killed = KILLED_SAVE_STEPS if not session.rehearse else 2
        save = [f"finetune.save_steps={killed}", f"finetune.logging_steps={min(10, killed)}"]
        found["as-written"] = killed_and_run_again(session, environment, [*settings_of(session, "as-written"), *save])
        found["default"] = deployed(session, environment, "default", settings_of(session, "default"))


def settings_of(session: Session, recipe: str) -> list[str]:
    """The overrides of a deployment run."""
    rows = json.loads((session.home / "prepared.json").read_text())["rows"]
    steps = session.steps(DEPLOYED_STEPS)
    settings = [*data_settings(session.source, session.llama, rows), f"finetune.max_steps={steps}"]
    settings.append(f"finetune.warmup_steps={min(100, steps)}")
    if session.rehearse:
        settings += ["device=cpu", "model.dtype=float32", "evaluate.generations=2", "evaluate.max_new_tokens=4"]
        settings += ["finetune.logging_steps=2", "finetune.save_steps=2"]
    return settings


def planned(session: Session, recipe: str) -> dict[str, str]:
    """{stage: state} of `amazon-ft plan`, before anything runs here.

    Raises:
        AssertionError: when a data stage would run.
    """
    options = [word for setting in settings_of(session, recipe) for word in ("--set", setting)]
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
    paths = [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = session.environment("served") | quiet | {"PYTHONPATH": os.pathsep.join(paths)}
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


def start(environment: dict[str, str], recipe: str, settings: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """`prefect deployment run amazon-ft/RECIPE`, watched until its end."""
    parameters = ["--param", f"overrides={json.dumps(list(settings))}"]
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
    parent, child = runs_since(session, begun)
    states = {entry["name"]: entry["state"] for entry in parent["stages"]}
    assert all(states[stage] == "cached" for stage in DATA_STAGES), states
    trained = {entry["name"]: entry for entry in child["stages"]}
    saved = next(entry for entry in parent["stages"] if entry["name"] == "save")
    return {
        "seconds": round(time.time() - begun, 1),
        "parent": states,
        "child": {name: [entry["state"], entry["seconds"], entry["reason"]] for name, entry in trained.items()},
        "saved": sorted(file.name for file in (session.home / saved["path"]).iterdir()),
        **training_of(session),
        "metrics": metrics_of(session, trained["evaluate"]),
    }


def killed_and_run_again(session: Session, environment: dict[str, str], settings: Sequence[str]) -> dict[str, Any]:
    """as-written, its training killed by SIGKILL at a step, and run again: it goes on from its last checkpoint."""
    log, at = session.work / "killed.log", KILL_AT if not session.rehearse else 4
    process = start(environment, "as-written", settings, log)
    while len(before := steps_of(session)) < at:
        if process.poll() is not None:
            raise RuntimeError(f"ended before step {at}: {log.read_text()[-3000:]}\n{logs_of(session)}")
        time.sleep(0.05)
    holder = next((session.home / "work").glob("*/.lock")).read_text()
    os.kill(int(holder.split()[1]), 9)
    began = time.monotonic()
    code = process.wait()
    told = {"killed_at_step": before[-1]["step"], "exit_code": code, "seconds_until_told": round(time.monotonic() - began, 1)}
    result = deployed(session, environment, "as-written", settings)
    repeated = [abs(one["loss"] - other["loss"]) for one, other in zip(before, steps_of(session), strict=False)]
    return result | told | {"loss_differences_of_the_steps_before_the_kill": repeated}


def steps_of(session: Session) -> list[dict[str, Any]]:
    """The log of the newest training's work directory, whole lines."""
    logs = sorted((session.home / "work").glob("*/train_log.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = logs[-1].read_text().splitlines(keepends=True) if logs else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def training_of(session: Session) -> dict[str, Any]:
    """Losses, and memory as estimated and as measured."""
    records = steps_of(session)
    logs = sorted((session.home / "artifacts" / "training-log").glob("*/resolved.json"), key=lambda path: path.stat().st_mtime)
    resolved = json.loads(logs[-1].read_text())
    return {
        "steps": len(records),
        "losses": [round(record["loss"], 4) for record in records],
        "estimated_gib": resolved["estimated_gib"],
        "peak_gib": resolved["peak_gib"],
        "dtype": resolved["dtype"],
    }


def metrics_of(session: Session, entry: dict[str, Any]) -> dict[str, Any]:
    metrics = json.loads((session.home / entry["path"] / "metrics.json").read_text())
    return {name: metrics[name] for name in ("rows", "tokens", "base", "tuned")}


def runs_since(session: Session, begun: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The records of the parent flow's run and of the child's."""
    records = [json.loads(file.read_text()) for file in (session.home / "runs").glob("*.json")]
    recent = [record for record in records if record["started"] >= begun]
    parents = [record for record in recent if any(entry["name"] == "ingest" for entry in record["stages"])]
    children = [record for record in recent if record not in parents]
    assert (len(parents), len(children)) == (1, 1), [record["id"] for record in recent]
    return parents[0], children[0]


def logs_of(session: Session) -> str:
    return "\n".join(f"{file.name}:\n{file.read_text()[-1500:]}" for file in sorted((session.home / "logs").glob("*.log")))


# small: SmolLM2-135M with its real weights


def small(session: Session, found: dict[str, Any]) -> None:
    """All small trainings at once: only their losses are compared, never their times."""
    from tests.bench.gpu_small import judge, make_model, train_arm

    model = make_model(session)
    arms = json.loads((session.home / "small.json").read_text())
    rows = first_of(
        session,
        *(
            session.home / "artifacts" / arms["as-written"][kind]["kind"] / arms["as-written"][kind]["digest"][:32]
            for kind in ("texts", "tokens")
        ),
        10**6,
    )
    steps = session.steps(PARITY_STEPS)

    def run(name: str, kind: str) -> dict[str, Any]:
        return measured(session, name, kind, rows, steps=steps, model=model, logging_steps=1)

    with ThreadPoolExecutor(1 if session.rehearse else 5) as pool:
        parity = [pool.submit(run, f"small-document-{number}", "document") for number in range(DOCUMENT_RUNS)]
        parity.append(pool.submit(run, "small-ours", "ours"))
        arm_steps = {arm: session.steps(SMALL_STEPS) for arm in ARMS}
        seeds = SEEDS[: 1 if session.rehearse else None]
        trained = {
            (arm, seed): pool.submit(train_arm, session, model, arm, arms[arm], seed, arm_steps[arm])
            for arm in ARMS
            for seed in seeds
        }
        *document, ours = (future.result() for future in parity)
        found["parity"] = compare_losses(document, ours)
        adapters = {where: future.result() for where, future in trained.items()}
    found["judged"] = judge(session, model, arms, adapters)


def compare_losses(document: Sequence[dict[str, Any]], ours: dict[str, Any]) -> dict[str, Any]:
    """How far three runs of the document's code are from each other, step by step, and ours from the nearest of them."""
    told: dict[str, Any] = {"same_tokens_each_step": document[0]["tokens_of_steps"] == ours["tokens_of_steps"]}
    for name in ("loss", "grad_norm"):
        runs, mine = [run[name] for run in document], ours[name]
        columns = list(zip(*runs, strict=True))
        told[name] = {
            "document": runs,
            "ours": mine,
            "largest_spread_of_document": max(max(values) - min(values) for values in columns),
            "largest_distance_of_ours": max(
                min(abs(value - own) for value in values) for values, own in zip(columns, mine, strict=True)
            ),
        }
    return told


# tests, and the whole


def gpu_tests(session: Session, found: dict[str, Any]) -> None:
    """`pytest -m gpu`, of the files that have such tests: others import what a GPU machine may lack."""
    files = sorted(str(file) for file in Path("tests").glob("test_*.py") if "pytest.mark.gpu" in file.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-W", "default", *files]
    environment = session.environment("tests") | {"AMAZON_FT_REQUIRE_UNSLOTH": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    found |= {"exit_code": done.returncode, "told": done.stdout.splitlines()[-40:]}
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}\n{done.stdout[-6000:]}")


PHASES: dict[str, Callable[[Session, dict[str, Any]], None]] = {
    "setup": setup,
    "timing": timing,
    "handover": handover,
    "small": small,
    "tests": gpu_tests,
}


def machine(session: Session) -> dict[str, Any]:
    """Where and with what this was measured."""
    import torch

    found: dict[str, str] = {}
    for name in (
        "torch",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "unsloth",
        "unsloth_zoo",
        "triton",
        "xformers",
        "prefect",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if not session.rehearse else "none: a rehearsal, its numbers mean nothing"
    return {
        "gpu": gpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": found,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("carried", "work", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    session = Session(options.carried.resolve(), options.work.resolve(), options.rehearse)
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    failed = False
    for phase in options.phases.split(","):
        began, found = time.monotonic(), dict[str, Any]()
        try:
            PHASES[phase](session, found)
        except Exception as error:
            found["failed"], failed = f"{type(error).__name__}: {error}", True
        found["seconds_of_phase"] = round(time.monotonic() - began, 1)
        results |= {"machine": machine(session), phase: found}
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(results, indent=1, ensure_ascii=False))
        print(phase, found.get("failed", "done")[-4000:], found["seconds_of_phase"], "s", flush=True)
    print(json.dumps({name: short(value) for name, value in results.items()}, indent=1)[-8000:])
    sys.exit(failed)


def short(found: Any) -> Any:
    """The same without long lists."""
    if isinstance(found, dict):
        return {name: short(value) for name, value in found.items()}
    if isinstance(found, list) and len(found) > 8:
        return f"{len(found)} values"
    return found[:80] if isinstance(found, str) else found


if __name__ == "__main__":
    main()
