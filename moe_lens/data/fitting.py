"""Examples that fit a length in tokens: longer ones dropped or cut around their answer, and what that did, counted."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from moe_lens.data.encoding import Encoded, encode
from moe_lens.data.example import Example
from moe_lens.data.prompts import FIGURE_10, PromptTemplate
from moe_lens.data.words import occurrences
from moe_lens.errors import MoELensError

TooLong = Literal["drop", "truncate"]
TRIES = 50
"""How often a context is cut shorter before its example is dropped; two or three cuts are usual."""
EDGE = 20
"""How far, in characters, a cut moves inwards so as not to fall into a word."""


@dataclass(frozen=True)
class Fitted:
    """Examples that fit, and the ids of those that were changed or are special.

    dropped: too long, and left out. truncated: too long, and kept with a part of their context.
    without_answer: kept although none of their answers stands in their context; they have no answer span.
    bad: for each example that could not be encoded, and was left out as `skip_bad` says, its id and why.
    """

    examples: tuple[Example, ...]
    dropped: tuple[str, ...]
    truncated: tuple[str, ...]
    without_answer: tuple[str, ...]
    bad: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What a command line says of it."""
        count = len(self.examples) + len(self.dropped)
        said = f"{len(self.dropped)} of {count} examples dropped, {len(self.truncated)} truncated"
        return f"{said}; in {len(self.without_answer)} no answer stands in the context"

    def facts(self) -> dict[str, int]:
        """The counts, for the provenance of what is made of these examples."""
        return {"dropped": len(self.dropped), "truncated": len(self.truncated)}


def fit_length(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    too_long: TooLong = "drop",
    template: PromptTemplate = FIGURE_10,
    with_answer: bool = False,
    skip_bad: bool = False,
) -> Fitted:
    """The examples whose prompts have at most `max_length` tokens (any number for None), in their order.

    too_long: "drop" leaves the others out; "truncate" cuts their context to a stretch around the first place where
        an answer stands (its beginning where none does), at a space where one is near, and leaves out only those
        that are too long even so.
    with_answer: the answer that training appends counts too.
    skip_bad: leave out examples that the tokenizer cannot encode with exact spans.

    Every example is rendered and tokenised here, so one that cannot be fails before a model has run.
    Raises MoELensError for such an example, by its id, and if none is left.
    """
    if too_long not in get_args(TooLong):
        raise MoELensError(f"too_long must be one of {', '.join(get_args(TooLong))}; got {too_long!r}")
    if max_length is not None and max_length < 1:
        raise MoELensError(f"max_length is a number of tokens, at least 1; got {max_length}")
    encoded_as = partial(encode, tokenizer=tokenizer, template=template, with_answer=with_answer)
    kept: list[Example] = []
    dropped, truncated, without_answer, bad = list[str](), list[str](), list[str](), list[str]()
    for example in examples:
        try:
            encoded = encoded_as(example)
        except MoELensError as error:
            bad.append(f"example {example.id!r} cannot be encoded: {error}")
            if not skip_bad:
                raise MoELensError(bad[0]) from None
            continue
        if max_length is not None and len(encoded.input_ids) > max_length:
            shorter = _truncated(example, max_length, encoded_as) if too_long == "truncate" else None
            (dropped if shorter is None else truncated).append(example.id)
            if shorter is None:
                continue
            example, encoded = shorter, encoded_as(shorter)
        kept.append(example)
        if encoded.context is not None and not encoded.answer_spans:
            without_answer.append(example.id)
    if not kept and bad:
        raise MoELensError(f"no example is left; {bad[0]}")
    if not kept:
        raise MoELensError(f"no example is left: all {len(dropped)} have more than {max_length} tokens")
    return Fitted(tuple(kept), tuple(dropped), tuple(truncated), tuple(without_answer), tuple(bad))


def _truncated(example: Example, max_length: int, encoded_as: Callable[[Example], Encoded]) -> Example | None:
    """The example with as much of its context as fits; None if not even an answer does."""
    context = example.context.strip()
    encoded = encoded_as(example)
    if encoded.context is None:
        return None
    answer = next(iter(occurrences(example.answers, context)), slice(0, 0))
    used = encoded.context.stop - encoded.context.start
    room = max_length - (len(encoded.input_ids) - used)
    width = len(context)
    for _ in range(TRIES):
        if room < 1 or width <= max(1, answer.stop - answer.start):
            return None
        width = min(width - 1, width * room // used)
        stretch = _stretch(context, answer, max(width, answer.stop - answer.start))
        if not stretch:
            return None
        shorter = replace(example, context=stretch)
        encoded = encoded_as(shorter)
        if len(encoded.input_ids) <= max_length:
            return shorter
        used = max(1, room + len(encoded.input_ids) - max_length)
    return None


def _stretch(context: str, answer: slice, width: int) -> str:
    """About `width` characters of the context with the answer in their middle, cut at spaces where these are near."""
    start = min((answer.start + answer.stop - width) // 2, len(context) - width)
    start = max(0, start)
    stop = start + width
    if 0 < start < answer.start and not context[start - 1].isspace():
        highest = min(start + EDGE, answer.start)
        start = next((place for place in range(start, highest) if context[place].isspace()), start)
    if answer.stop < stop < len(context) and not context[stop].isspace():
        lowest = max(stop - EDGE, answer.stop, start + 1)
        stop = next((place for place in range(stop - 1, lowest - 1, -1) if context[place].isspace()), stop)
    return context[start:stop].strip()
