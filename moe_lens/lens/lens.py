"""MoELens: a Mixture-of-Experts model opened for reading and intervening; only this file imports nnsight."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from nnsight.intervention.interleaver import OutOfOrderError
from pandas import DataFrame
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.listed import normalize
from moe_lens.architecture.quantized import refuse_quantized_experts
from moe_lens.causal.evaluation import DEFAULT_METRICS, Evaluation, evaluate
from moe_lens.causal.judge import Judge
from moe_lens.data import FIGURE_10, Encoded, Example, PromptTemplate
from moe_lens.errors import MoELensError
from moe_lens.lens.batching import encode_prompt, prompt_batches, run_batches
from moe_lens.lens.delta import apply_delta
from moe_lens.lens.interventions import Intervention
from moe_lens.lens.loading import load_model, load_tokenizer
from moe_lens.lens.logit_lens import project_on_vocab
from moe_lens.lens.positions import Positions
from moe_lens.lens.reader import ByLayer, TraceReader
from moe_lens.lens.record import Record, check_capture
from moe_lens.lens.runner import BatchRunner
from moe_lens.lens.stack import InterventionStack
from moe_lens.report.views import View, experts_of_tokens, routing_view
from moe_lens.statistics import Statistic


class MoELens:
    """A Mixture-of-Experts language model, opened.

        lens.module                            the torch model
        lens.model                             the same model under nnsight: its idioms all work
        └─ layers, by absolute index i
           ├─ attention
           │     lens.attention_rows[i]        [batch, head, row, pos], in an `attention_rows` block
           ├─ MoE, in the layers lens.architecture.moe_layers
           │  ├─ router                        lens.routers[i], for lens.routers[i].output and the like
           │  │     lens.router_logits[i]      [batch, pos, expert], before any softmax
           │  ├─ experts, at their input
           │  │     lens.selected_experts[i]   [batch, pos, k]
           │  │     lens.gating_weights[i]     [batch, pos, k]; may be assigned
           │  │     lens.expert_outputs[i]     [batch, pos, k, d_model], each before its gating weight
           │  └─ shared experts
           └─ lens.layers_output[i]            the residual stream [batch, pos, d_model]; may be assigned

    The accessors are read inside `with lens.model.trace(...)`, in this order within a layer, layers in rising
    order. Give a trace its prompts at once, not by several invokes: routing is flattened over the batch.

    >>> lens = MoELens.from_pretrained("organism")
    >>> with lens.intervene(Zero(ExpertSet.of({2: [5, 7]}))):
    ...     texts = lens.generate(["The capital of France is"])
    """

    def __init__(self, module: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        refuse_quantized_experts(module)
        normalize(module)
        self.architecture = MoEArchitecture.of(module)
        self.module = module
        self.tokenizer = copy.deepcopy(tokenizer)  # nnsight sets its padding side
        # Without a device, wrapping would move a model from the CPU to a free accelerator.
        device = None if getattr(module, "hf_device_map", None) else module.device
        self.model = TransformersModel(module, tokenizer=self.tokenizer, device=device)
        self._reader = reader = TraceReader(self.model, self.architecture)
        self.routers = ByLayer(reader.router)
        self.router_logits = ByLayer(reader.router_logits)
        self.selected_experts = ByLayer(reader.selected_experts)
        self.gating_weights = ByLayer(reader.gating_weights, reader.set_gating_weights)
        self.expert_outputs = ByLayer(reader.expert_outputs)
        self.layers_output = ByLayer(reader.layer_output, reader.set_layer_output)
        self.attention_rows = ByLayer(reader.attention)
        self._stack = InterventionStack(self.architecture)
        self._runner = BatchRunner(self.module, self.model, self.tokenizer, reader, self._stack)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | nn.Module,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        delta: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> "MoELens":
        """Open a packaged model ("organism", "organism:planted"), a folder, a hub id, or a torch model.

        tokenizer: one, or where to find it; by default beside the model. A torch model needs it.
        dtype, device_map: as in transformers, for a model that is loaded here.
        delta: folder of a delta checkpoint to apply; a given torch model is changed in place.
        trust_remote_code: run the Python code that some models bring beside their weights.

        Raises MoELensError for a model that cannot be found, has no MoE layers, or is not the delta's base.
        """
        loaded = isinstance(model, nn.Module)
        if loaded and tokenizer is None:
            raise MoELensError("a torch model does not bring its tokenizer; pass tokenizer=")
        if tokenizer is None or isinstance(tokenizer, str | Path):
            found = model if tokenizer is None else tokenizer
            tokenizer = load_tokenizer(found, trust_remote_code=trust_remote_code)
        module = model
        if not loaded:
            module = load_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
        if delta is not None:
            apply_delta(module, delta)
        return cls(module, tokenizer)

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """Those in force now, the outermost block's first."""
        return self._stack.interventions

    @contextmanager
    def intervene(self, *interventions: Intervention) -> Iterator["MoELens"]:
        """Inside the block, what runs through this lens or `lens.model` is under the interventions.

        That is prefill and every decoding step of `records`, `generate` and your own traces of `lens.model`;
        not a bare call of `lens.module` or a trace of a part of it. Nested blocks add up, outer ones acting
        first. Leaving restores the model, also after an exception.

        Raises MoELensError for layers or experts that the model lacks, or if a reroute leaves too few.
        """
        edited = self._stack.layers
        with self._stack.adding(interventions):
            edits = [self._edit(layer) for layer in self._stack.layers if layer not in edited]
            try:
                yield self
            finally:
                # nnsight can only clear all edits at once; the user's own have to stay.
                self.model._edits = [edit for edit in self.model._edits if edit not in edits]

    def records(
        self,
        examples: Iterable[Example | str],
        *,
        capture: Collection[str] = ("routing",),
        positions: Positions = "last",
        with_answer: bool = False,
        continuations: Iterable[str] | None = None,
        template: PromptTemplate = FIGURE_10,
        batch_size: int = 16,
        progress: bool = True,
    ) -> Iterator[Record]:
        """What the model does on each batch of examples; memory does not grow with their number.

        capture: of "routing", "expert_outputs", "residual", "moe_output", "attention", "logits". Routing is recorded at
            all positions, the others at those that `positions` names in any row of the batch (`Record.kept`).
        examples: bare texts are run as they are; other examples are rendered by `template`.
        with_answer: append each example's first gold answer, teacher-forced, so that decoding steps can be seen.
        continuations: texts to append instead, one per example, such as what `generate` gave.

        Batches come longest first within each window of 64 of them; `Record.ids` names the rows.
        Raises MoELensError for another capture, or if the interventions change before the records are read.
        """
        check_capture(capture)
        asked = self._stack.interventions

        def stream() -> Iterator[Record]:
            for places, prompts in prompt_batches(
                examples,
                self.tokenizer,
                template=template,
                batch_size=batch_size,
                progress=progress,
                with_answer=with_answer,
                continuations=continuations,
            ):
                if self._stack.interventions is not asked:
                    raise MoELensError(
                        "these records were asked for under other interventions than are active now; read "
                        "them within the same `with lens.intervene(...)` block"
                    )
                with self._stack.for_examples(places):
                    record = self._runner.record(prompts, capture, positions)
                yield record

        return stream()

    def measure(
        self,
        examples: Iterable[Example | str],
        *statistics: Statistic,
        positions: Positions = "last",
        with_answer: bool = False,
        continuations: Iterable[str] | None = None,
        template: PromptTemplate = FIGURE_10,
        batch_size: int = 16,
        progress: bool = True,
    ) -> tuple[Statistic, ...]:
        """Update each statistic with the `records` of the examples, in one pass, and give them back."""
        for statistic in statistics:
            if isinstance(statistic, type):
                raise MoELensError(f"give a statistic to fill, {statistic.__name__}(…), not its class")
        for record in self.records(
            examples,
            capture=frozenset().union(*(statistic.captures for statistic in statistics)),
            positions=positions,
            with_answer=with_answer,
            continuations=continuations,
            template=template,
            batch_size=batch_size,
            progress=progress,
        ):
            for statistic in statistics:
                statistic.update(record)
        return statistics

    def show(
        self,
        prompt: Example | str,
        *,
        under: Sequence[Intervention] = (),
        against: "MoELens | None" = None,
        template: PromptTemplate = FIGURE_10,
    ) -> View:
        """Which experts each token of a prompt takes, as an interactive page: in a notebook, or `.save(path)`.

        Beside this model, another one (`against`) or the model under interventions (`under`), or both at once. Inside a
        `lens.intervene` block its interventions are in force on both sides; a panel is headed by all that are.
        """
        this, other = ("this model", "the other model") if against else ("", "")
        plain = "without intervention" if under else "gating weights"
        panels = {self._heading(this) or plain: self._experts_of_tokens(prompt, template)}
        if against or under:
            beside = against or self
            with beside.intervene(*under):
                panels[beside._heading(other)] = beside._experts_of_tokens(prompt, template)
        return routing_view(panels)

    def _heading(self, model: str) -> str:
        """Of a panel: the model's name, where there are two, and every intervention in force."""
        return ", ".join([*([model] if model else []), *(f"under {type(it).__name__}" for it in self.interventions)])

    def _experts_of_tokens(self, prompt: Example | str, template: PromptTemplate) -> DataFrame:
        [record] = self.records([prompt], template=template, progress=False)
        return experts_of_tokens(record, self.tokenizer)

    def run_with_cache(
        self,
        texts: str | Sequence[str],
        *,
        capture: Collection[str] = ("routing",),
        positions: Positions = "all",
    ) -> tuple[Tensor, Record]:
        """Run texts as one batch in their order: logits [batch, row, vocab] at `positions`, and a record."""
        check_capture(capture)
        texts = [texts] if isinstance(texts, str) else texts
        prompts = [encode_prompt(i, text, self.tokenizer, template=FIGURE_10) for i, text in enumerate(texts)]
        record = self._runner.record(prompts, {*capture, "logits"}, positions)
        return record.logits, record

    def generate(
        self,
        examples: Iterable[Example | str],
        *,
        max_new_tokens: int = 16,
        template: PromptTemplate = FIGURE_10,
        batch_size: int = 16,
        progress: bool = True,
    ) -> list[str]:
        """The greedy continuation of each example, in the order given, up to end-of-sequence.

        Special tokens are left out. Batches that do not fit in memory are halved, with a warning. To sample, trace
        `lens.model.generate`, which is under interventions too.
        """

        def run(places: Sequence[int], prompts: Sequence[Encoded]) -> list[str]:
            with self._stack.for_examples(places):
                return self._runner.generate(prompts, max_new_tokens)

        batches = prompt_batches(examples, self.tokenizer, template=template, batch_size=batch_size, progress=progress)
        return [text for _, text in sorted(run_batches(batches, run))]

    def answer_log_probabilities(
        self,
        examples: Iterable[Example],
        *,
        template: PromptTemplate = FIGURE_10,
        batch_size: int = 16,
        progress: bool = True,
        with_end: bool = True,
    ) -> list[float]:
        """The log-probability (nats) of each example's first gold answer, in the order given.

        Of all its tokens together, each given the prompt and the answer's tokens before it; with_end: of
        end-of-sequence after it, too. Batches that do not fit in memory are halved, with a warning.
        """

        def run(places: Sequence[int], prompts: Sequence[Encoded]) -> list[float]:
            kept = prompts if with_end else [replace(prompt, input_ids=prompt.input_ids[:-1]) for prompt in prompts]
            with self._stack.for_examples(places):
                return self._runner.answer_log_probabilities(kept)

        batches = prompt_batches(
            examples, self.tokenizer, template=template, batch_size=batch_size, progress=progress, with_answer=True
        )
        return [found for _, found in sorted(run_batches(batches, run))]

    def evaluate(
        self,
        examples: Sequence[Example],
        interventions: Mapping[str, Intervention | Sequence[Intervention]] | None = None,
        *,
        metrics: Sequence[str] = DEFAULT_METRICS,
        template: PromptTemplate = FIGURE_10,
        max_new_tokens: int = 16,
        batch_size: int = 16,
        judge: Judge | None = None,
        out: Path | None = None,
        made_by: dict | None = None,
        progress: bool = True,
        seed: int = 0,
    ) -> Evaluation:
        """Score the answers to the examples, as the model is and under each intervention; `evaluation.evaluate`."""
        return evaluate(
            self,
            examples,
            interventions,
            metrics=metrics,
            template=template,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            judge=judge,
            out=out,
            made_by=made_by,
            progress=progress,
            seed=seed,
        )

    def project_on_vocab(self, residual: Tensor) -> Tensor:
        """The logit lens: logits [..., vocab] of residual streams [..., d_model], by the model's own norm and head.

        At the last layer these are the model's logits. Not for use inside a trace.
        """
        return project_on_vocab(self.module, self.architecture, residual)

    def _edit(self, layer: int) -> Any:
        """Make every trace of `self.model` apply the active interventions at `layer`, at each step."""
        with self.model.edit(inplace=True) as tracer:
            self._apply_at_each_step(tracer, layer)
        return self.model._edits[-1]

    def _apply_at_each_step(self, tracer: Any, layer: int) -> None:
        try:
            for _ in tracer.iter[:]:
                self._stack.apply(layer, self._reader)
        except OutOfOrderError:
            return  # the run is over, or was stopped before this layer: nothing is left to act on
