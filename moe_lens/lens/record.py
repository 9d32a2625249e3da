"""Record: what one batch of prompts showed inside a model; CAPTURES: all that can be recorded, by name."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.moe_layer import MoELayer, Moment
from moe_lens.data.encoding import IGNORED_LABEL
from moe_lens.errors import MoELensError
from moe_lens.lens.attention import attention_rows
from moe_lens.lens.devices import OnDevices
from moe_lens.lens.positions import Positions, Spans, position_mask, step_positions
from moe_lens.lens.reader import TraceReader
from moe_lens.routing import Routing

UNTOLD = -1
"""In the place of a token's id where nobody told it."""

Read = Callable[[TraceReader, int, OnDevices], Any]
"""Inside a trace: what a layer, by absolute index, holds at the kept positions, int64 [row]."""


@dataclass(frozen=True)
class Capture:
    """Something that a record can hold of each layer; a new one is an entry of CAPTURES.

    about: what it is, with its axes. layers: the layers that have it. reads: at which moment of a layer what is read;
        the parts of what shows at several moments are put together by `join`. A moment that depends on the model is a
        function of its layer. around: a block that the trace runs in, for its reader and the kept positions.
        no_remote: why a model on a server does not give it; empty where it does.
    """

    name: str
    about: str
    layers: Callable[[MoEArchitecture], Iterable[int]]
    reads: tuple[tuple[Moment | Callable[[MoELayer], Moment], Read], ...]
    join: Callable[..., Any] = lambda value: value
    around: Callable[[TraceReader, OnDevices], AbstractContextManager[None]] = lambda reader, kept: nullcontext()
    no_remote: str = ""


def _moe(architecture: MoEArchitecture) -> Iterable[int]:
    return architecture.moe_layers


CAPTURES: Mapping[str, Capture] = {
    capture.name: capture
    for capture in (
        Capture(
            "routing",
            "what the router decided, as the experts used it, at all positions: a Routing",
            _moe,
            (
                (Moment.ROUTER_OUTPUT, lambda reader, layer, kept: reader.router_logits(layer)),
                (Moment.EXPERTS_INPUT, lambda reader, layer, kept: reader.used_gating(layer)),
            ),
            lambda logits, gating: Routing(logits, *gating),
        ),
        Capture(
            "router_input",
            "what the router is given of each token, [batch, row, d_model]",
            _moe,
            ((Moment.ROUTER_INPUT, lambda reader, layer, kept: kept.of(reader.router_input(layer), 1)),),
        ),
        Capture(
            "expert_outputs",
            "what each selected expert makes of its token, before its gating weight, [batch, row, k, d_model]",
            _moe,
            ((Moment.SINGLE_OUTPUTS, lambda reader, layer, kept: reader.expert_outputs(layer, kept)),),
            around=lambda reader, kept: reader.watching_experts(reader.architecture.moe_layers),
        ),
        Capture(
            "shared_output",
            "what the shared experts add to the routed experts' sum, [batch, row, d_model]",
            lambda architecture: [site.layer for site in architecture.moe if site.shared_experts],
            ((lambda site: site.shared_moment, lambda reader, layer, kept: kept.of(reader.shared_output(layer), 1)),),
        ),
        Capture(
            "moe_output",
            "what the MoE block gives, with the shared experts that are inside it, [batch, row, d_model]",
            _moe,
            ((Moment.BLOCK_OUTPUT, lambda reader, layer, kept: kept.of(reader.moe_output(layer), 1)),),
        ),
        Capture(
            "residual",
            "the residual stream after the layer, [batch, row, d_model]",
            lambda architecture: range(architecture.n_layers),
            ((Moment.LAYER_OUTPUT, lambda reader, layer, kept: kept.of(reader.layer_output(layer), 1)),),
        ),
        Capture(
            "attention",
            "the attention of the kept queries, [batch, head, row, pos]",
            lambda architecture: [layer for layer, path in enumerate(architecture.attentions) if path],
            ((Moment.ATTENTION, lambda reader, layer, kept: reader.attention(layer)),),
            around=lambda reader, kept: attention_rows(reader.module, kept.values),
            no_remote="it is computed by a function that is put into transformers' table around a run",
        ),
        Capture("logits", "the model's logits, [batch, row, vocab]", lambda architecture: (), ()),  # of no layer
    )
}
"""All that can be recorded, by name."""


