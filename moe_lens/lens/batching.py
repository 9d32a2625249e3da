"""Examples as batches of prompts of similar length, in bounded memory, halved where the device's is too small."""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import islice, zip_longest
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from moe_lens.data import Encoded, Example, PromptTemplate, collate, encode
from moe_lens.data.offsets import token_ids
from moe_lens.errors import MoELensError
from moe_lens.lens.positions import Positions, in_the_answer, position_mask
from moe_lens.progress import progress_bar

BATCHES_PER_WINDOW = 64
Found = TypeVar("Found")


def prompt_batches(
    examples: Iterable[Example | str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: PromptTemplate,
    batch_size: int,
    progress: bool,
    with_answer: bool = False,
    continuations: Iterable[str] | None = None,
) -> Iterator[tuple[tuple[int, ...], list[Encoded]]]:
    """Batches of encoded examples, each with its examples' places in the input, under a progress bar.

    Reads `BATCHES_PER_WINDOW` batches ahead and gives these from the longest prompts to the shortest (equally
    long ones in their given order), so that a batch has few pads and memory does not grow with the data set.
    with_answer: append each example's first gold answer, for which there have to be examples, not bare texts.
    continuations: texts to append instead, one per example.
    Raises MoELensError for a batch size below 1, for a text without tokens, and unless there is one continuation for
    each example.
    """
    if isinstance(examples, str | Example):
        raise MoELensError(f"expected a list of examples or texts; put the one that came into a list: [{examples!r}]")
    if batch_size < 1:
        raise MoELensError(f"a batch has at least 1 example; got batch_size={batch_size}")
    total = len(examples) if isinstance(examples, Sized) else None
    prompts = (
        encode_prompt(place, example, tokenizer, template=template, with_answer=with_answer, continuation=text)
        for place, (example, text) in enumerate(_with_continuations(examples, continuations))
    )
    numbered = enumerate(prompts)
    with progress_bar(total=total, unit="example", disable=not progress) as bar:
        while window := list(islice(numbered, batch_size * BATCHES_PER_WINDOW)):
            window.sort(key=lambda item: -len(item[1].input_ids))
            for start in range(0, len(window), batch_size):
                places, chosen = zip(*window[start : start + batch_size], strict=True)
                yield places, list(chosen)
                bar.update(len(chosen))


def encode_prompt(
    place: int,
    example: Example | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: PromptTemplate,
    with_answer: bool = False,
    continuation: str | None = None,
) -> Encoded:
    """An example as tokens; a bare text is taken as it is, without spans and with its place as id.

    continuation: a text to append, with end-of-sequence; see `encode`.
    """
    _expect_prompt(example, place)
    if isinstance(example, Example):
        return encode(example, tokenizer, template=template, with_answer=with_answer, continuation=continuation)
    if with_answer:
        raise MoELensError(f"text {place} has no answer; expected an Example with a context, question and answers")
    ids = tuple(token_ids(example, tokenizer, add_special_tokens=True))
    if not ids:
        raise MoELensError(f"text {place} has no tokens; give it some words")
    return Encoded(
        id=str(place),
        text=example,
        input_ids=(*ids, *(() if continuation is None else _followed_by(continuation, tokenizer))),
        context=None,
        question=None,
        answer_spans=(),
        prompt_length=len(ids),
    )


def expect_places(
    positions: Positions,
    sets: Mapping[str, Sequence[Example]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: PromptTemplate,
) -> None:
    """MoELensError, before a model has run, for data, by name, of which no example has a token at these positions."""

    def has_any(example: Example) -> bool:
        prompt = encode(example, tokenizer, template=template, with_answer=in_the_answer(positions))
        batch = collate([prompt], pad_id=0)
        spans = batch.context_spans, batch.question_spans
        return bool(position_mask(batch.attention_mask, *spans, positions, batch.labels, batch.thoughts).any())

    for name, examples in sets.items():
        if examples and not any(map(has_any, examples)):
            named = positions if isinstance(positions, str) else ",".join(map(str, positions))
            raise MoELensError(
                f"no example of {name} has a token at the positions {named}, so nothing would be counted; leave {name} "
                "out, or take other positions, such as all"
            )


def _followed_by(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text that follows a bare one as it is, and end-of-sequence."""
    if tokenizer.eos_token_id is None:
        raise MoELensError("a continuation ends with end-of-sequence, which this tokenizer lacks; set its eos_token")
    return [*token_ids(text, tokenizer, add_special_tokens=False), tokenizer.eos_token_id]


def _expect_prompt(example: object, place: int) -> None:
    """MoELensError unless it is an example or a text."""
    if isinstance(example, str | Example):
        return
    hint = ""
    if isinstance(example, Mapping | list):
        hint = "; turn chat messages into text with tokenizer.apply_chat_template(messages, tokenize=False, …)"
    raise MoELensError(f"expected an Example or a text, got {type(example).__name__} at place {place}{hint}")


def _with_continuations(
    examples: Iterable[Example | str], continuations: Iterable[str] | None
) -> Iterator[tuple[Example | str, str | None]]:
    """Each example with its continuation, None for all where there are none; MoELensError for too few or many."""
    if continuations is None:
        yield from ((example, None) for example in examples)
        return
    for example, text in zip_longest(examples, continuations):
        if example is None or text is None:
            raise MoELensError("expected one continuation for each example; there are more of one than of the other")
        yield example, text


def run_batches(
    batches: Iterable[tuple[tuple[int, ...], list[Encoded]]],
    run: Callable[[Sequence[int], Sequence[Encoded]], Sequence[Found]],
) -> Iterator[tuple[int, Found]]:
    """What `run` finds for each example of the batches (places, prompts), with the example's place.

    Run in halves where memory is too small, as in `run_pieces`.
    """
    for places, found in run_pieces(batches, run):
        yield from zip(places, found, strict=True)


def run_pieces(
    batches: Iterable[tuple[tuple[int, ...], list[Encoded]]], run: Callable[[Sequence[int], Sequence[Encoded]], Found]
) -> Iterator[tuple[Sequence[int], Found]]:
    """What `run`, which is never None, finds for each of the batches (places, prompts), with the places.

    A batch that does not fit in memory is run again in halves, and so are all after it; a warning says so. What was
    found is not kept while the next is. Raises MoELensError if a single example does not fit.
    """
    size = None
    for places, prompts in batches:
        start, size = 0, size or len(places)
        while start < len(places):
            piece = slice(start, start + size)
            found = unless_out_of_memory(partial(run, places[piece], prompts[piece]))
            if found is not None:
                yield places[piece], found
                del found
                start += size
                continue
            longest = max(len(prompt.input_ids) for prompt in prompts[piece])
            tried = len(places[piece])
            if tried == 1:
                raise MoELensError(f"out of memory with a single example of {longest} tokens; shorten its context")
            size = tried // 2
            warnings.warn(
                f"out of memory with {tried} examples of up to {longest} tokens; going on with {size} at a time",
                stacklevel=3,
            )


def unless_out_of_memory(run: Callable[[], Found]) -> Found | None:
    """What `run` finds; None, with what it had allocated freed, if memory ran out."""
    try:
        return run()
    except RuntimeError as error:  # torch has a class of its own for accelerators only
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
    gc.collect()  # the failed run's tensors hang on its traceback
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return None
