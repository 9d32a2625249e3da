"""MoELens: a Mixture-of-Experts model opened for reading and intervening: records, answers, and gradients of them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from moe_lens.architecture.discovery import pretrained
from moe_lens.data import Encoded, Example
from moe_lens.errors import MoELensError
from moe_lens.lens.batching import encode_prompt, run_batches, run_pieces
from moe_lens.lens.devices import has_float64
from moe_lens.lens.factors import FACTORS, Factors
from moe_lens.lens.gradients import (
    Effect,
    Gradients,
    Levers,
    LogitLevers,
    Value,
    answer_log_probability,
    expect_effects,
)
from moe_lens.lens.greedy import until
from moe_lens.lens.interventions import Intervention
from moe_lens.lens.needs import Needs, Statistic, expect_statistics
from moe_lens.lens.opened import OpenedModel
from moe_lens.lens.parallel import WHOLE, Part, expect_shareable, join_others, own_part
from moe_lens.lens.positions import Positions, check_positions
from moe_lens.lens.record import Record, check_capture
from moe_lens.lens.twins import LogitContrast, in_pairs, twin_of
from moe_lens.progress import progress_bar

S = TypeVar("S", bound=Statistic)
T = TypeVar("T")
Asked = Callable[[Sequence[int], Sequence[Encoded]], Sequence[T]]

GATE: tuple[Effect, ...] = ("gate",)
EVERYWHERE: tuple[Positions, ...] = ("all",)


class MoELens(OpenedModel):
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
        check_capture(capture, remote=bool(self.remote))
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
        In a `sharing` block of moe_lens.lens.parallel each process runs its batches, and all get the whole.
        """
        expect_statistics(statistics)
        part = own_part(self.module)
        expect_shareable(statistics, part)
        needs = Needs(frozenset(), with_answer=with_answer)
        for statistic in statistics:
            needs |= statistic.needs
        check_capture(needs.captures, remote=bool(self.remote))
        batches = self._batches(
            examples, batch_size, progress, with_answer=needs.with_answer, continuations=continuations, part=part
        )
        for_all = with_answer or continuations is not None
        to_cpu = not has_float64(pretrained(self.module).device)
        counted: list[set[int]] = [set() for _ in statistics]

        def update(places: Sequence[int], prompts: Sequence[Encoded]) -> bool:
            with self._stack.for_examples(places):
                record = self._runner.record(prompts, needs.captures, needs.positions or {"last"}, to_cpu=to_cpu)
            _update_once(statistics, counted, places, record, record if for_all else record.without_answers())
            return True

        join_others(statistics, part, lambda: all(run_pieces(batches, update)))
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
        check_capture(capture, remote=bool(self.remote))
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
        contrast: LogitContrast | None = None,
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
                return self._runner.generate(prompts, max_new_tokens, self.template, contrast if paired else None)

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
        contrast: LogitContrast | None = None,
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
        own = factors.detach().clone()
        with self.intervene(Factors(own, tuple(self.architecture.moe_layers))):
            found, gradients = self._runner.gradients_by(
                prompts, (), answer_log_probability, FACTORS, {"all experts": own}
            )
        return found.to(factors.device), gradients["all experts"]

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
        part: Part = WHOLE,
    ) -> Iterator[Gradients]:
        """First-order effects of every expert on a number of each example, batch by batch, under what is in force.

        value: the number. effects: which, see `Gradients`. positions: at which experts are run for "output". scale:
        what all gating weights are multiplied by. part: which of the batches. The rest as in `records`; memory is that
        of a training step of the routers, and of "output" what experts are given.
        Raises MoELensError for effects that the model cannot tell, or where no gradient goes through.
        """
        expect_effects(self._reader, effects)
        layers, n_experts = self.architecture.moe_layers, self.architecture.n_experts
        asked: dict[str, Any] = {"with_answer": with_answer, "continuations": continuations, "part": part}
        batches = self._batches(examples, batch_size, progress, **asked)

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
        own = {name: self.module.get_parameter(name) for name in names}
        total: dict[str, Tensor] = {}

        def run(places: Sequence[int], prompts: Sequence[Encoded]) -> dict[str, Tensor]:
            with self._stack.for_examples(places):
                return self._runner.gradients_by(prompts, places, value, "weight", own)[1]

        for _, found in run_pieces(self._batches(examples, batch_size, progress, with_answer=with_answer), run):
            total = {name: total[name] + own if total else own for name, own in found.items()}
        return total

    def project_on_vocab(self, residual: Tensor) -> Tensor:
        """The logit lens: logits [..., vocab] of residual streams [..., d_model], by the model's own norm and head.

        At the last layer these are the model's logits. Not for use inside a trace.
        """
        self._runner.expect_here("to project", "take its logits, or open it here")
        return self._logit_lens(residual)

    def _in_pairs(
        self,
        examples: Sequence[Example | str],
        run: Callable[[Sequence[int], Sequence[Encoded], bool], Sequence[T]],
    ) -> Asked[T]:
        """`run` of a batch with its twins; see `in_pairs`."""

        def twin(place: int, prompt: Encoded) -> Encoded:
            return twin_of(examples[place], prompt, self.tokenizer, self.template)

        return lambda places, prompts: in_pairs(places, prompts, twin, run)


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
