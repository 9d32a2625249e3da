"""What a lens says to examples under interventions: by all processes, in parts that outlive an interruption."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.data import Example, PromptTemplate, encode
from moe_lens.data.thoughts import without_thoughts
from moe_lens.decoding import PLAIN, Decoding
from moe_lens.lens.interventions import Intervention
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import connected, gathered, kept_by_all, part_of_work
from moe_lens.metrics.catalogue import ANSWER, OPTIONS, PREDICTION, RIVALS, Metric
from moe_lens.progress import progress_bar
from moe_lens.storage import as_json, try_folder

PARTS = 16
"""Into how many the examples are cut where there are few: processes then have as much to do, and little can be lost."""


@dataclass(frozen=True)
class Run:
    """How a lens is asked (answers end before `stop`), and where parts are kept (None: nowhere) by which provenance.

    batches: at most in a part, which is what an interruption can cost, and the share that one process takes at a time.
    decoding: how it comes by its answers, and by the log-probabilities of given ones.
    """

    max_new_tokens: int
    batch_size: int
    out: Path | None
    provenance: dict[str, Any]
    progress: bool = True
    stop: tuple[str, ...] = ()
    batches: int = 8
    decoding: Decoding = PLAIN

    def shards(self, count: int) -> Iterator[range]:
        """So many places in parts of whole batches, `PARTS` or more where they suffice; the same for any processes."""
        size = self.batch_size * min(self.batches, math.ceil(count / self.batch_size / PARTS))
        return (range(start, min(start + size, count)) for start in range(0, count, size))


@dataclass(frozen=True)
class _Unit:
    """A share of the work: one intervention, one thing that is read, one shard of the examples (their places).

    shard: where these stand among all of them, sorted.
    """

    intervention: str
    reads: str
    shard: range
    places: tuple[int, ...]

    def file(self, made_by: Mapping[str, Any]) -> str:
        """A file name, different for different units and for what is made in different ways."""
        readable = re.sub(r"[^A-Za-z0-9._-]+", "_", self.intervention)[:60]
        told = as_json([self.intervention, {name: fact for name, fact in made_by.items() if name != "command"}])
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
        return f"{readable}-{digest}-{self.reads}-{self.shard.start:06}-{self.shard.stop:06}.parquet"


def outputs(
    lens: MoELens,
    examples: Sequence[Example],
    interventions: Mapping[str, Sequence[Intervention]],
    reads: Sequence[str],
    run: Run,
) -> dict[tuple[str, str], list[Any]]:
    """By intervention and what is read, its outputs in the order of the examples.

    reads: of "prediction" (the greedy continuation, stripped), "options" (the log-probability of each option, nats;
        None for an example without options), "answer" (that of the first gold answer) and "rivals" (those of the first
        tokens of that answer and of what memory says; None for an example without memory).

    Examples are sorted by length, the longest first, and cut into shards; the processes that torchrun or accelerate
    launched take turns, and all get everything. Batches are the same whatever the number of processes. A shard is done
    under all interventions before the next, so that what they `Remembered` of it serves them all.
    """
    longest_first = sorted(range(len(examples)), key=lambda i: -len(examples[i].context) - len(examples[i].question))
    units = {
        what: [
            _Unit(name, what, shard, tuple(longest_first[shard.start : shard.stop]))
            for shard in run.shards(len(examples))
            for name in interventions
        ]
        for what in reads
    }
    rivals = [_rivals(lens, example) for example in examples] if RIVALS in reads else []
    start, of = share = part_of_work(lens.module)
    if run.out is not None and connected().is_main_process:
        try_folder(run.out)
    # in turns within each kind, which take unlike times, and the first turns go round
    dealt = [unit for kind, several in enumerate(units.values()) for unit in several[(start + kind) % of :: of]]
    own = sorted(dealt, key=lambda unit: unit.shard.start)

    def found() -> Iterator[tuple[_Unit, list[Any]]]:
        with progress_bar(total=sum(len(unit.places) for unit in own), unit="answer", disable=not run.progress) as bar:
            for unit in own:
                bar.set_description(unit.intervention, refresh=False)
                yield unit, _outputs(lens, examples, unit, interventions[unit.intervention], run, rivals)
                bar.update(len(unit.places))

    whole: dict[tuple[str, str], dict[int, Any]] = {}
    for unit, values in gathered(found(), share):
        whole.setdefault((unit.intervention, unit.reads), {}).update(zip(unit.places, values, strict=True))
    return {key: [values[place] for place in sorted(values)] for key, values in whole.items()}


def _outputs(
    lens: MoELens,
    examples: Sequence[Example],
    unit: _Unit,
    interventions: Sequence[Intervention],
    run: Run,
    rivals: Sequence[tuple[int, ...]],
) -> list[Any]:
    """One unit's outputs: read where its part was made in the same way, else computed, and kept.

    rivals: of every example, where they are read; worked out once and not under each intervention.
    """
    made_by = run.provenance | {
        "interventions": [intervention.digest for intervention in interventions if run.out],
        "template": lens.template.facts(),
        "batch_size": run.batch_size,
        "max_new_tokens": run.max_new_tokens,
        **({"stop": list(run.stop)} if run.stop else {}),
        **({} if run.decoding == PLAIN else {"decoding": str(run.decoding)}),
    }
    part = None if run.out is None else run.out / "parts" / unit.file(made_by)
    asked = [examples[place] for place in unit.places]

    def computed() -> pd.DataFrame:
        read: Callable[[MoELens, Sequence[Example], Run], Sequence[Any]]
        rows = unit.places  # of `Rows`: an example has one for each text that the lens is given for it
        if unit.reads == RIVALS and run.decoding == PLAIN:
            rows = tuple(place for place in unit.places if rivals[place])
            read = partial(rival_log_probabilities, tokens=[rivals[place] for place in unit.places])
        elif unit.reads == PREDICTION:
            read = predictions
        else:
            read = READINGS[unit.reads]
            rows = tuple(place for place in unit.places for _ in read.asked(lens, examples[place]))
        with lens.intervene(*(intervention.take(rows) for intervention in interventions)):
            return pd.DataFrame({"id": [example.id for example in asked], "output": list(read(lens, asked, run))})

    found = kept_by_all(part, made_by, computed, lens.module)["output"]
    return [tuple(value) if value is not None and unit.reads in (OPTIONS, RIVALS) else value for value in found]


def predictions(lens: MoELens, examples: Sequence[Example], run: Run) -> list[str]:
    """The greedy continuations, without the thoughts in them and the space around them."""
    texts = run.decoding.generate(
        lens,
        examples,
        max_new_tokens=run.max_new_tokens,
        stop=run.stop,
        batch_size=run.batch_size,
        progress=False,
    )
    return [without_thoughts(text).strip() for text in texts]


def without_reasoning(examples: Sequence[Example], template: PromptTemplate) -> list[Example]:
    """The examples as predictions of them are scored: of each gold answer that holds a match, what comes after it."""
    if not template.answer_after:
        return list(examples)
    return [
        replace(example, answers=tuple(template.answered(gold) or gold for gold in example.answers), options=())
        for example in examples
    ]


def scores(metric: Metric, values: Sequence[Any], examples: Sequence[Example], template: PromptTemplate) -> list[float]:
    """The score of each example, of what the metric reads of it; a prediction that has no answer is empty."""
    if metric.reads == PREDICTION:
        values = [template.answered(value) or "" for value in values]
        examples = without_reasoning(examples, template)
    return metric.scores(values, examples)


@dataclass(frozen=True)
class Reading:
    """What is read of the log-probabilities (nats) of given answers, end-of-sequence not counted.

    asked: the example once for each answer, that one its first gold answer; ids may repeat. first_token: whether only
    the answers' first tokens count. value: what is read of an example's log-probabilities.
    """

    asked: Callable[[MoELens, Example], Sequence[Example]]
    value: Callable[[tuple[float, ...]], Any]
    first_token: bool = False

    def __call__(self, lens: MoELens, examples: Sequence[Example], run: Run) -> list[Any]:
        """What is read of each example, as the lens is."""
        asked = [self.asked(lens, example) for example in examples]
        texts, settings = list(chain.from_iterable(asked)), self._settings(run.batch_size, progress=False)
        found = run.decoding.answer_log_probabilities(lens, texts, **settings) if texts else []
        return self._by_example(asked, found)

    def under(
        self,
        lens: MoELens,
        examples: Sequence[Example],
        masks: Sequence[Intervention | Sequence[Intervention]],
        *,
        batch_size: int,
        progress: bool,
    ) -> list[list[Any]]:
        """What is read of each example under each mask, [mask][example]."""
        asked = [self.asked(lens, example) for example in examples]
        texts, settings = list(chain.from_iterable(asked)), self._settings(batch_size, progress=progress)
        found = lens.answer_log_probabilities_under(texts, masks, **settings) if texts else [[] for _ in masks]
        return [self._by_example(asked, of_mask) for of_mask in found]

    def _settings(self, batch_size: int, *, progress: bool) -> dict[str, Any]:
        """How a lens is asked."""
        return {
            "with_end": False,
            "first_token": self.first_token,
            "batch_size": batch_size,
            "progress": progress,
        }

    def _by_example(self, asked: Sequence[Sequence[Example]], found: Iterable[float]) -> list[Any]:
        """What is read of the log-probabilities of all answers, one after another."""
        each = iter(found)
        return [self.value(tuple(islice(each, len(several)))) for several in asked]


def rival_log_probabilities(
    lens: MoELens, examples: Sequence[Example], run: Run, *, tokens: Sequence[tuple[int, ...]]
) -> list[tuple[float, ...] | None]:
    """The log-probabilities (nats) of the first tokens of each example's gold answer and of what memory says.

    tokens: these two, as `_rivals` gives them; None is found where there are none. Their difference is that of their
    logits.
    """
    asked = [(example, pair) for example, pair in zip(examples, tokens, strict=True) if pair]
    if not asked:
        return [None] * len(examples)
    found = iter(
        lens.next_token_log_probabilities(*zip(*asked, strict=True), batch_size=run.batch_size, progress=False)
    )
    return [tuple(next(found)) if pair else None for pair in tokens]


def _both_answered(example: Example) -> list[Example]:
    """The example with its gold answer, and with what memory says."""
    return [replace(example, answers=(text,), options=()) for text in (example.answers[0], *example.memory[:1])]


def _rivals(lens: MoELens, example: Example) -> tuple[int, ...]:
    """The first tokens of the gold answer and of what memory says; nothing where there are not two."""
    first = first_tokens(lens, example, (example.answers[0], *example.memory[:1]))
    return first if len(set(first)) == 2 else ()


def first_tokens(lens: MoELens, example: Example, texts: Sequence[str]) -> tuple[int, ...]:
    """The first token of each of these answers to an example."""
    encoded = (encode(example, lens.tokenizer, template=lens.template, continuation=text) for text in texts)
    return tuple(one.input_ids[one.prompt_length] for one in encoded)


READINGS = {
    OPTIONS: Reading(
        lambda _, example: [replace(example, answers=(option,)) for option in example.options],
        lambda found: found or None,
    ),
    ANSWER: Reading(lambda _, example: [example], lambda found: found[0]),
    RIVALS: Reading(
        lambda lens, example: _both_answered(example) if _rivals(lens, example) else (),
        lambda found: found or None,
        first_token=True,
    ),
}
"""What metrics read of answers that are given; the difference of two rivals is that of their logits."""
