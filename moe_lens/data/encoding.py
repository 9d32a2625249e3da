"""Examples as tokens: which tokens are context, question and answers, and left-padded batches of them."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from moe_lens.data.example import Example
from moe_lens.data.offsets import token_ids, tokenise
from moe_lens.data.prompts import FIGURE_10, Prompt, PromptTemplate, shift
from moe_lens.data.words import occurrences
from moe_lens.errors import MoELensError

IGNORED_LABEL = -100
"""The label that torch's and transformers' cross entropy leave out."""


@dataclass(frozen=True)
class Encoded:
    """One example as tokens. Spans are half-open slices of `input_ids`.

    text: the rendered prompt, without the answer.
    context: None for a closed-book question.
    answer_spans: every occurrence of every gold answer in the context, in rising order.
    prompt_length: tokens before the answer; the number of all tokens where no answer was appended.
    thought: how many tokens after the prompt come before the answer proper, as the template's `answer_after` says: up
        to the one that ends its first match, one more than all where there is none. None where the template says none.
    """

    id: str
    text: str
    input_ids: tuple[int, ...]
    context: slice | None
    question: slice | None
    answer_spans: tuple[slice, ...]
    prompt_length: int
    thought: int | None = None


@dataclass(frozen=True)
class Batch:
    """Left-padded examples; all spans are in padded positions.

    input_ids, attention_mask: int64 [batch, pos]; the mask is 0 at pads.
    labels: int64 [batch, pos], the answer's tokens and the end-of-sequence token at their own positions and
        `IGNORED_LABEL` elsewhere; None where no answers were appended.
    thoughts: of each row how many tokens after the prompt come before the answer proper; None where nobody said what
        tells it.
    """

    ids: tuple[str, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    context_spans: tuple[slice | None, ...]
    question_spans: tuple[slice | None, ...]
    answer_spans: tuple[tuple[slice, ...], ...]
    labels: torch.Tensor | None
    thoughts: tuple[int | None, ...] = ()

    def of_rows(self, rows: Sequence[int]) -> "Batch":
        """The batch of these rows alone, in their order."""
        of_each = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {
            name: part[list(rows)] if isinstance(part, torch.Tensor) else part and tuple(part[row] for row in rows)
            for name, part in of_each.items()
        }
        return Batch(**taken)

    @property
    def answer_labels(self) -> torch.Tensor:
        """The labels from the first position at which any row has one to the last, int64 [batch, pos].

        Raises MoELensError where no answers were appended.
        """
        if self.labels is None:
            raise MoELensError("expected examples that carry their answers; encode them with with_answer=True")
        return self.labels[:, int((self.labels != IGNORED_LABEL).any(dim=0).nonzero()[0]) :]


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: PromptTemplate = FIGURE_10,
    with_answer: bool = False,
    continuation: str | None = None,
) -> Encoded:
    """The example's prompt as tokens; `with_answer` appends the first gold answer and end-of-sequence.

    continuation: a text to append instead of the answer, with end-of-sequence; the spans stay those of the answers. One
        that begins with white space, as a generated text does, follows the prompt as it is; an empty one is
        end-of-sequence alone.

    A span holds every token that covers some of its characters: it decodes to its text, and to what else the tokens
    at its two ends hold, which mostly is the space before it. An answer, or a whole context, of which the tokenizer
    keeps nothing has no span.

    The prompt's tokens are the same with and without an answer appended. The answer's are those it has in the running
    text after the prompt, or, where it would change the prompt's tokens there, those it has apart.
    Raises MoELensError for a slow tokenizer that does not decode its tokens to the same text, for a question of which
    the tokenizer keeps nothing, or (`with_answer`) without end-of-sequence.
    """
    prompt = template.render(example, tokenizer)
    ids, offsets = tokenise(prompt.text, tokenizer, add_special_tokens=not prompt.rendered)
    question = offsets.tokens(prompt.question)
    if question is None:
        raise MoELensError(
            f"no token covers the question of example {example.id!r}; use a tokenizer that keeps all text, such as a "
            "byte-level one"
        )
    at = prompt.context
    golds = tuple(template.answered(gold) or gold for gold in example.answers)
    answers = [] if at is None else [shift(found, at.start) for found in occurrences(golds, prompt.text[at])]
    appended = example.answers[0] if with_answer and continuation is None else continuation
    answer_ids = [] if appended is None else _answer_ids(appended, prompt, ids, tokenizer)
    thought = None if not template.answer_after else thought_length(answer_ids, tokenizer, template)
    return Encoded(
        id=example.id,
        text=prompt.text,
        input_ids=(*ids, *answer_ids),
        context=None if at is None else offsets.tokens(at),
        question=question,
        answer_spans=tuple(span for answer in answers if (span := offsets.tokens(answer)) is not None),
        prompt_length=len(ids),
        thought=thought,
    )


def thought_length(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> int:
    """How many of the tokens after a prompt come before the answer proper: the fewest whose text holds a match.

    One more than all, end-of-sequence aside, where there is none: what comes next is still of the thought.
    """
    said = [token for token in ids if token != tokenizer.eos_token_id]
    return bisect_left(range(len(said) + 1), True, key=lambda count: answer_begun(said[:count], tokenizer, template))


def answer_begun(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> bool:
    """Whether the text of tokens after a prompt holds what the answer proper comes after."""
    text = cast(str, tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return template.answer_start(text) is not None


def collate(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """Encoded examples as one left-padded batch.

    Raises MoELensError for no examples, or if only some of them carry their answer.
    """
    with_answer = {len(e.input_ids) > e.prompt_length for e in encoded}
    if len(with_answer) != 1:
        raise MoELensError(f"expected examples that all carry their answer or all do not; got {len(encoded)} examples")
    width = max(len(e.input_ids) for e in encoded)
    shape = (len(encoded), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
    for row, example in enumerate(encoded):
        tokens = torch.tensor(example.input_ids)
        start = width - len(tokens)
        input_ids[row, start:] = tokens
        attention_mask[row, start:] = 1
        labels[row, start + example.prompt_length :] = tokens[example.prompt_length :]
    padded = [_shifted(example, width - len(example.input_ids)) for example in encoded]
    return Batch(
        ids=tuple(e.id for e in encoded),
        input_ids=input_ids,
        attention_mask=attention_mask,
        context_spans=tuple(e.context for e in padded),
        question_spans=tuple(e.question for e in padded),
        answer_spans=tuple(e.answer_spans for e in padded),
        labels=labels if with_answer == {True} else None,
        thoughts=tuple(e.thought for e in padded),
    )


def _answer_ids(
    answer: str, prompt: Prompt, prompt_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The tokens that follow the prompt's where the answer, with what leads up to it, does; and end-of-sequence.

    A continuation that has its white space already is led up to by nothing more.
    """
    if tokenizer.eos_token_id is None:
        raise MoELensError("answers end with end-of-sequence, which this tokenizer lacks; set its eos_token")
    if not answer:
        return [tokenizer.eos_token_id]
    text = answer if answer[0].isspace() else prompt.answer_lead + answer
    ids = token_ids(prompt.text + text, tokenizer, add_special_tokens=not prompt.rendered)
    if ids[: len(prompt_ids)] == prompt_ids:
        return [*ids[len(prompt_ids) :], tokenizer.eos_token_id]
    return [*token_ids(text, tokenizer, add_special_tokens=False), tokenizer.eos_token_id]


def _shifted(encoded: Encoded, start: int) -> Encoded:
    """The same example with its spans in the positions of a row that has `start` pads before it."""
    return replace(
        encoded,
        context=shift(encoded.context, start),
        question=shift(encoded.question, start),
        answer_spans=tuple(shift(span, start) for span in encoded.answer_spans),
    )
