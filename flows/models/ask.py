"""amazon-ft ask: one question, or one after another, to a saved model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flows.models.saved import Saved
from tasks.config import HALF_A_PAIR, Recipe
from tasks.refs import InputError

if TYPE_CHECKING:
    from tasks.training.inference.chat import ChatModel


@dataclass(frozen=True)
class AskOptions:
    """How to ask."""

    title: str | None
    question: str | None
    compare: bool
    max_new_tokens: int | None
    prompt: str | None = None
    """A user's words as they are; instead of a title."""
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    """The product's further columns."""

    @property
    def said(self) -> str | None:
        """The title or prompt of the options."""
        return self.title if self.prompt is None else self.prompt


def takes_prompts(recipe: Recipe) -> bool:
    """Whether a model was trained on conversations, and not on products."""
    return recipe.ingest.kind not in ("auto", "products")


def answer_titles(saved: Saved, options: AskOptions, *, read: Callable[[str], str], say: Callable[[str], None]) -> None:
    """Answer the title or prompt of the options, else each that is read until an empty line or the end of the input.

    Raises:
        InputError: for an empty title, a column that the merged prompt lacks, or a question where the model was trained without.
    """
    from tasks.training.inference.chat import load_chat_model

    check_question(saved.recipe, options.question)
    if options.said is not None:
        render_said(saved.recipe, options.said, options)  # a mistake is told before minutes of loading
    model = load_chat_model(saved.path, saved.base(), saved.recipe.model.weights)
    asked = "prompt> " if takes_prompts(saved.recipe) else "title> "
    for said in [options.said] if options.said is not None else _lines(read, asked):
        _answer(model, saved.recipe, said, options, say)


def render_said(recipe: Recipe, said: str, options: AskOptions) -> str:
    """A prompt as it is, a title as the recipe's merged prompt renders it.

    Raises:
        InputError: as render_title; for a title where the model was trained on conversations.
    """
    if options.prompt is None and not takes_prompts(recipe):
        return render_title(recipe, said, options.columns)
    if options.title is not None or options.columns:
        raise InputError("--title: this model was trained on conversations; expected --prompt and the user's words.")
    _check_text("--prompt", said)
    return said


def render_title(recipe: Recipe, title: str, further: Mapping[str, str] | None = None) -> str:
    """A title as the recipe's merged prompt renders it; columns that are not given are empty.

    Raises:
        InputError: for an empty title, or a column that the merged prompt does not name.
    """
    import pyarrow as pa

    from tasks.text.merged_prompt import merge_columns, parse_merged_prompt, prompt_columns

    _check_text("--title", title)
    if not title.strip():
        raise InputError("--title: got an empty text; expected a product's title.")
    names = prompt_columns(recipe.sharegpt.merged_prompt)
    if strange := [name for name in further or {} if name not in names]:
        raise InputError(
            f"--column: got {strange[0]}; expected a column of the merged prompt: {', '.join(names) or 'it has none'}."
        )
    values = dict.fromkeys(names, "") | dict(further or {}) | {"title": title.strip()}
    product = pa.RecordBatch.from_pydict({name: [value] for name, value in values.items()})
    blocks = parse_merged_prompt(recipe.sharegpt.merged_prompt, list(values))
    return str(merge_columns(product, blocks)[0].as_py())


def check_question(recipe: Recipe, question: str | None) -> None:
    """Refuse a question that no prompt would hold.

    Raises:
        InputError: then.
    """
    from tasks.text.chat_template import QUESTION

    _check_text("--question", question or "")
    if question is not None and (recipe.template.source == "model" or QUESTION not in recipe.template.chat_template):
        raise InputError(
            f"--question: got {question}; expected none: this model's chat_template has no {QUESTION}. Leave it out."
        )


def _check_text(option: str, text: str) -> None:
    if HALF_A_PAIR.search(text):  # as Python takes bytes of the command line that are no UTF-8
        raise InputError(f"{option}: got {text!r}; expected text in UTF-8. Set the terminal's encoding to it.")


def _lines(read: Callable[[str], str], asked: str) -> Iterator[str]:
    while True:
        try:
            line = read(asked).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            got = f"{asked.rstrip('> ')}: got {error.object!r}"
            raise InputError(f"{got}; expected text in UTF-8. Set the terminal's encoding to it.") from None
        if not line:
            return
        yield line


def _answer(model: ChatModel, recipe: Recipe, said: str, options: AskOptions, say: Callable[[str], None]) -> None:
    prompt = render_said(recipe, said, options)
    longest = options.max_new_tokens or recipe.evaluate.max_new_tokens
    for name in ("base", "tuned") if options.compare else ("tuned",):
        if options.compare:
            say(f"{name}: ")
        model.answer(prompt, options.question, max_new_tokens=longest, tuned=name == "tuned", say=say)
        say("\n")