@dataclass(frozen=True, eq=False)
class Record:
    """What one batch of prompts showed inside a model: a left-padded batch, its spans and what was captured from it.

    ids: of the examples, one per row of the batch.
    input_ids, attention_mask: int64 [batch, pos]; the mask is 0 at pads. These and whatever tells positions are on the
        CPU; what was captured is where `MoELens.records` and `run_with_cache` say.
    context_spans, question_spans: one per row, None where a prompt has none; half-open slices in padded positions.
    answer_spans: per row every occurrence of every gold answer in the context.
    kept: the padded positions that all captures but the routing have rows of, int64 [row].
    captured: by name of CAPTURES and layer; properties of these names give each (of attention: `attention_rows`).
    routing_before: per MoE layer as the router decided on the same input without interventions in that layer;
        the same object as in `routing` where no intervention acts on the layer.
    logits: [batch, row, vocab], None unless captured.
    labels: int64 [batch, pos], an appended answer's tokens and end-of-sequence at their own positions, elsewhere
        `IGNORED_LABEL`; None unless answers were appended.
    thoughts: as in `Batch`.
    """

    ids: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    context_spans: Spans
    question_spans: Spans
    answer_spans: tuple[tuple[slice, ...], ...]
    kept: Tensor
    captured: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    routing_before: Mapping[int, Routing] = field(default_factory=dict)
    logits: Tensor | None = None
    labels: Tensor | None = None
    thoughts: tuple[int | None, ...] = ()

    def __repr__(self) -> str:
        batch, width = self.input_ids.shape
        together: dict[int, list[str]] = {}
        for name, values in self.captured.items():
            together.setdefault(len(values), []).append(name)
        held = [f"{', '.join(names)} of {count} layers" for count, names in together.items() if count]
        held += ["logits"] * (self.logits is not None) + ["answers"] * (self.labels is not None)
        return f"Record({batch} x {width} tokens; {'; '.join(held) or 'nothing captured'})"

    @property
    def token_ids(self) -> Tensor:
        """`input_ids`, for those who need to know them; MoELensError where a trace does not tell them."""
        if (self.input_ids == UNTOLD).any():
            raise MoELensError(
                f"the trace of {self.ids[0]!r} tells no token ids, so what is counted by token cannot be; take a trace "
                "of an engine that tells them"
            )
        return self.input_ids

    @property
    def routing(self) -> Mapping[int, Routing]:
        """Per MoE layer what the router decided, at all positions, as the experts used it (after interventions)."""
        return self.captured.get("routing", {})

    @property
    def router_input(self) -> Mapping[int, Tensor]:
        """Per MoE layer what the router is given, [batch, row, d_model]."""
        return self.captured.get("router_input", {})

    @property
    def expert_outputs(self) -> Mapping[int, Tensor]:
        """Per MoE layer what each selected expert made of its token, before its gating weight.

        [batch, row, k, d_model]; slots as in `routing[layer].indices[:, kept]`.
        """
        return self.captured.get("expert_outputs", {})

    @property
    def shared_output(self) -> Mapping[int, Tensor]:
        """Per layer with shared experts what they add to the routed experts' sum, [batch, row, d_model]."""
        return self.captured.get("shared_output", {})

    @property
    def moe_output(self) -> Mapping[int, Tensor]:
        """Per MoE layer what its block gives, with the shared experts that are inside it, [batch, row, d_model]."""
        return self.captured.get("moe_output", {})

    @property
    def residual(self) -> Mapping[int, Tensor]:
        """Per layer the residual stream after it, [batch, row, d_model]."""
        return self.captured.get("residual", {})

    @property
    def attention_rows(self) -> Mapping[int, Tensor]:
        """Per layer the attention of the kept queries, [batch, head, row, pos].

        Where a layer attends to summaries of several positions too, these come after the positions.
        """
        return self.captured.get("attention", {})

    def attention_to_positions(self) -> Mapping[int, Tensor]:
        """`attention_rows` of a model that attends to its positions alone; MoELensError for any other."""
        width = self.input_ids.shape[1]
        for layer, rows in self.attention_rows.items():
            if rows.shape[-1] != width:
                raise MoELensError(
                    f"layer {layer} attends to {rows.shape[-1] - width} summaries of several positions beside the "
                    f"{width} positions, so what a position, or a part of the prompt, gets is not known; "
                    "`attention_rows` has what is attended to, summaries last"
                )
        return self.attention_rows

    @property
    def starts(self) -> Tensor:
        """The padded position of each row's first token, int64 [batch]."""
        return self.attention_mask.argmax(1)

    def without_answers(self) -> "Record":
        """The same record for whom only the prompts count: appended answers are no positions of it."""
        if self.labels is None:
            return self
        return replace(self, attention_mask=self.attention_mask.masked_fill(self.labels != IGNORED_LABEL, 0))

    def position_mask(self, positions: Positions) -> Tensor:
        """Which positions count, bool [batch, pos]; never pads, and none of a row without such a span.

        positions: "all", "prompt", "context", "question", "from_question", "last", "thought", "answer", "decode", or a
            tuple of steps counted from the prompt's last token, as in `moe_lens.lens.positions.position_mask`.
        Raises MoELensError for anything else.
        """
        spans = self.context_spans, self.question_spans
        return position_mask(self.attention_mask, *spans, positions, self.labels, self.thoughts)

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
        where it is False the place is that of another step, or 0 where no position was kept. Raises MoELensError for
        a position that was not kept.
        """
        positions, present = step_positions(self.attention_mask, self.labels, steps)
        places = torch.searchsorted(self.kept, positions).clamp(max=max(0, len(self.kept) - 1))
        if not torch.isin(positions[present], self.kept).all():
            raise MoELensError(
                f"the record did not keep the positions of steps {tuple(steps)}; ask for positions={tuple(steps)}"
            )
        return places, present

    def expect(self, captures: Collection[str]) -> None:
        """MoELensError, naming what is missing, unless the record holds all these captures."""
        held = {name for name, values in self.captured.items() if values}
        held |= set() if self.logits is None else {"logits"}
        missing = sorted(set(captures) - held)
        if lacking := [name for name in missing if name in self.captured and name != "logits"]:
            raise MoELensError(f"this model has no {', '.join(lacking)}: no layer of it gives any")
        if missing:
            raise MoELensError(f"the record holds no {', '.join(missing)}; ask for it with capture={tuple(missing)}")


@dataclass(frozen=True)
class Reading:
    """One thing to read of a layer: what, of which layer, and how."""

    name: str
    layer: int
    read: Read


def readings(architecture: MoEArchitecture, capture: Collection[str]) -> list[Reading]:
    """All that `capture` names, of all layers, in the order in which a model computes it."""
    wanted = {name: set(CAPTURES[name].layers(architecture)) for name in CAPTURES if name in capture}
    found: list[Reading] = []
    for layer in range(architecture.n_layers):
        parts = [
            (when if isinstance(when, Moment) else when(architecture.at(layer)), Reading(name, layer, read))
            for name in wanted
            if layer in wanted[name]
            for when, read in CAPTURES[name].reads
        ]
        found += [reading for _, reading in sorted(parts, key=lambda part: part[0])]
    return found


def read_values(reader: TraceReader, asked: Iterable[Reading], kept: OnDevices, *, to_cpu: bool = False) -> list[Any]:
    """Inside a trace, the values that are asked, in their order.

    kept: positions of which all but the routing are read, int64 [row]. to_cpu: tensors are moved as they come; routing,
        which is small, is not.
    """
    found = []
    for one in asked:
        value = one.read(reader, one.layer, kept)
        found.append(value.cpu() if to_cpu and one.name != "routing" else value)
    return found


def by_capture(capture: Collection[str], asked: Sequence[Reading], values: Sequence[Any]) -> dict[str, dict[int, Any]]:
    """What was read, by capture and layer, its parts put together."""
    parts: dict[str, dict[int, list[Any]]] = {name: {} for name in capture}
    for one, value in zip(asked, values, strict=True):
        parts[one.name].setdefault(one.layer, []).append(value)
    return {
        name: {layer: CAPTURES[name].join(*of_layer) for layer, of_layer in layers.items()}
        for name, layers in parts.items()
    }


def check_capture(capture: Collection[str], *, remote: bool = False) -> None:
    """MoELensError unless all are among `CAPTURES`, and a model on a server gives them if this one is `remote`."""
    unknown = sorted(set(capture) - set(CAPTURES))
    if unknown:
        raise MoELensError(f"capture can name {', '.join(sorted(CAPTURES))}; got {', '.join(unknown)}")
    for name in capture if remote else ():
        if reason := CAPTURES[name].no_remote:
            raise MoELensError(f"a model on a server gives no {name}: {reason}; leave it out, or open the model here")
