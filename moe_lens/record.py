"""Record: what one batch of prompts showed inside a model."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.routing import Routing

CAPTURES = frozenset({"routing", "residual", "attention", "logits"})
Positions = Literal["all", "context", "question", "last"]
Spans = tuple[slice | None, ...]


@dataclass(frozen=True, eq=False)
class Record:
    """A left-padded batch, its spans (half-open slices in padded positions) and what was captured from it.

    ids: of the examples, one per row of the batch.
    input_ids, attention_mask: int64 [batch, pos]; the mask is 0 at pads.
    context_spans, question_spans: one per row, None where a prompt has none.
    answer_spans: per row every occurrence of every gold answer in the context.
    kept: the padded positions of which `residual`, `attention_rows` and `logits` have rows, int64 [row].
    routing: per MoE layer, at all positions, as the experts used it (after interventions).
    routing_before: per MoE layer as the router decided on the same input without interventions in that layer;
        the same object as in `routing` where no intervention acts on the layer.
    residual: per layer the residual stream after it, [batch, row, d_model].
    attention_rows: per layer the attention of the kept queries, [batch, head, row, pos].
    logits: [batch, row, vocab], None unless captured.
    """

    ids: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    context_spans: Spans
    question_spans: Spans
    answer_spans: tuple[tuple[slice, ...], ...]
    kept: Tensor
    routing: Mapping[int, Routing] = field(default_factory=dict)
    routing_before: Mapping[int, Routing] = field(default_factory=dict)
    residual: Mapping[int, Tensor] = field(default_factory=dict)
    attention_rows: Mapping[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None

    def position_mask(self, positions: Positions) -> Tensor:
        """Which positions count, bool [batch, pos]; never pads, and none of a row without such a span.

        positions: "all", "context", "question", or "last", the one that predicts the answer's first token.
        Raises MoELensError for another word.
        """
        return position_mask(self.attention_mask, self.context_spans, self.question_spans, positions)


def position_mask(attention_mask: Tensor, context: Spans, question: Spans, positions: Positions) -> Tensor:
    """`Record.position_mask` of a left-padded batch: bool [batch, pos] like `attention_mask`."""
    if positions not in get_args(Positions):
        raise MoELensError(f"positions must be one of {', '.join(get_args(Positions))}; got {positions!r}")
    if positions == "all":
        return attention_mask.bool()
    mask = torch.zeros_like(attention_mask, dtype=torch.bool)
    if positions == "last":
        mask[:, -1] = True  # prompts are padded on the left
        return mask
    for row, span in enumerate(context if positions == "context" else question):
        if span is not None:
            mask[row, span] = True
    return mask


def check_capture(capture: Collection[str]) -> None:
    """MoELensError unless all are among `CAPTURES`."""
    unknown = sorted(set(capture) - CAPTURES)
    if unknown:
        raise MoELensError(f"capture can name {', '.join(sorted(CAPTURES))}; got {', '.join(unknown)}")
