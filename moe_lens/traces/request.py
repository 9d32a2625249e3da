"""Request: what an engine says of one prompt and its answer, checked: their tokens, and the experts of each token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from moe_lens.data.encoding import IGNORED_LABEL
from moe_lens.data.prompts import shift
from moe_lens.errors import MoELensError
from moe_lens.lens.record import UNTOLD, Record
from moe_lens.routing import Routing, TracedRouting


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt, what was generated after it, and which experts each token that was run selected.

    tokens: ids of the prompt and of what was generated; `UNTOLD` where the trace does not tell them.
    prompt_length: how many of them are the prompt's.
    layers: the MoE layers told, absolute, in rising order.
    experts: [token, layer, k], of the first tokens: all but the last one that was generated, which no engine runs,
        or all.
    weights: their gating weights [token, layer, k], None where the trace does not tell them.
    margins: [token, layer], the lowest router logit of a selected expert minus the highest of another; None as above.
    context, question, answer_spans: where these are among the tokens, known once examples are.
    """

    id: str
    tokens: tuple[int, ...]
    prompt_length: int
    layers: tuple[int, ...]
    experts: np.ndarray
    n_experts: int
    weights: np.ndarray | None = None
    margins: np.ndarray | None = None
    context: slice | None = None
    question: slice | None = None
    answer_spans: tuple[slice, ...] = ()

    def __post_init__(self) -> None:
        self._expect_shape()
        self._expect_experts()
        smallest = np.uint8 if self.n_experts <= 256 else np.uint16
        object.__setattr__(self, "experts", self.experts.astype(smallest))

    @property
    def told(self) -> int:
        """How many of the tokens have experts."""
        return len(self.experts)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return self.tokens[: self.prompt_length]

    def prompt_alone(self) -> "Request":
        """The same without what was generated."""
        names, kept = ("experts", "weights", "margins"), slice(None, self.prompt_length)
        held = {name: getattr(self, name) for name in names}
        cut: dict[str, Any] = {name: None if part is None else part[kept] for name, part in held.items()}
        return replace(self, tokens=self.prompt, **cut)

    def _expect_shape(self) -> None:
        """MoELensError unless each token that is run has its experts."""
        if self.experts.ndim != 3 or self.experts.dtype.kind not in "iu":
            raise MoELensError(
                f"request {self.id!r}: expected the experts as whole numbers [token, layer, k]; got "
                f"{self.experts.dtype} {list(self.experts.shape)}"
            )
        total, said = len(self.tokens), len(self.tokens) - self.prompt_length
        if not self.prompt_length or self.told not in ({total - 1, total} if said else {total}):
            run = f"{total - 1} (all but the last, which is not run)" if said else f"{total}"
            raise MoELensError(
                f"request {self.id!r} has {self.prompt_length} tokens of a prompt and {said} generated ones, so that "
                f"experts of {run} were expected; got {self.told}: the trace is truncated, or of other tokens"
            )

    def _expect_experts(self) -> None:
        """MoELensError for what no router selects: experts that are not there, or one of them twice."""
        if self.experts.min(initial=0) < 0 or self.experts.max(initial=0) >= self.n_experts:
            wrong = sorted({int(one) for one in np.unique(self.experts) if not 0 <= one < self.n_experts})
            raise MoELensError(
                f"request {self.id!r} names experts {wrong[:5]}, and the model has 0 to {self.n_experts - 1}: a filler "
                "of slots without a routed expert (shared ones, dense layers), or another model's trace"
            )
        if self.experts.size and not self.experts.any():
            raise MoELensError(
                f"request {self.id!r} has expert 0 alone everywhere: the engine did not record its routing (kernels "
                "that select and compute at once do not, nor do ranks that only decode); serve with others"
            )
        ordered = np.sort(self.experts, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
        if twice.any():
            token, place = (int(one) for one in np.argwhere(twice)[0])
            zero = not self.experts[token].any()
            why = "was not recorded (a cached prefix is not run again)" if zero else "is damaged"
            raise MoELensError(
                f"request {self.id!r}, token {token}, layer {self.layers[place]}: an expert comes twice in "
                f"{self.experts[token, place].tolist()}, so its routing {why}; {int(twice.any(1).sum())} of "
                f"{self.told} tokens have that"
            )


def record_of(requests: Sequence[Request]) -> Record:
    """Requests as one batch: prompts, and what was generated where its positions are; `positions` "all" has both.

    A token without experts, the last one generated, counts nowhere. Raises MoELensError for requests of unlike layers.
    """
    if len({(one.layers, one.experts.shape[1:]) for one in requests}) > 1:
        raise MoELensError("expected requests of one model; these have experts of different layers")
    width = max(len(one.tokens) for one in requests)
    starts = [width - len(one.tokens) for one in requests]
    routing: dict[int, Routing] = {}
    for place, layer in enumerate(requests[0].layers):
        indices = _padded([one.experts[:, place].astype(np.int64) for one in requests], starts, width)
        parts = [one.weights[:, place] for one in requests if one.weights is not None]
        weights = _padded(parts, starts, width) if len(parts) == len(requests) else None
        routing[layer] = TracedRouting(indices, requests[0].n_experts, weights)
    return Record(
        ids=tuple(one.id for one in requests),
        input_ids=_left([torch.tensor(one.tokens) for one in requests], 0),
        attention_mask=_padded([np.ones(one.told, np.int64) for one in requests], starts, width),
        context_spans=tuple(shift(one.context, start) for one, start in zip(requests, starts, strict=True)),
        question_spans=tuple(shift(one.question, start) for one, start in zip(requests, starts, strict=True)),
        answer_spans=tuple(
            tuple(shift(span, start) for span in one.answer_spans) for one, start in zip(requests, starts, strict=True)
        ),
        kept=torch.arange(width),
        captured={"routing": routing},
        routing_before=routing,
        labels=_left([_labels(one) for one in requests], IGNORED_LABEL),
    )


def _labels(request: Request) -> torch.Tensor:
    """What was generated, at its own positions, int64 [token]."""
    labels = torch.tensor(request.tokens)
    labels[: request.prompt_length] = IGNORED_LABEL
    return labels


def _left(rows: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
    """Rows of different lengths as one tensor, padded on their left."""
    return pad_sequence(list(rows), batch_first=True, padding_value=fill, padding_side="left")


def _padded(rows: Sequence[np.ndarray], starts: Sequence[int], width: int) -> torch.Tensor:
    """Values of the first tokens of each row at their places in the batch, 0 elsewhere."""
    whole = torch.zeros(len(rows), width, *rows[0].shape[1:], dtype=torch.from_numpy(rows[0]).dtype)
    for row, (values, start) in enumerate(zip(rows, starts, strict=True)):
        whole[row, start : start + len(values)] = torch.from_numpy(values)
    return whole


def expect_told(request: Request) -> None:
    """MoELensError for a request whose token ids are not known."""
    if UNTOLD in request.tokens:
        raise MoELensError(
            f"the trace of {request.id!r} tells no token ids, so nobody can say whether it is of these prompts; take a "
            "trace of an engine that tells them"
        )
