"""amazon-ft ask: one question, or one after another, to a saved model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.models.saved import Saved
from tasks.config import HALF_A_PAIR, Recipe
from tasks.refs import InputError

if TYPE_CHECKING:
    from tasks.training.inference.chat import ChatModel

COLUMNS = ("title", "content")


@dataclass(frozen=True)
class AskOptions:
    """How to ask."""

    title: str | None
    question: str | None
    compare: bool
    max_new_tokens: int | None


def answer_titles(saved: Saved, options: AskOptions, *, read: Callable[[str], str], say: Callable[[str], None]) -> None:
    """Answer the title of the options, else each that is read until an empty line or the end of the input.

    Raises:
        InputError: for an empty title, or a question where the model was trained without.
    """
    from tasks.training.inference.chat import load_chat_model

    check_question(saved.recipe, options.question)
    if options.title is not None:
        render_title(saved.recipe, options.title)  # a mistake is told before minutes of loading
    model = load_chat_model(saved.path, saved.base(), saved.recipe.model.weights)
    for title in [options.title] if options.title is not None else _titles(read):
        _answer(model, saved.recipe, title, options, say)


def render_title(recipe: Recipe, title: str) -> str:
    """A title as the recipe's merged prompt renders it; other columns are empty.

    Raises:
        InputError: for an empty title.
    """
    import pyarrow as pa

    from tasks.text.merged_prompt import merge_columns, parse_merged_prompt

    _check_text("--title", title)
    if not title.strip():
        raise InputError("--title: got an empty text; expected a product's title.")
    blocks = parse_merged_prompt(recipe.sharegpt.merged_prompt, COLUMNS)
    product = pa.RecordBatch.from_pydict({"title": [title.strip()], "content": [""]})
    return str(merge_columns(product, blocks)[0].as_py())


def check_question(recipe: Recipe, question: str | None) -> None:
    """Refuse a question that no prompt would hold.

    Raises:
        InputError: then.
    """
    from tasks.text.chat_template import QUESTION

    _check_text("--question", question or "")
    if question is not None and QUESTION not in recipe.template.chat_template:
        raise InputError(
            f"--question: got {question}; expected none: this model's chat_template has no {QUESTION}. Leave it out."
        )


def _check_text(option: str, text: str) -> None:
    if HALF_A_PAIR.search(text):  # as Python takes bytes of the command line that are no UTF-8
        raise InputError(f"{option}: got {text!r}; expected text in UTF-8. Set the terminal's encoding to it.")


def _titles(read: Callable[[str], str]) -> Iterator[str]:
    while True:
        try:
            title = read("title> ").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"title: got {error.object!r}; expected text in UTF-8. Set the terminal's encoding to it.") from None
        if not title:
            return
        yield title


def _answer(model: ChatModel, recipe: Recipe, title: str, options: AskOptions, say: Callable[[str], None]) -> None:
    prompt = render_title(recipe, title)
    longest = options.max_new_tokens or recipe.evaluate.max_new_tokens
    for name in ("base", "tuned") if options.compare else ("tuned",):
        if options.compare:
            say(f"{name}: ")
        model.answer(prompt, options.question, max_new_tokens=longest, tuned=name == "tuned", say=say)
        say("\n")
