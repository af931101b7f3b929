"""Loads a saved model to ask it, and streams its greedy answers; the base model answers with the adapter switched off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.config import WeightsConfig
from tasks.refs import Model
from tasks.training.hardware import resolve_dtype
from tasks.training.loading import load_base, load_tokenizer


@dataclass(frozen=True)
class ChatModel:
    """A loaded model, its tokenizer and device."""

    model: Any
    tokenizer: Any
    device: str

    def answer(
        self, prompt: str, question: str | None, *, max_new_tokens: int, tuned: bool = True, say: Callable[[str], None]
    ) -> str:
        """The greedy answer to a prompt; `say` hears its text as it comes.

        Args:
            prompt: what the user says, as the recipe's merged prompt renders it.
            question: takes the place of {question} in the chat template; None for the recipe's own.
            max_new_tokens: the answer is cut there.
            tuned: False for the base model.
            say: called with each piece.
        """
        import torch
        from transformers import GenerationConfig

        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], question=question, add_generation_prompt=True, tokenize=False
        )
        inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False).to(self.device)
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        with torch.inference_mode(), nullcontext() if tuned else self.model.disable_adapter():
            said = self.model.generate(**inputs, generation_config=greedy, streamer=_streamer(self.tokenizer, say))
        return self.tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def load_chat_model(adapter: Path, base: Model, weights: WeightsConfig) -> ChatModel:
    """A saved adapter on its base model, on the GPU if there is one; four bits only there."""
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = resolve_dtype(weights.dtype, device)
    loaded = load_base(Path(base.path), dtype, load_in_4bit=weights.load_in_4bit and device == "cuda", device=device)
    model = PeftModel.from_pretrained(loaded, str(adapter), torch_device=device).eval()
    tokenizer = load_tokenizer(base)
    plain: Any = GenerationConfig()  # the base model's own may sample, of which a greedy answer would be warned
    model.generation_config = model.get_base_model().generation_config = plain
    return ChatModel(model, tokenizer, device)


def _streamer(tokenizer: Any, say: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Said(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002  # its name is given
            say(text)

    return Said(tokenizer, skip_prompt=True, skip_special_tokens=True)
