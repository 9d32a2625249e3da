"""MoELens: a Mixture-of-Experts model opened for reading and intervening; only this file imports nnsight."""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from nnsight import TransformersModel
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moe_lens.architecture import MoEArchitecture
from moe_lens.architecture.discovery import pretrained
from moe_lens.architecture.listed import normalize
from moe_lens.architecture.quantized import refuse_quantized_experts
from moe_lens.data import FIGURE_10, Encoded, Example, PromptTemplate, template_named
from moe_lens.errors import MoELensError
from moe_lens.lens.batching import encode_prompt, prompt_batches, run_batches, run_pieces
from moe_lens.lens.delta import apply_delta
from moe_lens.lens.devices import has_float64
from moe_lens.lens.factors import Factors
from moe_lens.lens.gradients import Effect, Gradients, Levers, LogitLevers, Value, expect_effects, learning
from moe_lens.lens.greedy import Greedy, until
from moe_lens.lens.interventions import Intervention
from moe_lens.lens.loading import load_model, load_tokenizer
from moe_lens.lens.logit_lens import LogitLens
from moe_lens.lens.many_masks import Resuming
from moe_lens.lens.needs import Needs, Statistic, expect_statistics
from moe_lens.lens.offloaded import expect_input_in_memory
from moe_lens.lens.positions import Positions, check_positions
from moe_lens.lens.reader import ByLayer, TraceReader
from moe_lens.lens.record import Record, check_capture
from moe_lens.lens.resumed import ResumedRunner
from moe_lens.lens.stack import InterventionStack
from moe_lens.lens.twins import Contrast, in_pairs, twin_of
from moe_lens.progress import progress_bar

S = TypeVar("S", bound=Statistic)
T = TypeVar("T")
Asked = Callable[[Sequence[int], Sequence[Encoded]], Sequence[T]]

GATE: tuple[Effect, ...] = ("gate",)
EVERYWHERE: tuple[Positions, ...] = ("all",)

__all__ = ["MoELens", "OutOfOrderError"]


