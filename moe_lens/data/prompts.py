"""Prompt templates: an example as the text a model reads, and where its context and question stand in it."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, overload

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from moe_lens.data.example import Example
from moe_lens.errors import MoELensError

ANSWER_MARK = "\ue000"
"""Stands for an answer where only what a chat template writes around it matters; a private-use character."""


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    text: what is tokenised.
    context, question: their character ranges in `text`; `context` is None for a closed-book question.
    turn: the user's turn, where a chat template made `text` of it, special tokens included; else None.
    """

    text: str
    context: slice | None
    question: slice
    turn: str | None = None

    def answer_lead(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """What stands between the prompt and an answer: a space, or what the chat template puts there.

        Raises MoELensError if the template writes the prompt of an answered turn in another way, for example
        without a line of thought that it asks for.
        """
        if self.turn is None:
            return " "
        turns = [_turn("user", self.turn), _turn("assistant", ANSWER_MARK)]
        answered = cast(str, tokenizer.apply_chat_template(turns, tokenize=False))
        if not answered.startswith(self.text) or ANSWER_MARK not in answered:
            raise MoELensError(
                "the tokenizer's chat template does not continue the prompt with the answer, so none can be "
                "trained on; set tokenizer.chat_template to one that does, or to None for plain text"
            )
        return answered[len(self.text) : answered.index(ANSWER_MARK)]


@dataclass(frozen=True)
class PromptTemplate:
    """How examples are asked.

    with_context: holds `{context}` and, after it, `{question}`.
    closed_book: holds `{question}` only; used where an example's context is blank.
    answer_cue: ends the prompt where the tokenizer has no chat template.
    """

    with_context: str
    closed_book: str
    answer_cue: str = "\n\nAnswer:"

    def __post_init__(self) -> None:
        if not 0 <= self.with_context.find("{context}") < self.with_context.find("{question}"):
            raise MoELensError(f"expected {{context}} and then {{question}}; got {self.with_context!r}")
        if "{question}" not in self.closed_book or "{context}" in self.closed_book:
            raise MoELensError(f"expected {{question}} and no {{context}}; got {self.closed_book!r}")

    def facts(self) -> dict[str, str]:
        """Its texts by name, for the provenance of what is made of such prompts."""
        return asdict(self)

    def render(self, example: Example, tokenizer: "PreTrainedTokenizerBase") -> Prompt:
        """The prompt for a model: one user turn of its chat template, or plain text with the answer cue.

        Whitespace around the context and around the question is dropped.
        Raises MoELensError if the chat template does not repeat the user's turn letter by letter.
        """
        message = self._fill(example)
        if not tokenizer.chat_template:
            return replace(message, text=message.text + self.answer_cue)
        turns = [_turn("user", message.text)]
        text = cast(str, tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        start = text.find(message.text)
        if start < 0:
            raise MoELensError(
                "the tokenizer's chat template changes the user's text, so context is nowhere to be found; "
                "set tokenizer.chat_template to one that keeps it, or to None for plain text"
            )
        return Prompt(text, shift(message.context, start), shift(message.question, start), message.text)

    def _fill(self, example: Example) -> Prompt:
        context, question = example.context.strip(), example.question.strip()
        if not context:
            before, _, after = self.closed_book.partition("{question}")
            return Prompt(before + question + after, None, _range(before, question))
        before, _, rest = self.with_context.partition("{context}")
        between, _, after = rest.partition("{question}")
        opening = before + context + between
        text = opening + question + after
        return Prompt(text, _range(before, context), _range(opening, question))


FIGURE_10 = PromptTemplate(
    with_context="Based on the context below, output the correct answer for the following question.\n\n"
    "Context: {context}\n\nQuestion: {question}",
    closed_book="Output the correct answer for the following question.\n\nQuestion: {question}",
)
"""The paper's prompt (Figure 10); the closed-book form is its counterpart without a context."""

PLAIN_TEMPLATE = PromptTemplate(with_context="{context}\n\nQuestion: {question}", closed_book="Question: {question}")
"""Nothing but the context and the question, for models that follow no instructions."""

TEMPLATES: Mapping[str, PromptTemplate] = {"figure-10": FIGURE_10, "plain": PLAIN_TEMPLATE}
"""The templates that have a name."""


def template_named(name: str | Path) -> PromptTemplate:
    """The template of this name, or of a .json or .toml file that has its texts (`PromptTemplate`) by name.

    Raises MoELensError for any other name, and for a file that does not hold a template.
    """
    if str(name) in TEMPLATES:
        return TEMPLATES[str(name)]
    if not isinstance(name, (str, Path)) or Path(name).suffix not in (".json", ".toml"):
        raise MoELensError(
            f"a template is one of {', '.join(TEMPLATES)}, or a .json or .toml file with with_context, closed_book and "
            f"answer_cue; got {str(name)!r}"
        )
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
        told = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise MoELensError(f"cannot read a template from {path}: {error}") from None
    known = {field.name for field in fields(PromptTemplate)}
    texts = isinstance(told, dict) and all(isinstance(value, str) for value in told.values())
    if not texts or not {"with_context", "closed_book"} <= set(told) <= known:
        raise MoELensError(f"{path}: expected the texts with_context, closed_book and answer_cue; got {told!r:.200}")
    return PromptTemplate(**told)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _range(before: str, text: str) -> slice:
    return slice(len(before), len(before) + len(text))


@overload
def shift(span: slice, by: int) -> slice: ...
@overload
def shift(span: slice | None, by: int) -> slice | None: ...
def shift(span: slice | None, by: int) -> slice | None:
    """The span moved right; None stays None."""
    return None if span is None else slice(span.start + by, span.stop + by)
