"""Which positions of a batch are meant: a word such as "context", or steps counted from the prompt's last token."""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_lens.data.encoding import IGNORED_LABEL
from moe_lens.errors import MoELensError

Word = Literal["all", "prompt", "context", "question", "from_question", "last", "thought", "answer", "decode"]
Positions = Word | tuple[int, ...]
"""What `position_mask` takes."""
Spans = tuple[slice | None, ...]
Thoughts = Sequence[int | None]
"""Of each row how many tokens after the prompt come before the answer proper; None where nobody said what tells it."""
THINKING = 2**31
"""More tokens than any thought has: of a row whose answer proper has not begun."""
SPANNED = ("context", "question", "from_question")
"""The words for positions that need a span of the prompt."""
STEPS_OF_ANSWERS = ("decode", "thought", "answer")
"""The words for positions that are there only where an answer, or a continuation, is appended."""


def check_positions(positions: Positions) -> None:
    """MoELensError unless it is one of the words or a tuple of different steps."""
    if isinstance(positions, tuple):
        if not positions or len(set(positions)) != len(positions) or not all(type(step) is int for step in positions):
            raise MoELensError(f"steps must be one or more different whole numbers, such as (0, 1); got {positions}")
    elif positions not in get_args(Word):
        raise MoELensError(
            f"positions must be one of {', '.join(get_args(Word))}, or a tuple of steps such as (0, 1); "
            f"got {positions!r}"
        )


def in_the_answer(positions: Positions) -> bool:
    """Whether positions lie in what is appended to the prompt, in part at least."""
    return any(step > 0 for step in positions) if isinstance(positions, tuple) else positions in STEPS_OF_ANSWERS


def any_position_mask(
    attention_mask: Tensor,
    context: Spans,
    question: Spans,
    several: Iterable[Positions],
    labels: Tensor | None = None,
    thoughts: Thoughts = (),
) -> Tensor:
    """Which positions of a batch count for any of `several`, bool [batch, pos]; see `position_mask`."""
    mask = torch.zeros_like(attention_mask, dtype=torch.bool)
    for positions in several:
        mask |= position_mask(attention_mask, context, question, positions, labels, thoughts)
    return mask


def position_mask(
    attention_mask: Tensor,
    context: Spans,
    question: Spans,
    positions: Positions,
    labels: Tensor | None = None,
    thoughts: Thoughts = (),
) -> Tensor:
    """Which positions of a left-padded batch count, bool [batch, pos]; never pads.

    attention_mask: int64 [batch, pos], 0 at pads. labels: int64 [batch, pos], `IGNORED_LABEL` but for the tokens of an
    appended answer and its end-of-sequence; None where none was appended. thoughts: one per row, or none at all.

    positions: "all"; "prompt", all before the answer (prefill); "context"; "question"; "from_question", from the
        question's first token to the end, an answer included; "last", the prompt's last token, which predicts the
        answer's first; "decode", the answer's tokens as generation would feed them one by one, so without
        end-of-sequence; "answer", last and decode: whatever predicts one of the answer's tokens; where the template
        says what an answer comes after (`answer_after`), these are parted into "thought", whatever predicts a token of
        what comes before it, and "answer"; or steps, a tuple such as (-1, 0, 1): 0 is the last position, above are
        decoding steps, below lie in the prompt.
    A row without such a span or so many tokens has none. Raises MoELensError for anything else.
    """
    check_positions(positions)
    if positions == "all":
        return attention_mask.bool()
    if positions in ("context", "question"):
        return _inside(context if positions == "context" else question, attention_mask)
    steps = steps_of(attention_mask, labels)
    feeding = attention_mask.bool() & (steps < _lengths(attention_mask, labels)[:, None].clamp(min=1))
    if positions == "from_question":
        return feeding & _inside([span and slice(span.start, None) for span in question], attention_mask)
    if isinstance(positions, tuple):
        return feeding & torch.isin(steps, torch.tensor(positions, device=steps.device))
    if positions in ("thought", "answer"):
        return feeding & (steps >= 0) & predicting(steps, positions, thoughts)
    return feeding & {"prompt": steps <= 0, "last": steps == 0, "decode": steps > 0}[positions]


def predicting(steps: Tensor, positions: Positions, thoughts: Thoughts) -> Tensor:
    """Which of the steps, int64 [batch, pos], predict a token of the "thought", or of the "answer" proper, bool.

    MoELensError for a thought where nobody said what an answer comes after.
    """
    if positions == "thought" and (None in thoughts or not thoughts):
        raise MoELensError(
            "positions 'thought' end where the answer proper begins, and nobody said what tells it: give a template "
            "with answer_after (--answer-after), such as '####'"
        )
    begins = torch.tensor([one or 0 for one in thoughts] or [0], device=steps.device)[:, None]
    return (steps < begins) if positions == "thought" else (steps >= begins)


def step_positions(attention_mask: Tensor, labels: Tensor | None, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where each row's steps are, int64 [batch, step], and whether the row has them, bool [batch, step].

    Where a row lacks a step, its position is that of the prompt's last token.
    """
    last = _last_of_prompt(attention_mask, labels)[:, None]
    wanted = torch.tensor(steps, device=attention_mask.device)
    positions = last + wanted
    inside = (positions >= 0) & (wanted < _lengths(attention_mask, labels)[:, None].clamp(min=1))
    positions = torch.where(inside, positions, last)
    present = inside & attention_mask.gather(1, positions).bool()
    return torch.where(present, positions, last), present


def _inside(spans: Sequence[slice | None], attention_mask: Tensor) -> Tensor:
    """Which positions lie in each row's span, bool [batch, pos]."""
    mask = torch.zeros_like(attention_mask, dtype=torch.bool)
    for row, span in enumerate(spans):
        if span is not None:
            mask[row, span] = True
    return mask


def _last_of_prompt(attention_mask: Tensor, labels: Tensor | None) -> Tensor:
    """The position of each prompt's last token, int64 [batch]; the padding is on the left, so answers are last."""
    return attention_mask.shape[1] - 1 - _lengths(attention_mask, labels)


def _lengths(attention_mask: Tensor, labels: Tensor | None) -> Tensor:
    """Tokens after each prompt, end-of-sequence included, int64 [batch]."""
    if labels is None:
        return torch.zeros(len(attention_mask), dtype=torch.int64, device=attention_mask.device)
    return (labels != IGNORED_LABEL).sum(1)


def steps_of(attention_mask: Tensor, labels: Tensor | None) -> Tensor:
    """Each position as a step counted from its prompt's last token, int64 [batch, pos]."""
    every = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return every - _last_of_prompt(attention_mask, labels)[:, None]
