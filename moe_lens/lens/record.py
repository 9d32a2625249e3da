"""Record: what one batch of prompts showed inside a model."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.positions import Positions, Spans, position_mask, step_positions
from moe_lens.routing import Routing

CAPTURES = frozenset({"routing", "expert_outputs", "residual", "moe_output", "attention", "logits"})


@dataclass(frozen=True, eq=False)
class Record:
    """A left-padded batch, its spans (half-open slices in padded positions) and what was captured from it.

    ids: of the examples, one per row of the batch.
    input_ids, attention_mask: int64 [batch, pos]; the mask is 0 at pads.
    context_spans, question_spans: one per row, None where a prompt has none.
    answer_spans: per row every occurrence of every gold answer in the context.
    kept: the padded positions that `expert_outputs`, `residual`, `moe_output`, `attention_rows` and `logits` have rows
        of, int64 [row].
    routing: per MoE layer, at all positions, as the experts used it (after interventions).
    routing_before: per MoE layer as the router decided on the same input without interventions in that layer;
        the same object as in `routing` where no intervention acts on the layer.
    expert_outputs: per MoE layer what each selected expert made of its token, before its gating weight,
        [batch, row, k, d_model]; slots as in `routing[layer].indices[:, kept]`.
    residual: per layer the residual stream after it, [batch, row, d_model].
    moe_output: per MoE layer what its block gives, shared experts included, [batch, row, d_model].
    attention_rows: per layer the attention of the kept queries, [batch, head, row, pos].
    logits: [batch, row, vocab], None unless captured.
    labels: int64 [batch, pos], an appended answer's tokens and end-of-sequence at their own positions, elsewhere
        `IGNORED_LABEL`; None unless answers were appended.
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
    expert_outputs: Mapping[int, Tensor] = field(default_factory=dict)
    residual: Mapping[int, Tensor] = field(default_factory=dict)
    moe_output: Mapping[int, Tensor] = field(default_factory=dict)
    attention_rows: Mapping[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    labels: Tensor | None = None

    def position_mask(self, positions: Positions) -> Tensor:
        """Which positions count, bool [batch, pos]; never pads, and none of a row without such a span.

        positions: "all", "prompt", "context", "question", "last", "answer", "decode", or a tuple of steps counted from
            the prompt's last token, as in `moe_lens.lens.positions.position_mask`.
        Raises MoELensError for anything else.
        """
        return position_mask(self.attention_mask, self.context_spans, self.question_spans, positions, self.labels)

    def kept_mask(self, positions: Positions) -> Tensor:
        """Which rows of what was captured count, bool [batch, row]; MoELensError for positions that were not kept."""
        mask = self.position_mask(positions)
        kept = mask[:, self.kept]
        if kept.sum() != mask.sum():
            raise MoELensError(f"the record did not keep all positions {positions!r}; ask for positions={positions!r}")
        return kept

    def kept_rows(self, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Where each row's steps are along `row` of what was captured, int64 [batch, step], and which rows have them.

        steps: counted from the prompt's last token, as in `position_mask`. The second is bool [batch, step];
        where it is False the place is that of another step. Raises MoELensError for a position that was not kept.
        """
        positions, present = step_positions(self.attention_mask, self.labels, steps)
        places = torch.searchsorted(self.kept, positions).clamp(max=len(self.kept) - 1)
        if not torch.equal(self.kept[places][present], positions[present]):
            raise MoELensError(
                f"the record did not keep the positions of steps {tuple(steps)}; ask for positions={tuple(steps)}"
            )
        return places, present


def check_capture(capture: Collection[str]) -> None:
    """MoELensError unless all are among `CAPTURES`."""
    unknown = sorted(set(capture) - CAPTURES)
    if unknown:
        raise MoELensError(f"capture can name {', '.join(sorted(CAPTURES))}; got {', '.join(unknown)}")
