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
from tasks.caching.identity import BACKENDS, _without_docstrings, canonical, code_digests, module_digest, stage_key
from tasks.config import FinetuneConfig, IngestConfig, SampleConfig
from tasks.refs import Artifact, PipelineError, Products, Source, SourceFile
from tests.support.checkout import Checkout

DIGESTS = "import json, sys; from tasks.caching.identity import code_digests; print(json.dumps(code_digests(sys.argv[1:])))"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout.copy_to(tmp_path / "checkout")


def digests(checkout: Checkout, *modules: str, **options: str) -> dict[str, str]:
    return json.loads(checkout.run("-c", DIGESTS, *modules, **options).stdout)


def test_artifact_counts_as_its_digest_alone() -> None:
    first = Artifact(kind="products", digest="ab", rows=3, size_bytes=10)
    assert canonical(first) == canonical(first.model_copy(update={"rows": 4})) == "ab"


def test_parsing_that_another_thread_disturbs_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, parse, disturbed = module_digest.__wrapped__("tasks.sample"), ast.parse, iter([True, True, False])

    def parse_now_and_then(source: str) -> ast.Module:
        if next(disturbed):
            raise SystemError("AST constructor recursion depth mismatch (before=57, after=75)")
        return parse(source)

    monkeypatch.setattr(ast, "parse", parse_now_and_then)
    assert module_digest.__wrapped__("tasks.sample") == wanted


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


def tree(source: str) -> object:
    return _without_docstrings(ast.parse(source))


def test_comments_docstrings_and_layout_do_not_count() -> None:
    plain = "def f(x):\n    return x + 1\n"
    dressed = '"""Module."""\n\n\ndef f(\n    x,\n):\n    """Doc."""\n    # why\n    return x + 1\n'
    assert tree(plain) == tree(dressed)


@pytest.mark.parametrize("edit", ["x + 2", "x - 1", "y + 1", "1 + x", "x + 1.0", "x + True"])
def test_every_edit_of_an_expression_counts(edit: str) -> None:
    assert tree("def f(x, y):\n    return x + 1") != tree(f"def f(x, y):\n    return {edit}")


def test_returned_string_is_no_docstring() -> None:
    assert tree("def f():\n    return 'a'") != tree("def f():\n    return 'b'")


def test_imports_are_followed_and_machinery_is_left_out() -> None:
    found = code_digests(["tasks.caching.stage"])
    assert set(found) == {"tasks.caching.stage", "tasks"}


def test_backends_count_only_when_chosen() -> None:
    assert not BACKENDS & code_digests(["tasks.finetune"]).keys()
    assert BACKENDS & code_digests(["tasks.finetune", "tasks.training.hf"]).keys() == {"tasks.training.hf"}


def test_every_backend_of_the_config_is_known_as_one() -> None:
    assert set(get_args(FinetuneConfig.model_fields["backend"].annotation)) == set(finetune.BACKENDS)
    assert set(finetune.BACKENDS.values()) == BACKENDS


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
