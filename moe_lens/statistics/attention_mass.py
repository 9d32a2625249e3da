"""AttentionMass: how much chosen positions attend to the context, the answer, and other parts of a prompt."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices, on_cpu
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import check_positions
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import ExampleRows

Target = Literal["context", "answer", "question", "first", "sink"]


class AttentionMass(ExampleRows):
    """Each example's attention from chosen positions to parts of its prompt: alpha of Eqs. 9 and 10.

    targets, what is attended to: "context"; "answer", the tokens of all occurrences of gold answers in the context;
        "question"; "first", the prompt's first token; "sink", what a model gives to no token at all (its rows then sum
        to less than 1).
    steps, what attends, counted from the prompt's last token: 0 is that token (Eq. 9, the default), 1, 2, … are the
        decoding steps after it (in the gold answer, or in `continuations`), and negative ones lie in the prompt.

    All heads are kept. `table()` averages over them as Eq. 9 does, `table(heads=...)` over some, and `head_table()`
    has each. An example without such a target or step has no rows for it.

    >>> [mass] = lens.measure(examples, AttentionMass())
    >>> attention_gain(base_table, mass.table())     # CAG and AAG per layer
    """

    key = ("layer", "step", "target", "id", "head")

    def __init__(self, targets: Sequence[Target] = ("context", "answer"), *, steps: Sequence[int] = (0,)) -> None:
        self.targets, self.steps = tuple(targets), tuple(steps)
        unknown = set(self.targets) - set(get_args(Target))
        if unknown or not self.targets:
            raise MoELensError(f"targets must be among {', '.join(get_args(Target))}; got {self.targets}")
        check_positions(self.steps)
        super().__init__(Needs.of({"attention"}, self.steps), {"targets": self.targets, "steps": self.steps})

    def table(self, *, heads: Mapping[int, Sequence[int]] | None = None) -> pd.DataFrame:
        """One row per example, layer, step and target: layer, step, target, id, mass (the mean over heads).

        heads: layer -> the heads to average over, in these layers only; by default all. Raises MoELensError for heads
        that the model lacks, or if no example has a target.
        """
        return average_heads(self.head_table(), heads=heads)

    def head_table(self) -> pd.DataFrame:
        """One row per example, layer, step, target and head: layer, step, target, id, head, mass."""
        return super().table()

    def rows(self, record: Record) -> pd.DataFrame:
        masks, present = target_masks(record, self.targets)
        _, there = record.kept_rows(self.steps)
        measured = (there[:, :, None] & present[:, None, :]).numpy()  # [batch, step, target]
        targets = OnDevices(masks.float())
        by_layer = [self._mass(attention, targets) for _, attention in attention_at(record, self.steps)]
        parts = []
        for layer, mass in zip(record.attention_rows, on_cpu(by_layer), strict=True):
            batch, step, target, head = (axis.ravel() for axis in np.indices(mass.shape))
            rows = pd.DataFrame(
                {
                    "layer": layer,
                    "step": np.array(self.steps)[step],
                    "target": np.array(self.targets)[target],
                    "id": np.array(record.ids, dtype=object)[batch],
                    "head": head,
                    "mass": mass.flatten().numpy().astype(np.float64),
                }
            )
            parts.append(rows[measured[batch, step, target]])
        return pd.concat(parts, ignore_index=True)

    def _mass(self, attention: Tensor, masks: OnDevices) -> Tensor:
        """The mass [batch, step, target, head] of attention [batch, head, step, pos]; masks: [batch, target, pos]."""
        mass = torch.einsum("bhsp,btp->bsth", attention, masks.on(attention.device))
        if "sink" in self.targets:
            mass[:, :, self.targets.index("sink")] = 1 - attention.sum(-1).transpose(1, 2)
        return mass


def average_heads(head_table: pd.DataFrame, *, heads: Mapping[int, Sequence[int]] | None = None) -> pd.DataFrame:
    """The mass of `AttentionMass.head_table` averaged over heads (Eq. 9): layer, step, target, id, mass.

    heads: layer -> the heads that count, in these layers only; by default all. MoELensError for ones that are missing.
    """
    chosen = head_table
    if heads is not None:
        wanted = pd.MultiIndex.from_tuples([(layer, head) for layer, own in heads.items() for head in own])
        there = pd.MultiIndex.from_frame(head_table[["layer", "head"]])
        if missing := sorted(set(wanted) - set(there)):
            raise MoELensError(f"the table has no such (layer, head): {missing}")
        chosen = head_table[there.isin(wanted)]
    table = chosen.groupby(["layer", "step", "target", "id"], as_index=False)["mass"].mean()
    table.attrs = dict(head_table.attrs)
    return table


def attention_at(record: Record, steps: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Per layer: its number and the attention of the steps [batch, head, step, pos]; `Record.kept_rows` says whose.

    Raises MoELensError if the record did not keep these positions, or for attention to more than positions.
    """
    places = OnDevices(record.kept_rows(steps)[0])
    for layer, rows in record.attention_to_positions().items():
        if not rows.shape[2]:  # nobody has any of the steps
            rows = rows.new_zeros(*rows.shape[:2], 1, rows.shape[3])
        index = places.on(rows.device)[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
        yield layer, rows.gather(2, index).float()


def target_masks(record: Record, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Which tokens each target is, bool [batch, target, pos], and which rows have it, bool [batch, target]."""
    masks = torch.zeros(len(record.ids), len(targets), record.input_ids.shape[1], dtype=torch.bool)
    for place, target in enumerate(targets):
        for row in range(len(record.ids)):
            for span in _target_spans(record, target, row):
                masks[row, place, span] = True
    present = masks.any(-1)
    if "sink" in targets:
        present[:, targets.index("sink")] = True
    return masks, present


def _target_spans(record: Record, target: Target, row: int) -> tuple[slice, ...]:
    if target == "answer":
        return record.answer_spans[row]
    if target == "first":
        start = int(record.starts[row])
        return (slice(start, start + 1),)
    spans = {"context": record.context_spans, "question": record.question_spans}.get(target)
    span = None if spans is None else spans[row]
    return () if span is None else (span,)
