"""One batch under masks of its routing, each resumed at the first layer that it changes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from moe_lens.architecture import MoELayer
from moe_lens.data import Batch, Encoded
from moe_lens.data.encoding import IGNORED_LABEL
from moe_lens.lens.holding import measuring
from moe_lens.lens.runner import BatchRunner
from moe_lens.lens.taken import joint_log_probability, kept_logits

SAME = 1e-6
"""Differences of gating weights up to this share of the largest are another order of summing, not an intervention."""


@dataclass(frozen=True, eq=False)
class Plain:
    """What a pass over a batch holds, of which others are resumed.

    prompts, batch, inputs, scored, found: of its rows, which are `places` of the batch that was run: what the model was
        given, where a token of the answer is predicted, bool [batch, pos], and the answers' log-probabilities (nats).
    layers, attentions: of all that was run, the whole output of each decoder layer, and of the attention in those that
        have experts. gating: the experts' indices and weights, [batch, pos, k]. routed: their sum, as they give it,
        where they can be asked for some tokens alone.
    """

    prompts: tuple[Encoded, ...]
    batch: Batch
    inputs: dict[str, Any]
    scored: Tensor
    found: list[float]
    places: list[int]
    n_run: int
    layers: dict[int, Any] = field(default_factory=dict)
    attentions: dict[int, Any] = field(default_factory=dict)
    gating: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    routed: dict[int, Tensor] = field(default_factory=dict)

    def of_rows(self, rows: Sequence[int]) -> "Plain":
        """That of these rows alone, in their order; one may come again."""
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in rows),
            batch=self.batch.of_rows(rows),
            inputs={name: rows_of(value, rows, len(self.prompts)) for name, value in self.inputs.items()},
            scored=self.scored[list(rows)],
            found=[self.found[row] for row in rows],
            places=[self.places[row] for row in rows],
        )

    def own(self, value: Any) -> Any:
        """Of what was kept of all that was run, a copy of these rows'."""
        return rows_of(value, self.places, self.n_run)