class MoELens:
    """Opens a Mixture-of-Experts language model: to read what its experts do, and to change it.

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
           │  │     lens.expert_outputs[i]     [batch, pos, k, d_model], each before its gating weight; may be assigned
           │  ├─ shared experts
           │  └─ lens.moe_output[i]            what the block gives [batch, pos, d_model]; may be assigned
           └─ lens.layers_output[i]            the residual stream [batch, pos, d_model]; may be assigned

    The accessors are read inside `with lens.model.trace(...)`, in this order within a layer, layers in rising
    order. Give a trace its prompts at once, not by several invokes: routing is flattened over the batch.

    name: what it was opened by. template: how examples are asked, in measuring, answering, training and scoring alike.
    batch_size, progress: what holds where a call does not say otherwise. All of them may be assigned.

    >>> lens = MoELens.from_pretrained("organism")
    >>> with lens.intervene(Zero(ExpertSet.of({2: [5, 7]}))):
    ...     texts = lens.generate(["The capital of France is"])
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: PromptTemplate | str | Path = FIGURE_10,
        batch_size: int = 32,
        progress: bool = True,
    ) -> None:
        _expect_tokenizer(tokenizer)
        self.template = template
        self.batch_size, self.progress = batch_size, progress
        expect_input_in_memory(module)
        refuse_quantized_experts(module)
        normalize(module)
        self.architecture = MoEArchitecture.of(module)
        self.module = module
        self.tokenizer = copy.deepcopy(tokenizer)  # nnsight sets its padding side
        # Without a device, wrapping would move a model from the CPU to a free accelerator.
        device = None if getattr(module, "hf_device_map", None) else module.device
        self.model = TransformersModel(module, tokenizer=self.tokenizer, device=device)
        self.name = str(pretrained(module).config.name_or_path or type(module).__name__)
        self._reader = reader = TraceReader(self.model, self.architecture)
        self.routers = ByLayer(reader.router)
        self.router_logits = ByLayer(reader.router_logits)
        self.selected_experts = ByLayer(reader.selected_experts)
        self.gating_weights = ByLayer(reader.gating_weights, reader.set_gating_weights)
        self.expert_outputs = ByLayer(reader.expert_outputs, reader.set_expert_outputs)
        self.moe_output = ByLayer(reader.moe_output, reader.set_moe_output)
        self.layers_output = ByLayer(reader.layer_output, reader.set_layer_output)
        self.attention_rows = ByLayer(reader.attention)
        self._stack = InterventionStack(self.architecture)
        self._edits: dict[int, Any] = {}  # one for each layer that any block acts on, also a block that is at rest
        greedy = Greedy(module, self.tokenizer)
        self._runner = ResumedRunner(self.module, self.model, self.tokenizer, reader, self._stack, greedy)
        self._resuming = Resuming(self._runner)
        self._logit_lens = LogitLens(module, self.architecture)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | nn.Module,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        delta: str | Path | None = None,
        template: PromptTemplate | str | Path = FIGURE_10,
        trust_remote_code: bool = False,
    ) -> "MoELens":
        """Open a packaged model ("organism", "organism:planted"), a folder, a hub id, or a torch model.

        tokenizer: one, or where to find it; by default beside the model. A torch model needs it.
        dtype, device_map: as in transformers, for a model that is loaded here.
        delta: folder of a delta checkpoint to apply; a given torch model is changed in place. Where it was trained with
            another template, a warning says so.
        template: how examples are asked: one, the name of one, or a .json or .toml file.
        trust_remote_code: run the Python code that some models bring beside their weights.

        Raises MoELensError for a model that cannot be found, has no MoE layers, or is not the delta's base.
        """
        asked = template if isinstance(template, PromptTemplate) else template_named(template)
        if isinstance(model, nn.Module) and tokenizer is None:
            raise MoELensError("a torch model does not bring its tokenizer; pass tokenizer=")
        if tokenizer is None or isinstance(tokenizer, str | Path):
            found = cast(str | Path, model) if tokenizer is None else tokenizer
            tokenizer = load_tokenizer(found, trust_remote_code=trust_remote_code)
        _expect_tokenizer(tokenizer)
        if isinstance(model, nn.Module):
            module = model
        else:
            module = load_model(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
        if delta is not None:
            apply_delta(module, delta, template=asked)
        lens = cls(module, tokenizer, template=asked)
        lens.name = lens.name if isinstance(model, nn.Module) else str(model)
        return lens

    def __deepcopy__(self, memo: object) -> "MoELens":
        """MoELensError: interventions in a copy would act through the first lens, so not at all."""
        raise MoELensError(
            "expected one lens for each model; a MoELens cannot be copied with its model: open the model again with "
            "MoELens.from_pretrained(…), or a copy of it with MoELens(copy.deepcopy(lens.module), lens.tokenizer)"
        )

    def __repr__(self) -> str:
        under = f", under {', '.join(map(repr, self.interventions))}" if self.interventions else ""
        device = f"{str(self.module.dtype).removeprefix('torch.')} on {self.module.device}"
        return f"MoELens({self.name}: {self.architecture.in_short()}; {device}{under})"

    @property
    def template(self) -> PromptTemplate:
        """How examples are asked; it may be assigned, also by a template's name or file."""
        return self._template

    @template.setter
    def template(self, template: PromptTemplate | str | Path) -> None:
        self._template = template if isinstance(template, PromptTemplate) else template_named(template)

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
        with self._stack.adding(interventions), self._edited(self._stack.layers):
            yield self

    @contextmanager
    def at_rest(self) -> Iterator["MoELens"]:
        """Inside the block no intervention acts, though those of blocks around it are in force again after it."""
        with self._stack.at_rest():
            yield self

    def records(
        self,
        examples: Iterable[Example | str],
        *,
        capture: Collection[str] = ("routing",),
        positions: Positions | Set[Positions] = "last",
        with_answer: bool = False,
        continuations: Iterable[str] | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> Iterator[Record]:
        """What the model does on each batch of examples; memory does not grow with their number.

        capture: names of `CAPTURES`, such as "routing", "residual" or "logits". Routing is recorded at all positions,
            the others at those that `positions` (one kind, or a set of several) names in any row of the batch.
        examples: bare texts are run as they are; other examples are rendered by the lens's template.
        with_answer: append each example's first gold answer, teacher-forced, so that decoding steps can be seen.
        continuations: texts to append instead, one per example, such as what `generate` gave.

        Batches come longest first within each window of 64 of them; `Record.ids` names the rows. One that does not fit
        in memory is halved, with a warning. Records are on the CPU, so that many of them fill no device.
        Raises MoELensError for another capture, or if the interventions change before the records are read.
        """
        check_capture(capture)
        several = _several(positions)
        asked = self._stack.interventions
        batches = self._batches(examples, batch_size, progress, with_answer=with_answer, continuations=continuations)

        def run(places: Sequence[int], prompts: Sequence[Encoded]) -> Record:
            if self._stack.interventions is not asked:
                raise MoELensError(
                    "these records were asked for under other interventions than are active now; read "
                    "them within the same `with lens.intervene(...)` block"
                )
            with self._stack.for_examples(places):
                return self._runner.record(prompts, capture, several, to_cpu=True)

        return (record for _, record in run_pieces(batches, run))

    def measure(
        self,
        examples: Iterable[Example | str],
        *statistics: S,
        with_answer: bool = False,
        continuations: Iterable[str] | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> tuple[S, ...]:
        """Update each statistic with what it needs of the examples, in one pass, and give them back.

        A statistic says what it needs: captures, positions, and whether answers are appended. Where only some of them
        need the answers, these are no positions for the others.
        with_answer, continuations: append answers, or these texts, for all statistics.
        """
        expect_statistics(statistics)
        needs = Needs(frozenset(), with_answer=with_answer)
        for statistic in statistics:
            needs |= statistic.needs
        batches = self._batches(
            examples, batch_size, progress, with_answer=needs.with_answer, continuations=continuations
        )
        for_all = with_answer or continuations is not None
        to_cpu = not has_float64(pretrained(self.module).device)
        counted: list[set[int]] = [set() for _ in statistics]

        def update(places: Sequence[int], prompts: Sequence[Encoded]) -> bool:
            with self._stack.for_examples(places):
                record = self._runner.record(prompts, needs.captures, needs.positions or {"last"}, to_cpu=to_cpu)
            _update_once(statistics, counted, places, record, record if for_all else record.without_answers())
            return True

        for _ in run_pieces(batches, update):
            pass
        return statistics

    def run_with_cache(
        self,
        texts: str | Sequence[str],
        *,
        capture: Collection[str] = ("routing",),
        positions: Positions = "all",
    ) -> tuple[Tensor, Record]:
        """Run texts as one batch in their order: logits [batch, row, vocab] at `positions`, and a record.

        What was captured stays where each layer is.
        """
        check_capture(capture)
        texts = [texts] if isinstance(texts, str) else texts
        prompts = [encode_prompt(i, text, self.tokenizer, template=self.template) for i, text in enumerate(texts)]
        record = self._runner.record(prompts, {*capture, "logits"}, (positions,))
        return cast(Tensor, record.logits), record

    def generate(
        self,
        examples: Iterable[Example | str],
        *,
        max_new_tokens: int = 16,
        stop: Sequence[str] = (),
        batch_size: int | None = None,
        progress: bool | None = None,
        contrast: Contrast | None = None,
    ) -> list[str]:
        """The greedy continuation of each example, in the order given, up to end-of-sequence.

        Greedy whatever the model's generation config says, of which a warning tells what is left out; an end is what
        the tokenizer, the config or the generation config calls one. Special tokens are left out, but for those around
        thoughts. stop: texts before the first of which it ends too, once the answer has begun: thoughts and white space
        before it hold no such end. Batches that do not fit in memory are halved, with a warning. To sample, trace
        `lens.model.generate`, which is under interventions too.
        contrast: each example that has a context is run beside its twin without it, in the same batch and under the
        same interventions, and this makes one of the logits of both; see moe_lens.decoding.
        Raises NotFiniteError, as every measurement does, for a model whose numbers are not finite.
        """
        if max_new_tokens < 1:
            raise MoELensError(f"max_new_tokens is a number of tokens, at least 1; got {max_new_tokens}")

        def run(places: Sequence[int], prompts: Sequence[Encoded], paired: bool = False) -> list[str]:
            with self._stack.for_examples(places):
                return self._runner.generate(prompts, max_new_tokens, contrast if paired else None)

        asked: Asked[str] = run
        if contrast is not None:
            examples = [*examples]
            asked = self._in_pairs(examples, run)
        found = sorted(run_batches(self._batches(examples, batch_size, progress), asked))
        return [until(text, stop) for _, text in found]

    def answer_log_probabilities(
        self,
        examples: Iterable[Example | str],
        *,
        continuations: Iterable[str] | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        with_end: bool = True,
        first_token: bool = False,
        contrast: Contrast | None = None,
    ) -> list[float]:
        """The log-probability (nats) of each example's first gold answer, or of its continuation, in the order given.

        Of all its tokens together, each given the prompt and the answer's tokens before it; with_end: of
        end-of-sequence after it, too; first_token: of its first token alone. Batches that do not fit in memory are
        halved, with a warning. contrast: as in `generate`.
        """

        def run(places: Sequence[int], prompts: Sequence[Encoded], paired: bool = False) -> list[float]:
            answered = _with_answers(prompts, with_end=with_end, first_token=first_token)
            with torch.no_grad(), self._stack.for_examples(places):
                of_pairs = contrast if paired else None
                found: list[float] = self._runner.answer_log_probabilities(answered, of_pairs).tolist()
            return found

        asked: Asked[float] = run
        if contrast is not None:
            examples = [*examples]
            asked = self._in_pairs(examples, run)
        golds = continuations is None
        batches = self._batches(examples, batch_size, progress, with_answer=golds, continuations=continuations)
        return [found for _, found in sorted(run_batches(batches, asked))]

    def next_token_log_probabilities(
        self,
        examples: Iterable[Example | str],
        tokens: Sequence[Sequence[int]],
        *,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> list[list[float]]:
        """The log-probabilities (nats) right after each prompt of the ids in its row of `tokens`, in the order given.

        tokens: [example, token], as many for each. Batches that do not fit in memory are halved, with a warning.
        """

        def run(places: Sequence[int], prompts: Sequence[Encoded]) -> list[list[float]]:
            with self._stack.for_examples(places):
                logits = cast(Tensor, self._runner.record(prompts, {"logits"}, ("last",)).logits)[:, -1]
            asked = torch.tensor([list(tokens[place]) for place in places], device=logits.device)
            found: list[list[float]] = logits.float().log_softmax(-1).gather(1, asked).tolist()
            return found

        return [found for _, found in sorted(run_batches(self._batches(examples, batch_size, progress), run))]

    def answer_gradients(self, prompts: Sequence[Encoded], factors: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probability (nats) of each prompt's answer [batch] when gating weights are multiplied by factors.

        And its gradient by the factors, of the same shape as they: float [batch, layer, expert], layers in the order of
        `architecture.moe_layers`. Where all are 1 it is the first-order effect of each expert: what the answer's
        log-probability would lose without it. prompts: encoded with their answers, all of them run as one batch.
        """
        factors = factors.detach().clone().requires_grad_()
        with (
            learning(self.module, ()),
            torch.enable_grad(),
            self.intervene(Factors(factors, tuple(self.architecture.moe_layers))),
        ):
            found = self._runner.answer_log_probabilities(prompts)
            [gradient] = torch.autograd.grad(found.sum(), [factors])
        return found.detach().to(factors.device), gradient

    def answer_log_probabilities_under(
        self,
        examples: Iterable[Example],
        masks: Sequence[Intervention | Sequence[Intervention]],
        *,
        batch_size: int | None = None,
        progress: bool | None = None,
        with_end: bool = True,
        first_token: bool = False,
    ) -> list[list[float]]:
        """`answer_log_probabilities` under each of many masks, [mask][example], at a fraction of their cost.

        masks: one intervention each, or several that act in that order; none for the model as it is. They are added to
            those in force.

        A mask that changes routing alone is resumed at its first layer from one pass that all masks share, and of that
        layer and those after it only what can differ is run: the examples and positions that the mask can reach. That
        this is exact is seen once for each kind of mask, against whole runs of those that have the largest effects
        (1e-4 nats). Where it is not, each is run whole, and a warning says so; whole runs are also what masks take that
        change something else.
        """
        several = [(mask,) if isinstance(mask, Intervention) else tuple(mask) for mask in masks]
        layers = {layer for mask in several for own in mask for layer in own.layers_in(self.architecture)}
        asked = list(examples)
        shown = self.progress if progress is None else progress
        with (
            self._edited(sorted(layers)),
            progress_bar(total=len(asked) * len(several), unit="answer", disable=not shown) as bar,
        ):

            def run(places: Sequence[int], prompts: Sequence[Encoded]) -> list[list[float]]:
                answered = _with_answers(prompts, with_end=with_end, first_token=first_token)
                of_masks = self._resuming.answers_under(places, answered, several, bar.update)
                return [list(of_one) for of_one in zip(*of_masks, strict=True)]

            batches = self._batches(asked, batch_size, progress=False, with_answer=True)
            found = [of_one for _, of_one in sorted(run_batches(batches, run))]
        return [list(of_mask) for of_mask in zip(*found, strict=True)]

    def gradients(
        self,
        examples: Iterable[Example | str],
        value: Value,
        *,
        effects: Collection[Effect] = GATE,
        positions: Collection[Positions] = EVERYWHERE,
        scale: float = 1.0,
        with_answer: bool = False,
        continuations: Iterable[str] | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> Iterator[Gradients]:
        """First-order effects of every expert on a number of each example, batch by batch, under what is in force.

        value: the number. effects: which, see `Gradients`. positions: at which experts are run for "output". scale:
        what all gating weights are multiplied by. The rest as in `records`; memory is that of a training step of the
        routers, and of "output" what experts are given.
        Raises MoELensError for effects that the model cannot tell, or where no gradient goes through.
        """
        expect_effects(self._reader, effects)
        layers, n_experts = self.architecture.moe_layers, self.architecture.n_experts
        batches = self._batches(examples, batch_size, progress, with_answer=with_answer, continuations=continuations)

        def run(places: Sequence[int], prompts: Sequence[Encoded]) -> Gradients:
            width = max(len(prompt.input_ids) for prompt in prompts)
            bias = LogitLevers.of(layers, len(prompts), width, n_experts) if "logit" in effects else None
            with self.intervene(*([bias] if bias else [])), self._stack.for_examples(places):
                return self._runner.gradients(prompts, places, value, Levers(effects, scale), bias, positions)

        return (found for _, found in run_pieces(batches, run))

    def weight_gradients(
        self,
        examples: Iterable[Example | str],
        value: Value,
        names: Collection[str],
        *,
        with_answer: bool = False,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> dict[str, Tensor]:
        """The gradient of the sum over examples of a number of each, by name of the module's parameters, float32."""
        total: dict[str, Tensor] = {}

        def run(places: Sequence[int], prompts: Sequence[Encoded]) -> dict[str, Tensor]:
            with self._stack.for_examples(places):
                return self._runner.weight_gradients(prompts, places, value, names)

        for _, found in run_pieces(self._batches(examples, batch_size, progress, with_answer=with_answer), run):
            total = {name: total[name] + own if total else own for name, own in found.items()}
        return total

    def project_on_vocab(self, residual: Tensor) -> Tensor:
        """The logit lens: logits [..., vocab] of residual streams [..., d_model], by the model's own norm and head.

        At the last layer these are the model's logits. Not for use inside a trace.
        """
        return self._logit_lens(residual)

    def _batches(
        self,
        examples: Iterable[Example | str],
        batch_size: int | None,
        progress: bool | None,
        *,
        with_answer: bool = False,
        continuations: Iterable[str] | None = None,
    ) -> Iterator[tuple[tuple[int, ...], list[Encoded]]]:
        """The examples as `prompt_batches`, asked by the lens's template, as large and as loud as it says."""
        return prompt_batches(
            examples,
            self.tokenizer,
            template=self.template,
            batch_size=self.batch_size if batch_size is None else batch_size,
            progress=self.progress if progress is None else progress,
            with_answer=with_answer,
            continuations=continuations,
        )

    @contextmanager
    def _edited(self, layers: Iterable[int]) -> Iterator[None]:
        """Inside the block every trace of `self.model` applies what is in force in these layers."""
        own = {layer: self._edit(layer) for layer in layers if layer not in self._edits}
        self._edits |= own
        try:
            yield
        finally:
            self._edits = {layer: edit for layer, edit in self._edits.items() if layer not in own}
            # nnsight can only clear all edits at once; the user's own have to stay.
            self.model._edits = [edit for edit in self.model._edits if edit not in own.values()]

    def _in_pairs(
        self,
        examples: Sequence[Example | str],
        run: Callable[[Sequence[int], Sequence[Encoded], bool], Sequence[T]],
    ) -> Asked[T]:
        """`run` of a batch with its twins; see `in_pairs`."""

        def twin(place: int, prompt: Encoded) -> Encoded:
            return twin_of(examples[place], prompt, self.tokenizer, self.template)

        return lambda places, prompts: in_pairs(places, prompts, twin, run)

    def _edit(self, layer: int) -> Any:
        """Make every trace of `self.model` apply the active interventions at `layer`, at each step."""
        with self.model.edit(inplace=True) as tracer:
            self._apply_at_each_step(tracer, layer)
        return self.model._edits[-1]

    def _apply_at_each_step(self, tracer: Any, layer: int) -> None:
        past, prompt = 0, None
        try:
            for _ in tracer.iter[:]:
                width = self._stack.apply(layer, self._reader, past=past, prompt=prompt)
                past, prompt = past + width, prompt or width
        except OutOfOrderError:
            return  # the run is over, or was stopped before this layer: nothing is left to act on


def _update_once(
    statistics: Sequence[Statistic], counted: Sequence[set[int]], places: Sequence[int], record: Record, short: Record
) -> None:
    """Update each statistic with the examples at `places`: with `record`, or `short` of it where it needs no answers.

    counted: the places that each has had of a batch which comes again in halves, since memory ended in one after it.
    """
    for statistic, had in zip(statistics, counted, strict=True):
        if had.isdisjoint(places):
            statistic.update(record if statistic.needs.with_answer else short)
            had.update(places)
    for had in counted:
        had.difference_update(places)


def _with_answers(prompts: Sequence[Encoded], *, with_end: bool, first_token: bool) -> list[Encoded]:
    """The prompts with what counts of their answers: all, all but end-of-sequence, or the first token."""
    if with_end and not first_token:
        return list(prompts)
    ends = [prompt.prompt_length + 1 if first_token else -1 for prompt in prompts]
    return [replace(one, input_ids=one.input_ids[:end]) for one, end in zip(prompts, ends, strict=True)]


def _several(positions: Positions | Set[Positions]) -> frozenset[Positions]:
    """The positions as a set of them; MoELensError for what are none."""
    if isinstance(positions, Set):
        for one in positions:
            check_positions(one)
        return frozenset(positions)
    check_positions(positions)
    return frozenset({positions})


def _expect_tokenizer(tokenizer: object) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise MoELensError(
            f"expected a tokenizer of transformers, or where to find one; got a {type(tokenizer).__name__}: open it "
            "with AutoTokenizer.from_pretrained(…)"
        )
