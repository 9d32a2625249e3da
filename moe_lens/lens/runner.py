"""One batch through a traced model: its records, its greedy answers, the log-probability of given ones."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from moe_lens.architecture.discovery import input_device, pretrained
from moe_lens.data import Batch, Encoded, collate
from moe_lens.data.encoding import IGNORED_LABEL
from moe_lens.lens.devices import OnDevices
from moe_lens.lens.positions import Positions, any_position_mask
from moe_lens.lens.reader import TraceReader
from moe_lens.lens.record import CAPTURES, Record, read_layers
from moe_lens.lens.stack import InterventionStack


@dataclass(frozen=True)
class BatchRunner:
    """Runs `model`, which is `module` under tracing, on single batches, under the interventions of `stack`."""

    module: nn.Module
    model: Any
    tokenizer: PreTrainedTokenizerBase
    reader: TraceReader
    stack: InterventionStack

    def answer_log_probabilities(self, prompts: Sequence[Encoded]) -> list[float]:
        """The log-probability (nats) of each prompt's answer, in the order given."""
        batch = collate(prompts, self._pad_id)
        labels = batch.answer_labels
        kept = labels.shape[1] + 1
        with torch.no_grad(), self.stack.for_batch(batch), self.model.trace(**self._inputs(batch), logits_to_keep=kept):
            logits = self.model.output.logits.save()
        labels = labels.to(logits.device)
        log_probabilities = logits[:, :-1].float().log_softmax(-1)
        chosen = log_probabilities.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return cast(list[float], chosen.masked_fill(labels == IGNORED_LABEL, 0).sum(-1).tolist())

    def generate(self, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
        """The greedy continuation of each prompt, without special tokens, in the order given."""
        pad, end = self._pad_id, pretrained(self.module).generation_config.eos_token_id
        batch = collate(prompts, pad)
        arguments = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "pad_token_id": pad,
        }
        with (
            torch.no_grad(),
            self.stack.for_batch(batch),
            self.model.generate(**arguments, max_new_tokens=max_new_tokens, do_sample=False) as tracer,
        ):
            ids = tracer.result.save()
        new = ids[:, batch.input_ids.shape[1] :].cpu()  # [batch, new]
        ends = torch.tensor([] if end is None else end, dtype=new.dtype)
        ended = torch.isin(new, ends).cumsum(-1) > 0
        rows = zip(new, ended, strict=True)
        return [cast(str, self.tokenizer.decode(row[~after], skip_special_tokens=True)) for row, after in rows]

    def record(
        self,
        prompts: Sequence[Encoded],
        capture: Collection[str],
        positions: Iterable[Positions],
        *,
        to_cpu: bool = False,
    ) -> Record:
        """What the model does on the prompts, in one trace: what `capture` names, at any of the `positions`.

        to_cpu: moved there layer by layer, so that the device holds one layer's at a time.
        """
        batch = collate(prompts, self._pad_id)
        spans = batch.context_spans, batch.question_spans
        counted = any_position_mask(batch.attention_mask, *spans, positions, batch.labels)
        kept = OnDevices(counted.any(0).nonzero()[:, 0])
        projected = kept.values.tolist() if "logits" in capture else 1  # a tensor would go to the first layer's device
        seen: dict[str, Any] = {}
        with ExitStack() as around:
            around.enter_context(torch.no_grad())
            for name in capture:
                around.enter_context(CAPTURES[name].around(self.module, kept))
            around.enter_context(self.stack.for_batch(batch))
            before = around.enter_context(self.stack.recording())
            with self.model.trace(**self._inputs(batch), logits_to_keep=projected):
                seen["layers"] = read_layers(self.reader, capture, kept, to_cpu=to_cpu)
                seen["logits"] = self.model.output.logits
        routing = seen["layers"].get("routing", {})
        logits = seen["logits"] if "logits" in capture else None
        if to_cpu:
            before = {layer: decided.cpu() for layer, decided in before.items()}
            logits = None if logits is None else logits.cpu()
        return Record(
            ids=batch.ids,
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            context_spans=batch.context_spans,
            question_spans=batch.question_spans,
            answer_spans=batch.answer_spans,
            kept=kept.values,
            captured=seen["layers"],
            routing_before={layer: before.get(layer, decided) for layer, decided in routing.items()},
            logits=logits,
            labels=batch.labels,
        )

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """What a forward pass over the whole batch takes; positions are counted from each row's first token."""
        device = input_device(self.module)
        mask = batch.attention_mask.to(device)
        return {
            "input_ids": batch.input_ids.to(device),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "use_cache": False,
        }

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else pad  # pads are masked: any token will do
