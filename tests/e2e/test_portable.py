"""Keys and bytes of the data stages are the same elsewhere: another root, another Python, an installed wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.tiny_runs import Tiny
from tests.support import forked
from tests.support.checkout import PROJECT

NEEDED = [
    "filelock",
    "fsspec",
    "httpx",
    "huggingface-hub",
    "msgspec",
    "numpy",
    "polars",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "rich",
    "safetensors",
    "tokenizers",
    "typer",
    "jinja2",
]
PROGRAM = Path(__file__).with_name("data_stages.py")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built project."""
    path = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(path), str(PROJECT)]
    subprocess.run(pip, check=True, capture_output=True)
    return next(path.glob("amazon_ft-*.whl"))


def data_stages(python: str, tiny: Tiny, home: Path, **env: str) -> dict[str, list[str]]:
    environment = {**os.environ, "AMAZON_FT_HOME": str(home), "PYTHONPATH": "", **env}
    done = subprocess.run(
        [python, str(PROGRAM), str(tiny.recipe)], env=environment, capture_output=True, text=True, cwd=home.parent, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_two_roots_and_two_processes_agree(fresh: Tiny, tmp_path: Path) -> None:
    here = {"PYTHONPATH": str(PROJECT)}
    first = data_stages(sys.executable, fresh, tmp_path / "a", **here)
    assert first == data_stages(sys.executable, fresh, tmp_path / "b", **here)
    assert list(first) == ["ingest", "sample", "sharegpt", "template", "tokenize"]


def test_run_itself_agrees_with_the_bare_stages(finished: Tiny, tmp_path: Path) -> None:
    bare = data_stages(sys.executable, finished, tmp_path / "a", PYTHONPATH=str(PROJECT))
    planned = finished.plan()
    assert {name: told[0] for name, told in bare.items()} == {name: planned[name]["key"] for name in bare}


def other_python() -> str | None:
    """A Python of another minor version that the project supports."""
    for minor in (12, 13, 11):
        found = shutil.which(f"python3.{minor}")
        if found and minor != sys.version_info.minor:
            environment = {**os.environ, "PYENV_VERSION": f"3.{minor}"}  # a pyenv shim does nothing unless told
            asked = subprocess.run(
                [found, "-c", "import sys; print(sys.executable)"], env=environment, capture_output=True, text=True
            )
            if asked.returncode == 0:
                return asked.stdout.strip()
    return None


@pytest.mark.slow("installs what the data stages need into another Python")
def test_other_python_and_installed_wheel_agree(fresh: Tiny, tmp_path: Path, wheel: Path) -> None:
    other = other_python()
    if other is None:
        pytest.skip("no second Python from 3.11 to 3.13 is on this machine")
    subprocess.run([other, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "--no-compile", "-c", str(PROJECT / "constraints.txt")]
    subprocess.run([*install, *NEEDED], check=True, capture_output=True)
    subprocess.run([*install, "--no-deps", str(wheel)], check=True, capture_output=True)
    there = data_stages(python, fresh, tmp_path / "b")
    assert there == data_stages(sys.executable, fresh, tmp_path / "a", PYTHONPATH=str(PROJECT))


def test_wheel_carries_code_and_recipes(wheel: Path) -> None:
    import zipfile

    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"flows/cli/main.py", "tasks/ingest.py", "tasks/training/hf.py", "deployments/recipes/demo.yaml"} <= names


@pytest.mark.slow("installs the wheel and runs the demo from it")
def test_installed_wheel_runs_a_shipped_recipe(finished: Tiny, tmp_path: Path, wheel: Path) -> None:
    """`amazon-ft run demo` from a wheel unpacked beside nothing else; only the model and the sizes are a test's."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    sizes = ["catalogue.rows=200", "sample.rows=30", "sample.eval_rows=4", "finetune.max_steps=2", "finetune.warmup_steps=0"]
    sizes += ["finetune.logging_steps=1", "finetune.save_steps=1", "evaluate.generations=2", "evaluate.max_new_tokens=4"]
    sizes += [f"model.id={finished.model}", "tokenize.max_tokens=512", "ingest.max_bad_share=0.1"]
    done = forked.run(
        ["-m", "flows.cli", "run", "demo", "--json", *(word for size in sizes for word in ("--set", size))],
        env={**os.environ, "PYTHONPATH": str(site), "AMAZON_FT_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(json.loads(done.stdout.splitlines()[-1])["artifact"], "adapter_model.safetensors").is_file()