@dataclass(frozen=True)
class ResumedRunner(BatchRunner):
    """Also runs batches from a layer on, under interventions that change routing alone."""

    def plain(self, prompts: Sequence[Encoded]) -> Plain:
        """A whole pass over the prompts, which carry their answers."""
        self.expect_here("to resume passes", "take lens.answer_log_probabilities under each mask")
        batch = self._batch(prompts)
        labels, inputs, rows = batch.answer_labels, self._inputs(batch), len(prompts)
        kept = labels.shape[1] + 1
        assert batch.labels is not None, "answer_labels has refused a batch without"
        scored = (batch.labels != IGNORED_LABEL).roll(-1, 1)  # of the first position there is no label
        seen = Plain(tuple(prompts), batch, inputs, scored.to(inputs["input_ids"].device), [], [*range(rows)], rows)
        with (
            torch.no_grad(),
            measuring(self.module),
            self.stack.for_batch(batch, self.reader),
            self.model.trace(**inputs, logits_to_keep=kept),
        ):
            for layer in range(self.reader.architecture.n_layers):
                self._keep(layer, seen)
            logits = self.model.output.logits.save()
        return replace(seen, found=self._found(seen, logits))

    def _keep(self, layer: int, seen: Plain) -> None:
        """Inside a trace: what a layer gives, and its parts; copied, since blocks may write into it later."""
        reader, architecture = self.reader, self.reader.architecture
        if layer in architecture.moe_layers:
            if architecture.attentions[layer] is not None:
                seen.attentions[layer] = _copied(self.model.get(architecture.attentions[layer]).output)
            seen.gating[layer] = _copied(reader.used_gating(layer))
            if architecture.at(layer).takes_tokens:
                routed = reader.experts(layer).output
                if isinstance(routed, Tensor):
                    seen.routed[layer] = routed.clone()
        seen.layers[layer] = _copied(self.model.get(architecture.layers[layer]).output)

    def masked_layer(self, plain: Plain, layer: int) -> tuple[Any, Tensor]:
        """The whole output of the first masked layer, and which positions it differs at, bool [batch, pos]."""
        architecture = self.reader.architecture
        seen: dict[str, Any] = {}
        with (
            torch.no_grad(),
            measuring(self.module),
            self.stack.for_batch(plain.batch, self.reader),
            self.stack.resumed_at(layer),
            self.model.trace(**plain.inputs, logits_to_keep=1) as tracer,
        ):
            before_it = plain.own(plain.layers[layer - 1]) if layer else None
            for before in range(layer):
                self.model.get(architecture.layers[before]).skip(before_it)
            if layer in plain.attentions:
                self.model.get(architecture.attentions[layer]).skip(plain.own(plain.attentions[layer]))
            seen["changed"] = self._only_changed(plain, layer)
            seen["output"] = self.model.get(architecture.layers[layer]).output
            tracer.stop()
        return seen["output"], seen["changed"]

    def _only_changed(self, plain: Plain, layer: int) -> Tensor:
        """Inside a trace: run the masked layer's experts where gating differs; where that counts, bool [batch, pos]."""
        reader = self.reader
        changed = _differs(plain.own(plain.gating[layer]), reader.used_gating(layer), reader.architecture.at(layer))
        if layer == reader.architecture.n_layers - 1:
            changed &= plain.scored.to(changed.device)
        if layer in plain.routed:
            self._only_wanted(plain, layer, changed)
        return changed

    def rest(self, plain: Plain, layer: int, output: Any, wanted: Tensor) -> list[float]:
        """The log-probability (nats) of each row's answer, if `layer` gives this whole output.

        wanted: the positions that can differ from the plain pass's, bool [batch, pos].
        """
        architecture = self.reader.architecture
        with (
            torch.no_grad(),
            measuring(self.module),
            self.stack.for_batch(plain.batch, self.reader),
            self.stack.resumed_at(layer + 1),
            self.model.trace(**plain.inputs, logits_to_keep=plain.batch.answer_labels.shape[1] + 1),
        ):
            for before in range(layer + 1):
                self.model.get(architecture.layers[before]).skip(output)
            for later in range(layer + 1, architecture.n_layers):
                if later in plain.routed:
                    last = later == architecture.n_layers - 1
                    self._only_wanted(plain, later, wanted.to(plain.scored.device) & plain.scored if last else wanted)
            logits = self.model.output.logits.save()
        return self._found(plain, logits)

    def _only_wanted(self, plain: Plain, layer: int, wanted: Tensor) -> None:
        """Inside a trace: run a layer's experts on the wanted tokens, and give the others what the plain pass had."""
        experts, routed = self.reader.experts(layer), plain.own(plain.routed[layer])
        call = experts.inputs
        tokens = wanted.to(routed.device).flatten().nonzero()[:, 0]
        if len(tokens):
            arguments, named = self.reader.architecture.at(layer).of_tokens(call, tokens)
            routed.view(-1, routed.shape[-1])[tokens] = experts(*arguments, **named).view(len(tokens), -1)
        experts.skip(routed)

    def _found(self, plain: Plain, logits: Tensor) -> list[float]:
        """The log-probabilities of the rows' answers, by the logits of the last positions or of all."""
        labels = plain.batch.answer_labels
        found: list[float] = joint_log_probability(kept_logits(logits, labels.shape[1] + 1), labels).tolist()
        if not all(map(isfinite, found)):
            self._refuse(plain.prompts)
        return found


def _differs(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], site: MoELayer) -> Tensor:
    """At which positions some expert's gating weight differs, bool [batch, pos], in whatever order they stand.

    old, new: indices and weights, [batch, pos, k].
    """
    (old_indices, before), (new_indices, after) = old, new
    moved = after.new_zeros(*after.shape[:2], site.observed.n_experts)
    moved.scatter_add_(-1, new_indices, after).scatter_add_(-1, old_indices, -before.to(after.dtype))
    return (moved.abs() > SAME * before.abs().amax()).any(-1)


def rows_of(value: Any, rows: Sequence[int], n_rows: int) -> Any:
    """Of a tensor, or of those in a tuple, these rows, a copy; what has no axis of the batch's rows as it is."""
    if isinstance(value, tuple):
        return tuple(rows_of(part, rows, n_rows) for part in value)
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] % n_rows:
        return value
    by_row = value.view(n_rows, -1, *value.shape[1:])  # of tokens, those of a row
    return by_row[list(rows)].flatten(0, 1)


def _copied(value: Any) -> Any:
    """A copy of a tensor, or of those in a tuple."""
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value
