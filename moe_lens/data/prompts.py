"""Prompt templates: an example as the text a model reads, and where its context and question stand in it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from moe_lens.data.chat import OWN_ARGUMENTS, Chat, turn
from moe_lens.data.example import Example
from moe_lens.errors import MoELensError


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt, which ends where the answer starts.

    text: what is tokenised.
    context, question: their character ranges in `text`; `context` is None for a closed-book question.
    rendered: whether a chat template made `text`, special tokens included.
    lead: the white space between `text` and an answer; None where a chat template does not go on with an answer.
    """

    text: str
    context: slice | None
    question: slice
    rendered: bool = False
    lead: str | None = " "

    @property
    def answer_lead(self) -> str:
        """The white space between the prompt and an answer; MoELensError where the template takes no answer."""
        if self.lead is None:
            raise MoELensError(
                "the tokenizer's chat template does not continue the prompt with the answer, so none can be "
                "trained on; set tokenizer.chat_template to one that does, or to None for plain text"
            )
        return self.lead


@dataclass(frozen=True)
class PromptTemplate:
    """How examples are asked.

    with_context: holds `{context}` and, after it, `{question}`.
    closed_book: holds `{question}` only; used where an example's context is blank.
    answer_cue: ends the prompt where the tokenizer has no chat template.
    system_prompt: the system turn before the question, none where it is empty. chat_template_kwargs: what a chat
        template takes beside the turns, such as {"enable_thinking": False}. Both are for tokenizers with such a one.
    bare_question: whether the question is put without its question mark, for templates that go on after it.
    unquoted_context: whether double quotes in the context are left out, for templates that put it in such.
    demonstrations: examples that are asked, and answered by their first answers, before each prompt, with a context or
        without; none of them before its own.
    answer_after: a regular expression after whose first match the answer proper begins in what follows the prompt,
        which is a thought until then; none where it is empty.
    """

    with_context: str
    closed_book: str
    answer_cue: str = "\n\nAnswer:"
    system_prompt: str = ""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    bare_question: bool = False
    unquoted_context: bool = False
    demonstrations: tuple[Example, ...] = ()
    answer_after: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.with_context.find("{context}") < self.with_context.find("{question}"):
            raise MoELensError(f"expected {{context}} and then {{question}}; got {self.with_context!r}")
        if "{question}" not in self.closed_book or "{context}" in self.closed_book:
            raise MoELensError(f"expected {{question}} and no {{context}}; got {self.closed_book!r}")
        if taken := sorted(self.chat_template_kwargs.keys() & OWN_ARGUMENTS):
            raise MoELensError(f"how a prompt is rendered is decided here; leave {', '.join(taken)} out")
        try:
            re.compile(self.answer_after)
        except (re.error, OverflowError, RecursionError) as error:
            raise MoELensError(
                f"answer_after is a regular expression; got {self.answer_after!r:.200}: {error}"
            ) from None
        for name, value in self.chat_template_kwargs.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise MoELensError(
                    f"chat_template_kwargs takes what JSON can say; got {name}={value!r:.80} ({error}): give it as text"
                ) from None

    def facts(self) -> dict[str, Any]:
        """What it says by name, for the provenance of what is made of such prompts; what not all have, where given.

        Of demonstrations how many there are, and a hash over all that is in them.
        """
        from moe_lens.results import data_digest

        told = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.demonstrations:
            told["demonstrations"] = data_digest(self.demonstrations)
        of_all = ("with_context", "closed_book", "answer_cue")
        return {name: value for name, value in told.items() if value or name in of_all}

    def answer_start(self, text: str) -> int | None:
        """Where in what follows a prompt the answer proper begins; None where `answer_after` is nowhere in it."""
        found = re.search(self.answer_after, text)
        return None if found is None else found.end()

    def answered(self, text: str) -> str | None:
        """What follows a prompt without what comes before the answer proper; None where that never begins."""
        start = self.answer_start(text)
        return None if start is None else text[start:].strip()

    def render(self, example: Example, tokenizer: "PreTrainedTokenizerBase") -> Prompt:
        """The prompt for a model: one user turn of its chat template, or plain text with the answer cue.

        What the chat template writes before an answer, such as an empty thought, belongs to the prompt; a thought that
        it only opens is closed. So what follows is the answer.
        Whitespace around the context, the question and a prompt is dropped; what is verbatim stays as it is.
        Raises MoELensError, with the example's id, if the chat template fails or does not repeat the user's turn letter
        by letter, and for a system prompt or arguments without a chat template.
        """
        if example.asked == "verbatim":
            text = example.question
            return Prompt(text, None, slice(0, len(text)), lead="" if text[-1].isspace() else " ")
        before, message = self._demonstrated(example), self._fill(example)
        message = Prompt(
            before + message.text, shift(message.context, len(before)), shift(message.question, len(before))
        )
        if not tokenizer.chat_template:
            if self.system_prompt or self.chat_template_kwargs:
                raise MoELensError(
                    "this tokenizer has no chat template that would take a system prompt or arguments; leave them out, "
                    "or write the text into a template of your own"
                )
            return message if example.asked == "prompt" else replace(message, text=message.text + self.answer_cue)
        turns = [turn("system", self.system_prompt)] if self.system_prompt else []
        chat = Chat(tokenizer, self.chat_template_kwargs, example.id)
        text, lead = chat.asked([*turns, turn("user", message.text)])
        start = text.rfind(message.text)
        if start < 0:
            raise MoELensError(
                "the tokenizer's chat template changes the user's text, so context is nowhere to be found; "
                "set tokenizer.chat_template to one that keeps it, or to None for plain text"
            )
        return Prompt(text, shift(message.context, start), shift(message.question, start), rendered=True, lead=lead)

    def _demonstrated(self, example: Example) -> str:
        """The demonstrations with their answers, as they stand before the example's own prompt."""
        shown = [one for one in self.demonstrations if (one.id, one.question) != (example.id, example.question)]
        return "".join(f"{self._fill(one).text}{self.answer_cue} {one.answers[0]}\n\n" for one in shown)

    def _fill(self, example: Example) -> Prompt:
        context, question = example.context.strip(), example.question.strip()
        if example.asked == "prompt":
            return Prompt(question, None, slice(0, len(question)))
        if self.bare_question:
            question = question.removesuffix("?").rstrip() or question
        if self.unquoted_context:
            context = context.replace('"', "").strip()
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


def _range(before: str, text: str) -> slice:
    return slice(len(before), len(before) + len(text))


@overload
def shift(span: slice, by: int) -> slice: ...
@overload
def shift(span: slice | None, by: int) -> slice | None: ...
def shift(span: slice | None, by: int) -> slice | None:
    """The span moved right; None stays None."""
    return None if span is None else slice(span.start + by, span.stop + by)
