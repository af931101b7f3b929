"""A key changes with the code and the inputs that decide a stage's output, and with nothing else."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import finetune
from tasks.caching.code.modules import read_module
from tasks.caching.identity import canonical, code_digests, remember_code, source_digest, stage_key
from tasks.config import FinetuneConfig, IngestConfig, SampleConfig
from tasks.refs import Artifact, PipelineError, Products, Source, SourceFile
from tests.support.checkout import PROJECT, Checkout

pytestmark = pytest.mark.heavy

DIGESTS = """
import json, os, sys
from tasks.caching.identity import code_digests
print(json.dumps(code_digests(sys.argv[1:], os.environ.get("ALTERNATIVES", "").split())))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout.copy_to(tmp_path / "checkout")


def digests(checkout: Checkout, *modules: str, **options: str) -> dict[str, str]:
    return json.loads(checkout.run("-c", DIGESTS, *modules, **options).stdout)


def test_artifact_counts_as_its_digest_alone() -> None:
    first = Artifact(kind="products", digest="ab", rows=3, size_bytes=10)
    assert canonical(first) == canonical(first.model_copy(update={"rows": 4})) == "ab"


def test_parsing_that_another_thread_disturbs_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, parse, disturbed = read_module("tasks.sample").digest, ast.parse, iter([True, True, False])

    def parse_now_and_then(source: str) -> ast.Module:
        if next(disturbed):
            raise SystemError("AST constructor recursion depth mismatch (before=57, after=75)")
        return parse(source)

    monkeypatch.setattr(ast, "parse", parse_now_and_then)
    assert read_module.__wrapped__("tasks.sample").digest == wanted


def test_source_counts_by_content_not_by_place() -> None:
    here, there = (Source(files=(SourceFile(url=url, digest="ab", size_bytes=1),)) for url in ("/a/trn.json", "/b/trn.json"))
    assert canonical(here) == canonical(there)


def test_side_files_and_counts_do_not_count() -> None:
    data, rejects = Artifact(kind="products", digest="ab"), Artifact(kind="rejects", digest="cd")
    assert canonical(Products(data=data)) == canonical(Products(data=data, rejects=rejects, lines=9, dropped={"x": 1}))


def test_aside_settings_do_not_count() -> None:
    assert canonical(IngestConfig(sources=("a",))) == canonical(IngestConfig(sources=("b",), block_bytes=2**20))


def test_any_other_setting_counts() -> None:
    assert canonical(SampleConfig(seed=1)) != canonical(SampleConfig(seed=2))


def test_value_without_canonical_form_is_refused() -> None:
    with pytest.raises(TypeError, match="object has no canonical form; pass a config section, a reference or plain values"):
        canonical({"x": object()})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values, json_values)
def test_keys_are_equal_only_for_equal_inputs(first: object, second: object) -> None:
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (stage_key("s", 1, {}, canonical(first)) == stage_key("s", 1, {}, canonical(second))) == same


def test_imports_are_followed_and_machinery_is_left_out() -> None:
    found = code_digests(["tasks.sample"])
    assert {"tasks.sample", "tasks", "tasks.tables", "tasks.tables.arrow"} <= found.keys()
    assert not [name for name in found if name.startswith(("tasks.caching", "tasks.config", "tasks.refs"))]


BACKENDS = set(finetune.BACKENDS.values())


def test_backends_count_only_when_chosen() -> None:
    assert not BACKENDS & code_digests(["tasks.finetune"], BACKENDS).keys()
    for backend in BACKENDS:
        assert BACKENDS & code_digests(["tasks.finetune", backend], BACKENDS).keys() == {backend}


def test_backend_that_another_one_imports_counts(checkout: Checkout) -> None:
    checkout.append("tasks/training/unsloth.py", "\n\ndef other():\n    from tasks.training import hf\n    return hf\n")
    found = digests(checkout, "tasks.finetune", "tasks.training.unsloth", ALTERNATIVES=" ".join(BACKENDS))
    assert BACKENDS & found.keys() == {"tasks.training.unsloth", "tasks.training.hf"}


