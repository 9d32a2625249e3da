"""AnswerProbability: what each layer would answer, read through the logit lens."""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.data.encoding import IGNORED_LABEL
from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices, has_float64, on_cpu
from moe_lens.lens.needs import Needs
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import ExampleRows

Stream = Literal["residual", "moe_output"]


class AnswerProbability(ExampleRows):
    """Each example's probability of the gold answer after each layer, p of Eq. 12 (logit lens, Dar et al. 2023).

    project: [..., d_model] -> logits [..., vocab]. `lens.project_on_vocab` applies the final norm and the head (the
        usual logit lens); without the norm it is the paper's letter.
    stream: "residual", the residual stream after the layer, or "moe_output", what the MoE block adds to it.

    >>> [found] = lens.measure(examples, AnswerProbability(lens.project_on_vocab))
    >>> answer_probability_gain(base_table, found.table())     # APG per layer
    """

    key = ("layer", "tokens", "id")

    def __init__(self, project: Callable[[Tensor], Tensor], *, stream: Stream = "residual") -> None:
        if stream not in get_args(Stream):
            raise MoELensError(f"stream must be one of {', '.join(get_args(Stream))}; got {stream!r}")
        self.project, self.stream = project, stream
        super().__init__(Needs.of({stream}, "answer"), {"stream": stream})

    def rows(self, record: Record) -> pd.DataFrame:
        """Columns layer, tokens, id, probability, log_probability (nats).

        tokens: "first", the answer's first token, or "joint", all its tokens, each given those before it; the
        end-of-sequence after them does not count.
        """
        if record.labels is None:
            raise MoELensError("the record has no answers; ask for them with with_answer=True, positions='answer'")
        lengths = (record.labels != IGNORED_LABEL).sum(1) - 1  # [batch], without end-of-sequence
        steps = range(max(1, int(lengths.max())))
        places, present = record.kept_rows(steps)
        present &= torch.arange(len(steps)) < lengths[:, None]
        row = torch.arange(len(record.ids))[:, None].expand_as(places)[present]
        ids = OnDevices(record.labels[row, record.kept[places[present]] + 1][:, None])
        tokens = OnDevices(row * len(record.kept) + places[present])
        streams, chosen = getattr(record, self.stream), []
        for stream in streams.values():
            logits = self.project(tokens.of(stream.flatten(0, 1)))  # [token, vocab]
            precise = torch.float64 if has_float64(logits.device) else torch.float32
            chosen.append(logits.to(precise).log_softmax(-1).gather(-1, ids.on(logits.device))[:, 0])
        answered = (lengths > 0).numpy()
        parts = []
        for layer, log_probabilities in zip(streams, on_cpu(chosen), strict=True):
            each = torch.zeros(present.shape, dtype=torch.float64)
            each[present] = log_probabilities
            for which, found in (("first", each[:, 0]), ("joint", each.sum(1))):
                columns = {"layer": layer, "tokens": which, "id": list(record.ids)}
                values = {"probability": np.exp(found.numpy()), "log_probability": found.numpy()}
                parts.append(pd.DataFrame(columns | values)[answered])
        return pd.concat(parts, ignore_index=True)
