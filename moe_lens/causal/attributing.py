"""Attribution: what each expert adds to a target to first order, by gradients, for all experts in one pass or two."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import pandas as pd
import torch
from torch import Tensor

from moe_lens.causal.outputs import first_tokens
from moe_lens.data import Batch, Example
from moe_lens.errors import MoELensError
from moe_lens.lens.gradients import Effect, Gradients, Value, answer_log_probability, of_gradients
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import join_others, own_part
from moe_lens.lens.positions import Positions, check_positions
from moe_lens.statistics.jackknife import GroupedSums

Function = Callable[[Tensor, Sequence[Example | str]], Tensor]
"""A target of one's own: of the logits [batch, vocab] after each prompt, and the examples, a number of each [batch]."""
Examples = Sequence[Example | str]


@dataclass(frozen=True)
class Pass:
    """One pass over the examples: `weight` times `value` of them, with these texts appended, or none."""

    weight: float
    value: Value
    continuations: Sequence[str] | None = None


@dataclass(frozen=True)
class Target:
    """A number (nats) of each example that experts raise or lower. passes: whose sum it is."""

    about: str
    passes: Callable[[MoELens, Examples], list[Pass]]


def _difference(lens: MoELens, examples: Examples) -> list[Pass]:
    both = [_rivals(example, place) for place, example in enumerate(examples)]
    gold, memory = ([pair[side] for pair in both] for side in (0, 1))
    return [Pass(1.0, answer_log_probability, gold), Pass(-1.0, answer_log_probability, memory)]


def _answer(lens: MoELens, examples: Examples) -> list[Pass]:
    gold = [_example(example, place).answers[0] for place, example in enumerate(examples)]
    return [Pass(1.0, answer_log_probability, gold)]


def _logit_difference(lens: MoELens, examples: Examples) -> list[Pass]:
    ids = rival_tokens(lens, examples)

    def value(logits: Tensor, batch: Batch, places: Sequence[int]) -> Tensor:
        return difference_of(logits[:, -1], ids[list(places)])

    return [Pass(1.0, value)]


TARGETS: Mapping[str, Target] = {
    "difference": Target("log p(context answer) - log p(memory answer), end-of-sequence included", _difference),
    "answer": Target("log p of the first gold answer, end-of-sequence included", _answer),
    "logit_difference": Target(
        "logit of the context answer's first token minus memory's, 0 where both are one", _logit_difference
    ),
}
"""What attribution is of, by name."""


@dataclass(frozen=True)
class Attribution:
    """One way to attribute a target to experts.

    effect: "gate", gating weight times gradient, summed over the tokens that select the expert: the derivative with
        respect to the factor of `Scale`; "logit", the derivative with respect to the alpha of `Bias`, where no
        selection changes; "output", gradient times the output that the expert has or would have, selected or not.
    positions: which tokens are summed over; those of the answer that is appended are among "all".
    target: one of `TARGETS`, or a function of one's own, `Function`.
    steps: over how many strengths of all gating weights the gradient is averaged, midpoints between 0 and 1 (integrated
        gradients, Sundararajan et al. 2017); 1 for the gradient of the model as it is.
    """

    effect: Effect = "gate"
    positions: Positions = "all"
    target: str | Function = "difference"
    steps: int = 1

    def __post_init__(self) -> None:
        check_positions(self.positions)
        if not callable(self.target) and self.target not in TARGETS:
            raise MoELensError(f"a target is one of {', '.join(TARGETS)}, or a function; got {self.target!r}")
        if type(self.steps) is not int or self.steps < 1:
            raise MoELensError(f"steps is a number of passes, at least 1; got {self.steps!r}")

    @property
    def scales(self) -> tuple[float, ...]:
        """The factors of all gating weights at which gradients are taken."""
        return tuple((step + 0.5) / self.steps for step in range(self.steps)) if self.steps > 1 else (1.0,)

    def passes(self, lens: MoELens, examples: Examples) -> list[Pass]:
        """Those of the target; MoELensError, naming it, for an example that lacks what the target needs."""
        if not callable(self.target):
            return TARGETS[self.target].passes(lens, examples)
        own = self.target

        def value(logits: Tensor, batch: Batch, places: Sequence[int]) -> Tensor:
            return own(logits[:, -1], [examples[place] for place in places])

        return [Pass(1.0, value)]


