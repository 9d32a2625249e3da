"""Each prompt beside its twin without the context, in one batch: the next token is told from the logits of both."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from moe_lens.data import Encoded, Example, PromptTemplate, encode

Found = TypeVar("Found")


class LogitContrast(Protocol):
    """What logits with and without the context are made into."""

    def __call__(self, given: Tensor, alone: Tensor) -> Tensor:
        """The logits to go by, of those with the context and of those without it; all float32 [..., vocab]."""


class ContrastSteps(LogitsProcessor):
    """At each step of generation both halves of the batch, prompts and then their twins, get the contrast's logits.

    So both say the same token, and end together.
    """

    def __init__(self, contrast: LogitContrast) -> None:
        self.contrast = contrast

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.cat([self.contrast(*scores.chunk(2))] * 2)


def in_pairs(
    places: Sequence[int],
    prompts: Sequence[Encoded],
    twin: Callable[[int, Encoded], Encoded],
    run: Callable[[Sequence[int], Sequence[Encoded], bool], Sequence[Found]],
) -> list[Found]:
    """What `run` finds for each of the prompts: those that have a context with their twins behind them, others alone.

    run: given places, prompts and whether the second half are the twins of the first.
    """
    found: dict[int, Found] = {}
    for paired in (True, False):
        rows = [row for row, prompt in enumerate(prompts) if (prompt.context is not None) == paired]
        own, where = [prompts[row] for row in rows], [places[row] for row in rows]
        if paired:
            own, where = [*own, *(twin(place, prompt) for place, prompt in zip(where, own, strict=True))], where * 2
        if rows:
            found |= zip(rows, run(where, own, paired), strict=False)  # what the twins say is the same
    return [found[row] for row in range(len(prompts))]


def twin_of(
    example: Example | str, prompt: Encoded, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate
) -> Encoded:
    """The example's `prompt` asked without its context, with the same answer appended; its context has no tokens."""
    assert isinstance(example, Example), "a text has no context"
    asked = encode(replace(example, context=""), tokenizer, template=template)
    answer = prompt.input_ids[prompt.prompt_length :]
    whole = (*asked.input_ids, *answer)
    return replace(asked, input_ids=whole, context=slice(0, 0), thought=prompt.thought)
