"""A rerun executes what failed or changed, and nothing else. Each test really changes the thing."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.caching import store
from tasks.caching.manifest import MANIFEST
from tasks.refs import Artifact
from tests.e2e.tiny_runs import Tiny

ALL = ["ingest", "sample", "sharegpt", "template", "tokenize", "finetune", "baseline", "evaluate", "save"]


def not_cached(steps: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, step in steps.items() if step["state"] != "cached"]


def below(first: str) -> list[str]:
    """A stage and all that follows from it; the base model is asked without the adapter."""
    return [name for name in ALL[ALL.index(first) :] if (first, name) != ("finetune", "baseline")]


def artifacts(home: Path) -> list[Path]:
    return sorted((home / "artifacts").glob("*/*"))


def digests(home: Path) -> dict[str, bytes]:
    return {str(file.relative_to(home)): file.read_bytes() for file in (home / "artifacts").rglob("*") if file.is_file()}


def test_first_run_makes_every_stage_and_the_model(finished: Tiny) -> None:
    assert list(finished.plan()) == ALL
    model = finished.home / "models" / "tiny" / "unsloth_model_optimized"
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= {
        f.name for f in model.iterdir()
    }


def test_second_run_is_all_cached_judged_again_and_reported(tiny: Tiny) -> None:
    told = json.loads(tiny.run().stdout.splitlines()[-1])
    assert not_cached({stage["name"]: stage for stage in told["stages"]}) == []
    newest = max((tiny.home / "runs").glob("*.json"), key=lambda path: json.loads(path.read_text())["started"])
    assert told["verdict"] == json.loads(newest.read_text())["verdict"]
    assert told["verdict"]["against"] == ["base"]
    assert told["verdict"]["promoted"] == (tiny.home / "models" / "tiny" / "promoted").is_symlink()
    assert told["report"] == str(tiny.home / "models" / "tiny" / "report.html")
    assert "Length of the training rows" in Path(told["report"]).read_text()


def test_with_nothing_to_make_no_server_is_started_and_the_run_is_recorded(tiny: Tiny, tmp_path: Path) -> None:
    before = set((tiny.home / "runs").glob("*.json"))
    told = tiny.run(PREFECT_API_URL="", PREFECT_HOME=str(tmp_path / "prefect"))
    assert {stage["state"] for stage in json.loads(told.stdout.splitlines()[-1])["stages"]} == {"cached"}
    (new,) = set((tiny.home / "runs").glob("*.json")) - before
    record = json.loads(new.read_text())
    assert record["finished"]
    assert [stage["name"] for stage in record["stages"]] == ALL
    assert record["verdict"]["promoted"] == (tiny.home / "models" / "tiny" / "promoted").is_symlink()
    assert "save cached" in told.stderr
    assert not (tiny.home / "prefect-server.log").exists()
    assert not (tmp_path / "prefect").exists()


@pytest.mark.parametrize(
    ("setting", "first"),
    [
        ("ingest.decode_entities=false", "ingest"),
        ("sample.seed=43", "sample"),
        ("sharegpt.conversation_extension=3", "sharegpt"),
        ('template.questions=["Que produto é este?"]', "template"),
        ("tokenize.loss_on=everything", "tokenize"),
        ("finetune.learning_rate=2e-3", "finetune"),
        ("finetune.lora.r=8", "finetune"),
        ("finetune.eval_steps=2", "finetune"),
        ("evaluate.max_new_tokens=9", "baseline"),
        ("save.name=mine", "save"),
    ],
)
def test_changed_setting_reruns_its_stage_and_what_follows(finished: Tiny, setting: str, first: str) -> None:
    steps = finished.plan("--set", setting)
    assert not_cached(steps) == below(first)
    key = setting.split("=")[0].partition(".")[2]
    assert f"config.{key}" in steps[first]["reason"]
    assert {steps[name]["reason"] for name in below(first)[1:]} <= {f"unknown until {first}"}


def test_changed_learning_rate_really_trains_again(tiny: Tiny) -> None:
    assert not_cached(tiny.ran("--set", "finetune.learning_rate=2e-3")) == ["finetune", "evaluate", "save"]


@pytest.mark.parametrize(
    "setting", ["ingest.block_bytes=65536", "finetune.keep_checkpoints=1", "cache.verify=size", "promote.margin=9"]
)
def test_setting_that_changes_no_result_reruns_nothing(finished: Tiny, setting: str) -> None:
    assert not_cached(finished.plan("--set", setting)) == []


def test_second_recipe_with_equal_settings_saves_a_model_of_its_own(tiny: Tiny) -> None:
    other = Tiny(tiny.checkout, tiny.recipe.with_name("other.yaml"), tiny.source, tiny.model, tiny.home)
    shutil.copyfile(tiny.recipe, other.recipe)
    steps = other.plan()
    assert not_cached(steps) == ["save"]
    assert steps["save"]["reason"] == "first run"
    assert not_cached(other.ran()) == ["save"]
    assert not_cached(other.plan()) == not_cached(tiny.plan()) == []
    for name in ("tiny", "other"):
        model = tiny.home / "models" / name / "unsloth_model_optimized"
        assert f"trained by recipe `{name}`" in (model / "README.md").read_text()
        assert f"name: {name}\n" in (model / "recipe.yaml").read_text()


def test_touched_source_reruns_nothing(tiny: Tiny) -> None:
    os.utime(tiny.source)
    assert not_cached(tiny.plan()) == []


def test_source_moved_elsewhere_reruns_nothing(tiny: Tiny, tmp_path: Path) -> None:
    tiny.source.rename(tmp_path / "other.json")
    assert not_cached(tiny.plan("--set", f"ingest.sources=[{tmp_path / 'other.json'}]")) == []


def test_appended_malformed_line_reruns_ingest_alone(tiny: Tiny) -> None:
    with tiny.source.open("a") as file:
        file.write('{"uid": "X", "title": \n')
    before = tiny.plan()
    assert not_cached(before) == ALL
    assert before["ingest"]["reason"] == "source trn.json changed (23 bytes more)"
    assert not_cached(tiny.ran()) == ["ingest"]


@pytest.mark.parametrize(
    ("file", "before", "after", "first"),
    [
        ("tasks/text/chat_template.py", None, "\nADDED = 1\n", "template"),
        ("tasks/sample.py", None, "\nADDED = 1\n", "sample"),
        ("tasks/training/hf.py", None, "\nADDED = 1\n", "finetune"),
        ("tasks/evaluation/metrics.py", None, "\nADDED = 1\n", "evaluate"),
        ("tasks/save.py", None, "\nADDED = 1\n", "save"),
    ],
)
def test_edited_code_reruns_its_stage(tiny: Tiny, file: str, before: str | None, after: str, first: str) -> None:
    tiny.checkout.append(file, after)
    steps = tiny.plan()
    assert not_cached(steps) == below(first)
    assert steps[first]["reason"] == f"code changed: {file}"


def test_comments_docstrings_and_unused_code_rerun_nothing(tiny: Tiny) -> None:
    tiny.checkout.append("tasks/template.py", "\n# a comment\n")
    tiny.checkout.edit("tasks/sample.py", '"""', '"""Edited. ')
    tiny.checkout.append("tasks/training/unsloth.py", "\nADDED = 1\n")
    tiny.checkout.append("flows/cli/tables.py", "\nADDED = 1\n")
    tiny.checkout.edit("tasks/config.py", "max_new_tokens: int = Field(default=128", "max_new_tokens: int = Field(default=127")
    tiny.checkout.edit("tasks/config.py", "tokens: int = Field(default=8192", "tokens: int = Field(default=4096")
    assert not_cached(tiny.plan()) == []


REWORDED = [
    ("tasks/text/chat_template.py", "unknown placeholder: got", "a placeholder that is none: got"),
    ("tasks/text/chat_template.py", '(f"template.chat_template: {what}.")', '(f"chat template: {what}!")'),
    ("tasks/template.py", "template: %s texts, %s to evaluate on", "%s texts are rendered, %s to evaluate on"),
    ("tasks/training/hardware.py", "Unsloth is not installed: got unsloth", "there is no Unsloth here: got unsloth"),
    ("tasks/training/trainer.py", "%s: a checkpoint is written", "Told to end by %s: a checkpoint is written"),
    ("tasks/training/backend.py", '"""Holds the checkpoints', '"""Where one finds the checkpoints'),
    ("tasks/training/loading.py", '"""The causal language model', '"""Load the causal language model'),
    ("tasks/training/inference/scoring.py", "    texts: list[str] = []", "    texts: list[Any] = []"),
    ("tasks/sample.py", "counts: dict[str, float] = ", "counts = "),
]
"""Messages, log lines, docstrings of an attribute and of a function, annotations of locals."""


def test_reworded_messages_log_lines_docstrings_and_annotations_of_locals_rerun_nothing(tiny: Tiny) -> None:
    for file, before, after in REWORDED:
        tiny.checkout.edit(file, before, after)
    assert not_cached(tiny.plan()) == []


@pytest.mark.parametrize("file", ["tasks/training/checkpoints.py", "tasks/training/memory.py"])
def test_edited_checkpoints_and_estimates_of_memory_leave_the_baseline_cached(tiny: Tiny, file: str) -> None:
    tiny.checkout.append(file, "\nADDED = 1\n")
    steps = tiny.plan()
    assert not_cached(steps) == ["finetune", "evaluate", "save"]
    assert steps["evaluate"]["reason"] == "unknown until finetune"


@pytest.mark.parametrize(
    ("code", "got"),
    [
        ("from importlib import import_module", "importlib"),
        ("OTHER = __import__('tasks.pack')", "__import__"),
        ("import sys; OTHER = sys.modules['tasks.pack']", "sys.modules"),
        ("exec('OTHER = 1')", "exec"),
        ("WORDS = open(__file__ + '.txt')", "__file__"),
        ("from importlib.resources import files", "importlib.resources"),
        ("from jinja2 import PackageLoader", "jinja2.PackageLoader"),
        ("WORDS = __doc__", "__doc__"),
        ("import helpers", "helpers"),
    ],
)
def test_ways_around_the_key_are_refused_by_file_and_line(tiny: Tiny, code: str, got: str) -> None:
    (tiny.checkout.path / "helpers.py").write_text("")
    line = 1 + (tiny.checkout.path / "tasks" / "sample.py").read_text().count("\n")
    tiny.checkout.append("tasks/sample.py", f"def later():\n    {code}\n")
    result = tiny.checkout.amazon_ft("plan", str(tiny.recipe), check=False, AMAZON_FT_HOME=str(tiny.home))
    assert result.returncode == 1
    said = " ".join(result.stderr.split())
    assert said.startswith(f"tasks/sample.py line {line + 1}: a stage's code ")
    assert f": got {got}; expected " in said
    assert "Traceback" not in said


def test_edited_prep_stage_with_equal_bytes_leaves_the_training_cached(tiny: Tiny) -> None:
    tiny.checkout.append("tasks/template.py", "\nADDED = 1\n")
    assert not_cached(tiny.ran()) == ["template"]


def test_edited_tokenizer_under_the_same_path_reruns_tokenize(tiny: Tiny) -> None:
    path = tiny.model / "tokenizer.json"
    stat = path.stat()
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true').replace("\n", "\n "))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    steps = tiny.plan()
    assert steps["template"]["state"] == "cached"
    assert steps["tokenize"]["reason"] == "tokenizer changed"
    assert not_cached(steps) == ["tokenize", "finetune", "baseline", "evaluate", "save"]


def test_edited_weights_rerun_the_training(tiny: Tiny) -> None:
    path = tiny.model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not_cached(tiny.plan()) == ["finetune", "baseline", "evaluate", "save"]


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip"])
def test_damage_to_any_output_reruns_its_stage(tiny: Tiny, damage: str) -> None:
    for stage, step in finished_outputs(tiny).items():
        kept = step.read_bytes()
        harm(step, damage)
        found = tiny.plan()
        assert found[stage]["state"] == "run", stage
        assert found[stage]["reason"].startswith("output missing:" if damage == "delete" else "output corrupt:")
        step.write_bytes(kept)


def finished_outputs(tiny: Tiny) -> dict[str, Path]:
    """{stage: a file of its output}."""
    entries = tiny.ran()
    return {
        name: max(
            (file for file in (tiny.home / entry["path"]).iterdir() if file.name != MANIFEST),
            key=lambda f: f.stat().st_size,
        )
        for name, entry in entries.items()
        if name in ("ingest", "tokenize", "finetune", "save")
    }


def harm(file: Path, damage: str) -> None:
    if damage == "delete":
        file.unlink()
    elif damage == "truncate":
        os.truncate(file, file.stat().st_size - 1)
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def test_damaged_outputs_are_made_again_byte_for_byte(tiny: Tiny) -> None:
    before = digests(tiny.home)
    for name, file in finished_outputs(tiny).items():
        if name in ("ingest", "tokenize"):
            harm(file, "flip")
    assert not_cached(tiny.ran()) == ["ingest", "tokenize"]
    assert digests(tiny.home) == before


def test_two_hundred_flipped_bytes_are_two_hundred_found(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMAZON_FT_HOME", str(tiny.home))
    everything = [Artifact(kind=path.parent.name, digest=full_digest(path)) for path in artifacts(tiny.home)]
    files = [
        (artifact, file) for artifact in everything for file in artifact.path.rglob("*") if file.is_file() and file.stat().st_size
    ]
    generator, found = random.Random(0), 0
    for _ in range(200):
        artifact, file = generator.choice(files)
        found += flip_is_found(artifact, file, generator)
    assert found == 200


def full_digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()


def flip_is_found(artifact: Artifact, file: Path, generator: random.Random) -> bool:
    with file.open("r+b") as handle:
        where = generator.randrange(file.stat().st_size)
        handle.seek(where)
        (byte,) = handle.read(1)
        handle.seek(where)
        handle.write(bytes([byte ^ generator.randrange(1, 256)]))
        handle.flush()
        try:
            store.verify(artifact)
        except store.Missing:
            return True
        finally:
            handle.seek(where)
            handle.write(bytes([byte]))
    return False


def test_deleted_prefect_home_and_moved_root_rerun_nothing(tiny: Tiny, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(tiny.home, moved)
    assert not_cached(tiny.checkout.plan(str(tiny.recipe), AMAZON_FT_HOME=str(moved), PREFECT_HOME=str(tmp_path / "new"))) == []


def test_run_below_a_wrong_setting_ends_with_exit_code_2_and_no_trace(tiny: Tiny) -> None:
    result = tiny.run("--set", "sample.rows=100000", check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "100,000" in result.stderr
