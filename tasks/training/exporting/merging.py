"""A saved adapter merged into its base model, written in 16 bits, and the proof that what was written is what was meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.refs import Model, PipelineError, Value
from tasks.training.loading import is_quantized, load_base

MAX_KL = 0.05
"""Nats between what adapter and merged model say: merging rounds the sum of both to 16 bits, which cost the demo's 0.004."""
MAX_LOGIT = 1e-3
"""Between the merged model and what of it is loaded again: the same numbers, so nothing but another order of sums."""
PROBE = "Título do produto: Aurora Brushed Tray 15 cm. Responda à pergunta sobre o produto."


class Difference(Value):
    """How far what was loaded again is from the adapter on its base model, over a text's next-token distributions."""

    max_logit: float
    """Largest absolute difference of two logits."""
    kl: float
    """Mean Kullback-Leibler divergence, nats."""
    loaded: bool = True
    """Whether the file was loaded again; else it is the merged model's, which was written."""


@dataclass(frozen=True)
class Merged:
    """A merged model, and what the adapter said to the probe before: (tokens, vocabulary), float32."""

    model: Any
    adapter_said: Any
    dtype: str


def merge(adapter: Path, base: Model, dtype: str) -> Merged:
    """Base and adapter as one model in main memory; a base in four bits is widened first, so that none are rounded to again."""
    from peft import PeftModel

    loaded = load_base(Path(base.path), dtype, load_in_4bit=False, device="cpu")
    if is_quantized(Path(base.path)):
        loaded = loaded.dequantize()
    tuned = PeftModel.from_pretrained(loaded, str(adapter), torch_device="cpu").eval()
    said = logits(tuned, base)
    return Merged(tuned.merge_and_unload(safe_merge=True), said, dtype)


def logits(model: Any, base: Model) -> Any:
    """A model's logits on the probe: (tokens, vocabulary), float32."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.tokenizer.path, local_files_only=True)
    ids = tokenizer(PROBE, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return model(input_ids=ids).logits[0].float()


def compare_logits(wanted: Any, got: Any) -> Difference:
    """How far two logits of equal shape are apart."""
    import torch
    from torch.nn.functional import kl_div

    gap = kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
    return Difference(max_logit=float(torch.max(torch.abs(wanted - got))), kl=max(0.0, float(gap)))


def check_loaded(merged: Merged, directory: Path, base: Model, *, gguf: str | None = None) -> Difference:
    """Load an export again; how far it is from the adapter.

    Raises:
        PipelineError: when it says something else than was merged, or than the adapter does.
    """
    import torch
    from transformers import AutoModelForCausalLM

    number, named = getattr(torch, merged.dtype), {"gguf_file": gguf, "config": merged.model.config} if gguf else {}
    again = AutoModelForCausalLM.from_pretrained(str(directory), dtype=number, local_files_only=True, **named)
    said = logits(again.eval(), base)
    written, rounded = compare_logits(logits(merged.model, base), said), compare_logits(merged.adapter_said, said)
    if not (written.max_logit <= MAX_LOGIT and rounded.kl <= MAX_KL):
        raise PipelineError(
            f"export: what was written does not answer as the adapter does: got logits that differ by {written.max_logit:.3g} "
            f"from those before writing, and {rounded.kl:.3g} nats from the adapter's; expected at most {MAX_LOGIT:g} and "
            f"{MAX_KL:g}. Nothing was kept. Export the adapter instead, and report the base model's name."
        )
    return rounded


def check_merged(merged: Merged, base: Model) -> Difference:
    """How far the merged model itself is from the adapter, of an export that transformers can't load again."""
    return compare_logits(merged.adapter_said, logits(merged.model, base)).model_copy(update={"loaded": False})


def check_copy(wanted: Path, got: Path, base: Model, dtype: str) -> Difference:
    """Load an adapter and its copy, each on a base model of its own, and compare.

    Raises:
        PipelineError: when they differ at all.
    """
    from peft import PeftModel

    def said(adapter: Path) -> Any:
        loaded = load_base(Path(base.path), dtype, load_in_4bit=False, device="cpu")
        return logits(PeftModel.from_pretrained(loaded, str(adapter), torch_device="cpu").eval(), base)

    difference = compare_logits(said(wanted), said(got))
    if difference.max_logit != 0:
        raise PipelineError(
            f"export {got}: the copy does not answer as the adapter: logits differ by {difference.max_logit:.3g}."
        )
    return difference
