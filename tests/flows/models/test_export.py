"""What is exported answers as the adapter does on its base model, and is written whole or not at all."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flows.choices import Bits, Format
from flows.cli.main import app
from flows.models.export import GgufOptions, card, export_model, push_to_hub
from flows.models.saved import Saved, find_saved
from tasks.caching.context import open_run
from tasks.reading.model_files import read_json
from tasks.refs import ConfigError, InputError, PipelineError
from tasks.training.exporting.gguf import interleaved, pre_tokenizer
from tests.support.tiny import make_tiny_model
from tests.support.tuned import make_tiny_adapter, save_tuned

pytestmark = pytest.mark.heavy

CHAT = [{"role": "user", "content": "Chaleira elétrica"}]


@pytest.fixture
def saved(tuned: tuple[Path, Path]) -> Saved:
    save_tuned(*tuned)
    return find_saved("demo")


def load(path: Path, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)


def say(model: Any, tokenizer: Any) -> Any:
    """Logits after the recipe's chat template."""
    import torch

    ids = tokenizer.apply_chat_template(CHAT, return_tensors="pt", return_dict=True, add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        return model(ids).logits


def test_merged_and_gguf_say_the_same_and_nearly_what_the_adapter_says(saved: Saved, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    difference = export_model(saved, Format.MERGED, tmp_path / "merged").difference
    export_model(saved, Format.GGUF, tmp_path / "gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = say(load(tmp_path / "merged"), tokenizer)
    unmerged = say(PeftModel.from_pretrained(load(Path(saved.recipe.model.id)), saved.path), tokenizer)
    assert torch.equal(merged, say(load(tmp_path / "gguf", gguf_file="model.gguf"), tokenizer))
    assert (merged - unmerged).abs().max() < 0.1 < (merged - say(load(Path(saved.recipe.model.id)), tokenizer)).abs().max()
    assert 0 < difference.max_logit < 0.1


@pytest.mark.parametrize("how", list(Format))
def test_a_base_that_is_stored_in_four_bits_is_widened(how: Format, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    plain = make_tiny_model(tmp_path / "plain", hidden=64)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    base = tmp_path / "nf4"
    load(plain, quantization_config=four_bits).save_pretrained(base)
    for file in [*plain.glob("tokenizer*"), plain / "special_tokens_map.json"]:
        (base / file.name).write_bytes(file.read_bytes())
    save_tuned(base, make_tiny_adapter(plain, tmp_path / "adapter"))
    difference = export_model(find_saved("demo"), how, tmp_path / "out").difference
    assert difference.kl < 1e-3
    if how is Format.MERGED:
        assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")


def test_a_gguf_carries_the_tokenizer_and_its_chat_template(saved: Saved, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    export_model(saved, Format.GGUF, tmp_path / "gguf")
    fields = GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    tokenizer = AutoTokenizer.from_pretrained(saved.path)
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos")] == [0, 1]
    assert fields["tokenizer.ggml.tokens"].contents() == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_a_gguf_is_asked_the_held_out_questions_in_llama_cpp(saved: Saved, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["export", "demo", str(tmp_path / "out"), "--format", "gguf", "--bits", "f16", "--check"])
    assert told.exit_code == 0, told.output
    assert (tmp_path / "out" / "Modelfile").read_text().startswith('FROM ./model.gguf\nTEMPLATE """')
    metrics, card = read_json(tmp_path / "out" / "metrics.json"), (tmp_path / "out" / "README.md").read_text()
    if find_spec("xllamacpp") is None:
        assert "llama.cpp: not asked, for no runtime is installed here: pip install" in told.output
        assert "llama_cpp" not in metrics
        return
    sentence = "2 of 2 held-out prompts have the same tokens, and 2 of 2 greedy answers the same token ids as in transformers."
    assert sentence in told.output
    assert sentence in card
    assert (metrics["llama_cpp"]["same_tokens"], metrics["llama_cpp"]["same_answers"]) == (2, 2)


def test_eight_bits_are_read_again_as_they_were_rounded(saved: Saved, tmp_path: Path) -> None:
    sixteen, eight = (
        export_model(saved, Format.GGUF, tmp_path / bits, GgufOptions(bits)).difference for bits in (Bits.F16, Bits.Q8_0)
    )
    assert sixteen.kl < eight.kl < 1e-3
    sizes = [(tmp_path / bits / "model.gguf").stat().st_size for bits in (Bits.F16, Bits.Q8_0)]
    assert sizes[1] < sizes[0]


def test_bits_of_another_format_are_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^export --bits, --check: got format merged-16bit; expected gguf"):
        export_model(saved, Format.MERGED, tmp_path / "out", GgufOptions(Bits.Q8_0))
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_copied_to_the_byte(saved: Saved, tmp_path: Path) -> None:
    difference = export_model(saved, Format.ADAPTER, tmp_path / "deep" / "adapter").difference
    names = {file.name for file in saved.path.iterdir()} - {"manifest.json"}
    assert {file.name for file in (tmp_path / "deep" / "adapter").iterdir()} == names
    assert all((tmp_path / "deep" / "adapter" / name).read_bytes() == (saved.path / name).read_bytes() for name in names)
    assert difference.max_logit == 0


def test_what_answers_otherwise_is_not_kept(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.training.exporting.gguf.interleaved", lambda values, heads: values)  # rows in the wrong order
    with pytest.raises(PipelineError, match="does not answer as the adapter does"):
        export_model(saved, Format.GGUF, tmp_path / "wrong")
    assert list(tmp_path.glob("*wrong*")) == []


def test_a_directory_that_is_there_is_left_alone(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        export_model(saved, Format.ADAPTER, tmp_path)
    assert str(caught.value) == (
        f"export {tmp_path}: is there already; expected a directory to be made. Remove it or name another."
    )


def test_cards_tell_the_hub_the_format_and_keep_the_numbers(saved: Saved) -> None:
    text = card((saved.path / "README.md").read_text(), "merged-16bit")
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert (metadata["library_name"], metadata["base_model"]) == ("transformers", "org/tiny")
    assert "1.284" in text
    assert "PeftModel" not in text


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3))
def test_interleaving_is_undone_by_transformers(heads: int, half: int, columns: int) -> None:
    import numpy as np
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    matrix = np.arange(heads * half * 2 * columns).reshape(-1, columns)
    again = LlamaTensorProcessor()._reverse_permute_weights(interleaved(matrix, heads), heads, heads)
    assert np.array_equal(again, matrix)


def test_tokenizers_are_called_what_llama_cpp_calls_them(llama3: Path) -> None:
    assert pre_tokenizer(read_json(llama3 / "tokenizer.json")) == "llama-bpe"


def test_a_tokenizer_without_a_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"a tokenizer that llama.cpp has no name for here: got .*Metaspace"):
        pre_tokenizer({"pre_tokenizer": {"type": "Metaspace"}, "model": {"type": "BPE"}})


class Hub:
    """Stands in for huggingface_hub.HfApi."""

    calls: list[tuple[str, Any]]

    def __init__(self, token: str) -> None:
        Hub.calls = [("token", token)]

    def create_repo(self, repository: str, **options: Any) -> Any:
        from huggingface_hub import RepoUrl

        Hub.calls.append(("create", (repository, options)))
        return RepoUrl(f"https://huggingface.co/{repository}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        Hub.calls.append(("upload", (repo_id, sorted(file.name for file in folder_path.iterdir()))))


def test_push_uploads_what_was_exported_to_a_private_repository(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", "demo", str(out), "--format", "adapter", "--push", "me/mine"])
    assert done.exit_code == 0, done.output
    assert Hub.calls == [
        ("token", "hf_secret"),
        ("create", ("me/mine", {"private": True, "exist_ok": True})),
        ("upload", ("me/mine", sorted(file.name for file in out.iterdir()))),
    ]
    assert "pushed: https://huggingface.co/me/mine" in done.output
    assert "hf_secret" not in done.output


def test_a_refused_push_tells_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Hub, repository: str, **options: Any) -> None:
        raise OSError("403 for hf_secret")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(PipelineError) as caught:
        push_to_hub(tmp_path, "me/mine", "hf_secret")
    assert "OSError: 403 for ***; expected a repository that HF_TOKEN may write to" in str(caught.value)
    assert str(caught.value).endswith(f"is kept; upload it with: hf upload --private me/mine {tmp_path}")


def test_without_a_token_nothing_is_written(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = CliRunner().invoke(app, ["export", "demo", str(tmp_path / "out"), "--push", "me/mine"])
    assert isinstance(done.exception, ConfigError)
    assert not (tmp_path / "out").exists()


def test_unknown_names_are_told_what_there_is(saved: Saved, home: Path) -> None:
    with pytest.raises(InputError, match=r"There are: demo/unsloth_model_optimized\.$"):
        find_saved("dmo")


def test_the_promoted_model_of_a_recipe_goes_first(saved: Saved, tuned: tuple[Path, Path], home: Path) -> None:
    other = save_tuned(*tuned, **{"finetune.seed": "1"})
    assert find_saved("demo").path == other.data.path
    (home / "models" / "demo" / "promoted").symlink_to(saved.path)
    assert find_saved("demo").path == saved.path
    assert find_saved("demo/unsloth_model_optimized").path == other.data.path


def test_a_base_model_that_changed_is_not_used(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    save_tuned(base, tuned[1])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(InputError, match="its base model org/tiny is not here"):
        find_saved("demo").base()


def test_a_base_model_that_was_moved_is_found_where_a_run_named_it_since(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    save_tuned(base, tuned[1])
    base.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"Run its recipe with --set model\.id=DIRECTORY, wherever that model lies now"):
        find_saved("demo").base()
    for place in ("nowhere", "moved"):
        with open_run("demo", {"model": {"id": str(tmp_path / place)}}):
            pass
    assert find_saved("demo").base().path == str(tmp_path / "moved")
