"""Prompt templates: an example as the text a model reads, and where its context and question stand in it."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
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
    """

    with_context: str
    closed_book: str
    answer_cue: str = "\n\nAnswer:"
    system_prompt: str = ""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not 0 <= self.with_context.find("{context}") < self.with_context.find("{question}"):
            raise MoELensError(f"expected {{context}} and then {{question}}; got {self.with_context!r}")
        if "{question}" not in self.closed_book or "{context}" in self.closed_book:
            raise MoELensError(f"expected {{question}} and no {{context}}; got {self.closed_book!r}")
        if taken := sorted(self.chat_template_kwargs.keys() & OWN_ARGUMENTS):
            raise MoELensError(f"how a prompt is rendered is decided here; leave {', '.join(taken)} out")
        for name, value in self.chat_template_kwargs.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise MoELensError(
                    f"chat_template_kwargs takes what JSON can say; got {name}={value!r:.80} ({error}): give it as text"
                ) from None

    def facts(self) -> dict[str, Any]:
        """Its texts by name, for the provenance of what is made of such prompts; those for chats only where given."""
        of_chat = ("system_prompt", "chat_template_kwargs")
        return {name: value for name, value in asdict(self).items() if value or name not in of_chat}

    def render(self, example: Example, tokenizer: "PreTrainedTokenizerBase") -> Prompt:
        """The prompt for a model: one user turn of its chat template, or plain text with the answer cue.

        What the chat template writes before an answer, such as an empty thought, belongs to the prompt; a thought that
        it only opens is closed. So what follows is the answer.
        Whitespace around the context and around the question is dropped.
        Raises MoELensError, with the example's id, if the chat template fails or does not repeat the user's turn letter
        by letter, and for a system prompt or arguments without a chat template.
        """
        message = self._fill(example)
        if not tokenizer.chat_template:
            if self.system_prompt or self.chat_template_kwargs:
                raise MoELensError(
                    "this tokenizer has no chat template that would take a system prompt or arguments; leave them out, "
                    "or write the text into a template of your own"
                )
            return replace(message, text=message.text + self.answer_cue)
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

BARE_TEMPLATE = PromptTemplate(with_context="{context}\n\n{question}", closed_book="{question}", answer_cue="")
"""The example's own words alone, for prompts that are no questions."""

TEMPLATES: Mapping[str, PromptTemplate] = {"figure-10": FIGURE_10, "plain": PLAIN_TEMPLATE, "bare": BARE_TEMPLATE}
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
    kinds = {"chat_template_kwargs": dict}
    texts = isinstance(told, dict) and all(isinstance(value, kinds.get(name, str)) for name, value in told.items())
    if not texts or not {"with_context", "closed_book"} <= set(told) <= known:
        raise MoELensError(
            f"{path}: expected the texts with_context, closed_book and answer_cue, and for chats system_prompt and a "
            f"table of chat_template_kwargs; got {told!r:.200}"
        )
    return PromptTemplate(**told)


def _range(before: str, text: str) -> slice:
    return slice(len(before), len(before) + len(text))


@overload
def shift(span: slice, by: int) -> slice: ...
@overload
def shift(span: slice | None, by: int) -> slice | None: ...
def shift(span: slice | None, by: int) -> slice | None:
    """The span moved right; None stays None."""
    return None if span is None else slice(span.start + by, span.stop + by)
