"""One batch through a traced model: its records, its greedy answers, the log-probability of given ones."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from moe_lens.architecture.discovery import pretrained
from moe_lens.data import Batch, Encoded, PromptTemplate, collate
from moe_lens.data.encoding import answer_begun
from moe_lens.errors import MoELensError, NotFiniteError
from moe_lens.lens.acting import Acting
from moe_lens.lens.devices import OnDevices, on_cpu
from moe_lens.lens.factors import FACTORS
from moe_lens.lens.finite import all_finite, finite_streams, not_finite
from moe_lens.lens.gradients import (
    Gradients,
    Levers,
    LogitLevers,
    Value,
    effects_of,
    expect_finite,
    expect_values,
    gradients_of,
    learning,
)
from moe_lens.lens.greedy import Greedy
from moe_lens.lens.holding import measuring
from moe_lens.lens.leaving import Leaving
from moe_lens.lens.positions import THINKING, Positions, any_position_mask
from moe_lens.lens.reader import TraceReader
from moe_lens.lens.record import CAPTURES, Reading, Record, by_capture, read_values, readings
from moe_lens.lens.stack import InterventionStack
from moe_lens.lens.taken import expect_known, joint_log_probability, kept_logits, pad_id
from moe_lens.lens.twins import LogitContrast
from moe_lens.routing import Routing


@dataclass(frozen=True)
class BatchRunner:
    """Runs `model`, which is `module` under tracing, on single batches, under the interventions of `stack`.

    remote: where it runs, as in `OpenedModel`.
    """

    module: nn.Module
    model: Any
    tokenizer: PreTrainedTokenizerBase
    reader: TraceReader
    stack: InterventionStack
    greedy: Greedy
    remote: bool | str = False

    def answer_log_probabilities(self, prompts: Sequence[Encoded], contrast: LogitContrast | None = None) -> Tensor:
        """The log-probability (nats) of each prompt's answer, in the order given, [batch]; with gradients where on.

        contrast: of the first half of the prompts, by the logits that it makes of theirs and of their twins', which
        are the second half.
        """
        batch = self._batch(prompts)
        labels, model = batch.answer_labels, self.model
        kept = labels.shape[1] + 1
        with (
            measuring(self.module),
            self.stack.for_batch(batch, self.reader),
            model.trace(**self._inputs(batch), logits_to_keep=kept, remote=self.remote),
        ):
            whole = model.output.logits.save()
        logits = kept_logits(whole, kept)
        if contrast is not None:
            logits, labels = contrast(*logits.float().chunk(2)), labels[: len(prompts) // 2]
        found = joint_log_probability(logits, labels)
        if not found.isfinite().all():
            self._refuse(prompts)
        return found

    def generate(
        self,
        prompts: Sequence[Encoded],
        max_new_tokens: int,
        template: PromptTemplate,
        contrast: LogitContrast | None = None,
    ) -> list[str]:
        """The greedy continuation of each prompt, without special tokens, in the order given.

        template: tells where the answer proper begins, for interventions that act there. contrast: as in
        `answer_log_probabilities`; a twin says what its prompt does.
        """
        self.expect_here("to generate", "trace lens.model.generate(…, remote=…), which is under interventions too")
        thinks = bool(template.answer_after and self.stack.interventions)
        batch = self._batch([replace(prompt, thought=THINKING) for prompt in prompts] if thinks else prompts)
        prompted = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with (
            torch.no_grad(),
            measuring(self.module),
            self.stack.for_batch(batch, self.reader),
            self.greedy.decoding(max_new_tokens, self._pad_id) as settings,
            self.model.trace(
                fn=self._leaving(contrast=contrast, template=template if thinks else None, **settings), **prompted
            ) as tracer,
        ):
            said = tracer.result.save()
        new, finite = (part.cpu() for part in said)  # [batch, new]
        running = ~self.greedy.ended(new).roll(1, -1)
        running[:, :1] = True
        bad = running & ~finite
        if bad.any():
            self._refuse(prompts, new[:, : int(bad.any(0).nonzero()[0])])
        return self.greedy.texts(new)

    def record(
        self,
        prompts: Sequence[Encoded],
        capture: Collection[str],
        positions: Iterable[Positions],
        *,
        to_cpu: bool = False,
    ) -> Record:
        """What the model does on the prompts, in one trace: what `capture` names, at any of the `positions`.

        to_cpu: moved there, layer by layer where it is large, so that the device holds one layer's at a time.
        """
        batch = self._batch(prompts)
        spans = batch.context_spans, batch.question_spans
        counted = any_position_mask(batch.attention_mask, *spans, positions, batch.labels, batch.thoughts)
        kept = OnDevices(counted.any(0).nonzero()[:, 0])
        seen = self._seen(batch, capture, kept, to_cpu=to_cpu)
        projected_mask = batch.attention_mask[:, kept.values if "logits" in capture else slice(-1, None)]
        if not all_finite(seen["finite"], batch.attention_mask, seen["logits"], projected_mask):
            self._refuse(prompts)
        captured = seen["layers"]
        routing, before = captured.get("routing", {}), seen["before"]
        logits = seen["logits"] if "logits" in capture else None
        if to_cpu:
            routing, before = _on_cpu(routing), _on_cpu(before)
            logits = None if logits is None else logits.cpu()
        return Record(
            ids=batch.ids,
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            context_spans=batch.context_spans,
            question_spans=batch.question_spans,
            answer_spans=batch.answer_spans,
            kept=kept.values,
            captured=captured | {"routing": routing} if routing else captured,
            routing_before={layer: before.get(layer, decided) for layer, decided in routing.items()},
            logits=logits,
            labels=batch.labels,
            thoughts=batch.thoughts,
        )

    def gradients(
        self,
        prompts: Sequence[Encoded],
        places: Sequence[int],
        value: Value,
        levers: Levers,
        logits: LogitLevers | None,
        positions: Collection[Positions],
    ) -> Gradients:
        """The effects on `value` of what the levers, new ones, are put in; logits: those in force, where wanted.

        One pass forward and back; no weight gets a gradient.
        """
        with learning(self.module, ()):
            batch, values = self._valued(prompts, places, value, levers)
            asked = {"gate": levers.gates, "output": levers.sums, "logit": {} if logits is None else logits.levers}
            found = gradients_of(values, asked, in_terms=self._in_terms)
        effects = effects_of(self.module, self.reader, batch, levers, found, positions)
        return Gradients(batch, places, values.detach().double().cpu(), effects)

    def gradients_by(
        self, prompts: Sequence[Encoded], places: Sequence[int], value: Value, kind: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `value` is, [batch], and the gradient of its sum by tensors that the run takes part of, by name.

        tensors: parameters of the module, or what an intervention in force has; none of them are changed. kind: what
        an error calls them.
        """
        with learning(self.module, tensors.values()):
            _, values = self._valued(prompts, places, value, Levers((), 1))
            return values.detach(), gradients_of(values, {kind: tensors}, in_terms=self._in_terms)[kind]

    @property
    def _in_terms(self) -> Collection[str]:
        """The kinds of levers that gating weights are multiplied by, where each process has a part of every expert."""
        return ("gate", FACTORS) if self.reader.gates_parts else ()

    def _valued(
        self, prompts: Sequence[Encoded], places: Sequence[int], value: Value, levers: Levers
    ) -> tuple[Batch, Tensor]:
        """The prompts as a batch, and their numbers [batch], with what gradients are taken from."""
        self.expect_here("to take gradients", "open it here, with its weights")
        batch = self._batch(prompts)
        kept = 1 if batch.labels is None else batch.answer_labels.shape[1] + 1
        with torch.enable_grad(), measuring(self.module), self.stack.for_batch(batch, self.reader):
            with self.model.trace(**self._inputs(batch), logits_to_keep=kept):
                levers.pull(self.reader)
                whole = self.model.output.logits.save()
            logits = kept_logits(whole, kept)
            values = value(logits, batch, places)
            expect_values(values, len(prompts))
            if not bool(values.isfinite().all()):
                expect_finite(values, logits, batch.ids)
                self._refuse(prompts)
        return batch, values

    def _seen(self, batch: Batch, capture: Collection[str], kept: OnDevices, *, to_cpu: bool) -> dict[str, Any]:
        """What one trace shows.

        "layers" is what `capture` names; "before" the routing from before the interventions, by layer; "finite", bool
        [batch, pos], whether the last layer's stream is; "logits", [batch, row, vocab], those of the kept positions
        where they are captured, else of the last.
        """
        reader, stack, asked = self.reader, self.stack, readings(self.reader.architecture, capture)
        projected = kept.values.tolist() if "logits" in capture else 1  # a tensor would go to the first layer's device
        seen: dict[str, Any] = {}
        with ExitStack() as around:
            around.enter_context(torch.no_grad())
            around.enter_context(measuring(self.module))
            for name in () if self.remote else capture:
                around.enter_context(CAPTURES[name].around(reader, kept))
            around.enter_context(stack.for_batch(batch, reader))
            around.enter_context(stack.recording())
            with self.model.trace(**self._inputs(batch), logits_to_keep=projected, remote=self.remote):
                seen = _shown(reader, stack, asked, kept, to_cpu).save()
        return seen | {
            "layers": by_capture(capture, asked, seen["layers"]),
            "before": {layer: Routing(*parts) for layer, parts in seen["before"].items()},
            "logits": kept_logits(seen["logits"], projected),
        }

    def _batch(self, prompts: Sequence[Encoded]) -> Batch:
        """The prompts padded; MoELensError for a token that the model does not know."""
        expect_known(prompts, self.module, self.tokenizer)
        return collate(prompts, self._pad_id)

    def _refuse(self, prompts: Sequence[Encoded], said: Tensor | None = None) -> NoReturn:
        """NotFiniteError, from a second pass that says where; said: what was generated until then, [batch, new]."""
        if said is not None:
            prompts = [
                replace(prompt, input_ids=(*prompt.input_ids, *row), prompt_length=len(prompt.input_ids) + len(row))
                for prompt, row in zip(prompts, said.tolist(), strict=True)
            ]
        under = f" under {', '.join(map(repr, self.stack.interventions))}" if self.stack.interventions else ""
        if self.remote:
            raise NotFiniteError(
                f"the model's numbers are not finite{under}; where they begin is told of one opened here"
            )
        batch = self._batch(prompts)
        inputs = self._inputs(batch)
        seen: dict[str, Any] = {}
        with (
            torch.no_grad(),
            measuring(self.module),
            self.stack.for_batch(batch, self.reader),
            self.model.trace(**inputs, logits_to_keep=1),
        ):
            seen["streams"] = finite_streams(self.reader, range(self.reader.architecture.n_layers))
        with torch.no_grad():
            raise not_finite(self.module, self.reader.architecture, prompts, inputs, seen["streams"], under)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """What a forward pass over the whole batch takes; positions are counted from each row's first token."""
        device = torch.device("cpu") if self.remote else pretrained(self.module).device  # a server moves them
        mask = batch.attention_mask.to(device)
        return {
            "input_ids": batch.input_ids.to(device),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "use_cache": False,
        }

    def _leaving(
        self, generation_config: GenerationConfig, contrast: LogitContrast | None, template: PromptTemplate | None
    ) -> Leaving:
        """How a batch is decoded by this config. template: where it matters when the answer proper begins."""
        keep = self._keep_rows if self.stack.rows_may_leave else None
        told = None if template is None else partial(self._told, template)
        return Leaving(self.module, generation_config, self.greedy.ends, keep, contrast, told)

    def _told(self, template: PromptTemplate, said: Tensor) -> None:
        """Takes down of which rows the answer proper has begun with the last of the tokens said, [row, new]."""
        thoughts = list(self.stack.thoughts)
        for row, ids in enumerate(said.tolist()):
            if thoughts[row] == THINKING and answer_begun(ids, self.tokenizer, template):
                thoughts[row] = len(ids)
        self.stack.keep_thoughts(thoughts)

    def _keep_rows(self, rows: list[int]) -> None:
        """From now on in this run, only these of its rows are left."""
        self.stack.keep_rows(rows)
        self.reader.keep_rows(len(rows))

    @property
    def _pad_id(self) -> int:
        return pad_id(self.module, self.tokenizer)

    def expect_here(self, work: str, instead: str) -> None:
        """MoELensError for a model on a server, which does no such work."""
        if self.remote:
            raise MoELensError(f"expected a model that runs here {work}, and this one is on a server; {instead}")


def _shown(reader: TraceReader, acting: Acting, asked: Sequence[Reading], kept: OnDevices, to_cpu: bool) -> Any:
    """Inside a trace: what `BatchRunner._seen` gives, in containers and tensors alone, which a server can send back."""
    layers = read_values(reader, asked, kept, to_cpu=to_cpu)
    [finite] = finite_streams(reader, (reader.architecture.n_layers - 1,))
    logits = reader.model.output.logits
    before = {layer: (own.logits, own.indices, own.weights) for layer, own in (acting.before or {}).items()}
    return {"layers": layers, "finite": finite, "logits": logits, "before": before}


def _on_cpu(routings: Mapping[int, Routing]) -> dict[int, Routing]:
    """The routing of all layers on the CPU, by few copies."""
    parts = iter(on_cpu(part for own in routings.values() for part in (own.logits, own.indices, own.weights)))
    return {layer: Routing(next(parts), next(parts), next(parts)) for layer in routings}
