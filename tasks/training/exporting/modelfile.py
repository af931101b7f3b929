"""Ollama's Modelfile of an exported model: its file, its chat template in Ollama's own language, and where an answer ends.

Source: https://github.com/ollama/ollama, docs/modelfile.mdx and docs/template.mdx.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

SYSTEM, PROMPT = "{{ .System }}", "{{ .Prompt }}"


def make_modelfile(tokenizer: Any, file: str) -> str:
    """The text of a Modelfile; without a template where the tokenizer has none."""
    lines = [f"FROM ./{file}"]
    if tokenizer.chat_template:
        lines.append(f'TEMPLATE """{ollama_template(_renderer(tokenizer))}"""')
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return "\n".join([*lines, "PARAMETER temperature 0", ""])


def ollama_template(render: Callable[[list[dict[str, str]]], str]) -> str:
    """A chat template of one turn, with and without a system's words, as `render` makes it of messages.

    >>> ollama_template(lambda messages: "<s>" + "".join(f"{m['role']}: {m['content']} " for m in messages))
    '{{ if .System }}<s>system: {{ .System }} user: {{ .Prompt }} {{ else }}<s>user: {{ .Prompt }} {{ end }}{{ .Response }}'
    """
    user = {"role": "user", "content": PROMPT}
    alone = render([user])
    try:
        asked = render([{"role": "system", "content": SYSTEM}, user])
    except TemplateError:  # one that takes no system's words
        asked = alone
    both = f"{{{{ if .System }}}}{asked}{{{{ else }}}}{alone}{{{{ end }}}}"
    return f"{alone if SYSTEM not in asked else both}{{{{ .Response }}}}"


def _renderer(tokenizer: Any) -> Callable[[list[dict[str, str]]], str]:
    def render(messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    return render