def attribution(
    lens: MoELens,
    examples: Examples,
    *wanted: Attribution,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> list[pd.DataFrame]:
    """The attribution of every expert in each of these ways: layer, expert, score, score_low, score_high.

    score: mean over examples of the sum over tokens, in the target's unit (nats; of "output" per gating weight, of
    "logit" per logit); with its 95 % interval over examples, a jackknife's.
    batch_size: of passes without gradients; these take a quarter at a time.
    In a `sharing` block of moe_lens.lens.parallel each process takes its batches, and all get the whole.
    Ways that differ in effect and positions only come from the same passes: as many as the target has, for each step.
    Raises MoELensError, naming it, for an example without what target or positions need.
    """
    [whole] = attribution_on_parts(lens, examples, *wanted, batch_size=batch_size, progress=progress)
    return whole


def attribution_on_parts(
    lens: MoELens,
    examples: Examples,
    *wanted: Attribution,
    parts: int = 1,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> list[list[pd.DataFrame]]:
    """`attribution` of all examples, and after it of each of several parts of them, `examples[n::parts]`.

    What it is of a part comes from the passes over all. Raises MoELensError, too, for ids that repeat, and for fewer
    examples than parts.
    """
    if not wanted or not examples:
        raise MoELensError("expected examples and one way to attribute or more, such as Attribution()")
    names = names_of(examples)
    part_of = {name: place % parts for place, name in enumerate(names)}
    if parts > 1 and not parts <= len(names) == len(part_of):
        raise MoELensError(f"expected {parts} examples or more, each with an id of its own; got {len(names)}")
    sums = {own: GroupedSums(parts) for own in wanted}
    order = sorted(sums, key=lambda own: (str(own.target), own.steps))

    def run() -> None:
        for (_, _), group in groupby(order, key=lambda own: (str(own.target), own.steps)):
            together = list(group)
            for weight, found in _gradients(lens, examples, together, batch_size, progress):
                ids = found.batch.ids
                for own in together:
                    mask, effects = found.position_mask(own.positions), found.effects[own.effect]
                    summed = {layer: torch.einsum("bpe,bp->be", one, mask.to(one)) for layer, one in effects.items()}
                    sums[own].add(ids, summed, weight=weight, parts=[part_of[name] for name in ids])

    join_others(list(sums.values()), own_part(lens.module), run)
    each = [[sums[own].part(number).means(names[number::parts]) for own in wanted] for number in range(parts)]
    return [[sums[own].means(names) for own in wanted], *(each if parts > 1 else [])]


def _gradients(
    lens: MoELens, examples: Examples, ways: Sequence[Attribution], batch_size: int | None, progress: bool | None
) -> Iterator[tuple[float, Gradients]]:
    """All passes of ways that share target and steps, batch by batch, each with what it counts."""
    size = of_gradients(lens.batch_size if batch_size is None else batch_size)
    effects = tuple(dict.fromkeys(own.effect for own in ways))
    positions = {own.positions for own in ways if own.effect == "output"}
    for one in ways[0].passes(lens, examples):
        for scale in ways[0].scales:
            found = lens.gradients(
                examples,
                one.value,
                effects=effects,
                positions=positions,
                scale=scale,
                continuations=one.continuations,
                batch_size=size,
                progress=progress,
                part=own_part(lens.module),
            )
            yield from ((one.weight / ways[0].steps, gradients) for gradients in found)


def rival_tokens(lens: MoELens, examples: Examples) -> Tensor:
    """The first tokens of what the context and what memory answer, int64 [example, 2].

    Raises MoELensError, naming it, for an example without memory, and where both are one in all.
    """
    found = [
        first_tokens(lens, _example(example, place), _rivals(example, place)) for place, example in enumerate(examples)
    ]
    if all(gold == memory for gold, memory in found):
        raise MoELensError(
            "what context and memory answer begins with the same token in all examples, so that their logits do not "
            "differ; take the target 'difference'"
        )
    return torch.tensor(found)


def difference_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Of logits [batch, vocab] and two tokens of each row [batch, 2] the first's less the second's, float32 [batch]."""
    first, second = logits.float().gather(-1, ids.to(logits.device)).unbind(-1)
    return first - second


def names_of(examples: Examples) -> list[str]:
    """What the examples are called in batches: a bare text by its place."""
    return [example.id if isinstance(example, Example) else str(place) for place, example in enumerate(examples)]


def _example(example: Example | str, place: int) -> Example:
    if not isinstance(example, Example):
        raise MoELensError(
            f"text {place} has no answer, which the target is of; give examples, or a target of your own: a function "
            "of the logits after each prompt"
        )
    return example


def _rivals(example: Example | str, place: int) -> tuple[str, str]:
    """What the context and what memory answer."""
    own = _example(example, place)
    if own.original_answer is None or own.original_answer == own.answers[0]:
        raise MoELensError(
            f"example {own.id!r} has no original_answer, what memory says, that differs from its answer, and the "
            "target is their difference; leave such examples out, or take the target 'answer'"
        )
    return own.answers[0], own.original_answer
