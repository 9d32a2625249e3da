"""Prompt templates: an example as the text a model reads, and where its context and question stand in it."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from moe_lens.data.example import Example
from moe_lens.errors import MoELensError


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    text: what is tokenised.
    context, question: their character ranges in `text`; `context` is None for a closed-book question.
    chat: whether a chat template rendered it, special tokens included.
    answer_lead: what stands between the prompt and an answer, such as a space.
    """

    text: str
    context: slice | None
    question: slice
    chat: bool
    answer_lead: str = " "


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

    def render(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The prompt for a model: one user turn of its chat template, or plain text with the answer cue.

        Whitespace around the context and around the question is dropped.
        Raises MoELensError if the chat template does not repeat the user's turn letter by letter.
        """
        message = self._fill(example)
        if not tokenizer.chat_template:
            return Prompt(message.text + self.answer_cue, message.context, message.question, chat=False)
        turn = [{"role": "user", "content": message.text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        start = text.find(message.text)
        if start < 0:
            raise MoELensError(
                "the tokenizer's chat template changes the user's text, so context is nowhere to be found; "
                "set tokenizer.chat_template to one that keeps it, or to None for plain text"
            )
        lead = _answer_lead(tokenizer, turn, text)
        context, question = shift(message.context, start), shift(message.question, start)
        return Prompt(text, context, question, chat=True, answer_lead=lead)

    def _fill(self, example: Example) -> Prompt:
        context, question = example.context.strip(), example.question.strip()
        if not context:
            before, _, after = self.closed_book.partition("{question}")
            return Prompt(before + question + after, None, _range(before, question), chat=False)
        before, _, rest = self.with_context.partition("{context}")
        between, _, after = rest.partition("{question}")
        opening = before + context + between
        text = opening + question + after
        return Prompt(text, _range(before, context), _range(opening, question), chat=False)


FIGURE_10 = PromptTemplate(
    with_context="Based on the context below, output the correct answer for the following question.\n\n"
    "Context: {context}\n\nQuestion: {question}",
    closed_book="Output the correct answer for the following question.\n\nQuestion: {question}",
)
"""The paper's prompt (Figure 10); the closed-book form is its counterpart without a context."""


def _answer_lead(tokenizer: PreTrainedTokenizerBase, turn: list[dict[str, str]], prompt: str) -> str:
    """What a chat template writes between its generation prompt and the answer.

    Empty for a template that writes a finished turn in another way than it asks for one, for example because
    it leaves a line of thought out of it.
    """
    answer = "ANSWER"
    finished = tokenizer.apply_chat_template([*turn, {"role": "assistant", "content": answer}], tokenize=False)
    rest = finished.removeprefix(prompt)
    return rest[: rest.find(answer)] if len(rest) < len(finished) and answer in rest else ""


def _range(before: str, text: str) -> slice:
    return slice(len(before), len(before) + len(text))


def shift(span: slice | None, by: int) -> slice | None:
    """The span moved right; None stays None."""
    return None if span is None else slice(span.start + by, span.stop + by)