def test_every_backend_of_the_config_is_known_as_one() -> None:
    assert set(get_args(FinetuneConfig.model_fields["backend"].annotation)) == set(finetune.BACKENDS)


@pytest.mark.parametrize("stage", ["tasks.baseline", "tasks.evaluate"])
def test_checkpoints_and_estimates_of_memory_do_not_count_for_evaluation(stage: str) -> None:
    found = code_digests([stage])
    assert "tasks.training.inference.scoring" in found
    assert not {"tasks.training.checkpoints", "tasks.training.memory"} & found.keys()


STAGES = [file.stem for file in sorted((PROJECT / "tasks").glob("*.py")) if "\n@stage(" in file.read_text()]


@pytest.mark.parametrize("stage", [*(f"tasks.{stage}" for stage in STAGES), *sorted(BACKENDS)])
def test_no_stage_reaches_past_its_key(stage: str) -> None:
    assert stage in code_digests([stage])


def test_missing_source_is_an_error() -> None:
    with pytest.raises(PipelineError, match=r"tasks\.nowhere: source not found; its code decides what is cached"):
        code_digests(["tasks.nowhere"])


def test_new_helper_module_and_its_edits_count(checkout: Checkout) -> None:
    (checkout.path / "tasks" / "helper.py").write_text("RATE = 1\n")
    checkout.append("tasks/sample.py", "\n\ndef later():\n    from tasks.helper import RATE\n    return RATE\n")
    before = digests(checkout, "tasks.sample")
    checkout.edit("tasks/helper.py", "RATE = 1", "RATE = 2")
    after = digests(checkout, "tasks.sample")
    assert {name for name in after if before[name] != after[name]} == {"tasks.helper"}


@pytest.mark.parametrize(
    "use",
    [
        "import tasks.helper\nRATE = tasks.helper.RATE\n",
        "import tasks.text.turns\nRATE = tasks.helper.RATE\n",
        "from tasks import helper\n",
        "from . import helper\n",
        "from .helper import RATE\n",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'tasks.helper'])\n",
    ],
)
def test_a_module_counts_however_it_is_named(checkout: Checkout, use: str) -> None:
    (checkout.path / "tasks" / "helper.py").write_text("RATE = 1\n")
    checkout.append("tasks/sample.py", f"\n\n{use}")
    assert "tasks.helper" in digests(checkout, "tasks.sample")


def test_relative_and_absolute_imports_count_alike(checkout: Checkout) -> None:
    before = digests(checkout, "tasks.sample")
    checkout.edit("tasks/sample.py", "from tasks.refs import", "from .refs import")
    assert digests(checkout, "tasks.sample") == before


def test_all_that_is_refused_is_said_at_once_with_file_and_line(checkout: Checkout) -> None:
    (checkout.path / "helpers.py").write_text("")
    checkout.edit("tasks/sample.py", "annotations\n", "annotations\nimport helpers\n")
    checkout.edit("tasks/tables/__init__.py", '"""', 'import pkgutil\n"""')
    line = 1 + (checkout.path / "tasks/sample.py").read_text().split("import helpers")[0].count("\n")
    said = checkout.run("-c", DIGESTS, "tasks.sample", check=False).stderr
    assert f"tasks/sample.py line {line}: a stage's code imports code from outside flows, tasks and the installed" in said
    assert "tasks/tables/__init__.py line 1: a stage's code looks for files beside the code" in said


def test_remembering_code_judges_nothing(checkout: Checkout) -> None:
    checkout.append("tasks/sample.py", "\nx = __file__\n")
    checkout.run("-c", "import tasks.sample")
    remember_code(["tasks.nowhere"])


VERSION = "from tasks.caching.identity import source_digest; print(source_digest('flows.amazon_ft'))"


def test_any_edit_of_what_the_flow_imports_is_another_version_and_none_elsewhere(checkout: Checkout) -> None:
    checkout.append("flows/bench/data.py", "RATE = 1\n")
    before = checkout.run("-c", VERSION).stdout.strip()
    assert before == source_digest("flows.amazon_ft"), "wherever it lies"
    checkout.append("tasks/config.py", "# a comment, where keys see none\n")
    assert checkout.run("-c", VERSION).stdout.strip() != before
