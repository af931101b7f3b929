"""The document's code and this project's in turn, each cold and alone on the GPU: seconds a step, memory, the first step.

Also where any training of the session is measured: a process of its own (tests/bench/gpu_train.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.bench.gpu_session import Session

TIMED_STEPS = 30
WARMUP_STEPS = 5
TIMED_TEXTS, MORE_TEXTS = 5_000, 20_000
ROUND_STEPS, ROUND_TEXTS = 10, 500


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


def steps(session: Session, found: dict[str, Any]) -> None:
    """Both sides' steps in turn in one process, and the logits of the adapter that they left, in plain libraries."""
    texts, tokens = artifact_of(session, "as-written", "template"), artifact_of(session, "as-written", "tokenize")
    rows, count = first_of(session, texts, tokens, session.texts(ROUND_TEXTS)), session.steps(ROUND_STEPS)
    found["alternate"] = measured(session, "alternate", "alternate", rows, steps=count)
    found["plain_logits"] = measured(session, "alternate", "plain", rows, found["alternate"]["adapter"], steps=count)


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
    """What one training in a process of its own prints; `site` is a directory of packages to prefer.

    Raises:
        RuntimeError: with the end of its log, when it fails.
    """
    model, site = settings.pop("model", session.llama), settings.pop("site", None)
    work = session.work / "measured" / name
    work.mkdir(parents=True, exist_ok=True)
    request = {"model": str(model), "rows": str(rows), "steps": steps, "device": session.device, "work": str(work), **settings}
    request |= {"warmup_steps": min(WARMUP_STEPS, steps)}
    (work / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "tests.bench.gpu_train", kind, str(work / "request.json"), *arguments]
    environment, log = session.environment(name), work / f"{kind}.log"
    if site is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [environment.get("PYTHONPATH")])])
    with log.open("w") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
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
