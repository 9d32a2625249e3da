"""What a lens says to examples under interventions: by all processes, in parts that outlive an interruption."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate.utils import gather_object

from moe_lens.data import Example, encode
from moe_lens.data.thoughts import without_thoughts
from moe_lens.decoding import PLAIN, Decoding
from moe_lens.lens.interventions import Intervention
from moe_lens.lens.lens import MoELens
from moe_lens.lens.parallel import connected
from moe_lens.metrics.catalogue import ANSWER, OPTIONS, PREDICTION, RIVALS
from moe_lens.progress import progress_bar
from moe_lens.results import kept
from moe_lens.storage import as_json, try_folder

SHARD_BATCHES = 8
"""Batches in a part: what an interruption can cost, and the share that one process takes at a time."""


@dataclass(frozen=True)
class Run:
    """How a lens is asked (answers end before `stop`), and where parts are kept (None: nowhere) by which provenance.

    decoding: how it comes by its answers, and by the log-probabilities of given ones.
    """

    max_new_tokens: int
    batch_size: int
    out: Path | None
    provenance: dict[str, Any]
    progress: bool = True
    stop: tuple[str, ...] = ()
    decoding: Decoding = PLAIN


@dataclass(frozen=True)
class _Unit:
    """A share of the work: one intervention, one thing that is read, one shard of the examples (their places)."""

    intervention: str
    reads: str
    shard: int
    places: tuple[int, ...]

    def file(self, made_by: Mapping[str, Any]) -> str:
        """A file name, different for different units and for what is made in different ways."""
        readable = re.sub(r"[^A-Za-z0-9._-]+", "_", self.intervention)[:60]
        told = as_json([self.intervention, {name: fact for name, fact in made_by.items() if name != "command"}])
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
        return f"{readable}-{digest}-{self.reads}-{self.shard:05}.parquet"


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
    launched take turns, and all get everything. Batches are the same whatever the number of processes.
    """
    longest_first = sorted(range(len(examples)), key=lambda i: -len(examples[i].context) - len(examples[i].question))
    size = run.batch_size * SHARD_BATCHES
    shards = [tuple(longest_first[start : start + size]) for start in range(0, len(examples), size)]
    units = [
        _Unit(name, what, number, places)
        for name in interventions
        for what in reads
        for number, places in enumerate(shards)
    ]
    state = connected()
    if run.out is not None and state.is_main_process:
        try_folder(run.out)
    own = units[state.process_index :: state.num_processes]
    found = []
    with progress_bar(total=sum(len(unit.places) for unit in own), unit="answer", disable=not run.progress) as bar:
        for unit in own:
            bar.set_description(unit.intervention, refresh=False)
            found.append((unit, _outputs(lens, examples, unit, interventions[unit.intervention], run)))
            bar.update(len(unit.places))
    gathered: dict[tuple[str, str], dict[int, Any]] = {}
    for unit, values in gather_object(found):
        gathered.setdefault((unit.intervention, unit.reads), {}).update(zip(unit.places, values, strict=True))
    return {key: [values[place] for place in sorted(values)] for key, values in gathered.items()}


def _outputs(
    lens: MoELens, examples: Sequence[Example], unit: _Unit, interventions: Sequence[Intervention], run: Run
) -> list[Any]:
    """One unit's outputs: read where its part was made in the same way, else computed, and kept."""
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
        rows = unit.places  # of `Rows`: an example has one for each text that the lens is given for it
        if unit.reads == OPTIONS:
            rows = tuple(place for place in unit.places for _ in examples[place].options)
        if unit.reads == RIVALS:
            rows = tuple(place for place in unit.places for _ in _rivals(lens, examples[place]))
        read = READERS[unit.reads]
        with lens.intervene(*(intervention.take(rows) for intervention in interventions)):
            return pd.DataFrame({"id": [example.id for example in asked], "output": list(read(lens, asked, run))})

    found = kept(part, made_by, computed)["output"]
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


def option_log_probabilities(lens: MoELens, examples: Sequence[Example], run: Run) -> list[tuple[float, ...] | None]:
    """The log-probability (nats) of each example's options after its prompt, end-of-sequence not counted.

    None for an example without options.
    """
    asked = [replace(example, answers=(option,)) for example in examples for option in example.options]
    found = iter(_log_probabilities(lens, asked, run))
    return [tuple(next(found) for _ in example.options) or None for example in examples]


def answer_log_probabilities(lens: MoELens, examples: Sequence[Example], run: Run) -> list[float]:
    """The log-probability (nats) of each example's first gold answer after its prompt, end-of-sequence not counted."""
    return _log_probabilities(lens, examples, run)


def rival_log_probabilities(lens: MoELens, examples: Sequence[Example], run: Run) -> list[tuple[float, float] | None]:
    """The log-probabilities (nats) of the first tokens of each example's gold answer and of what memory says.

    Their difference is that of their logits. None for an example without memory, or where both are one token.
    """
    asked = [_rivals(lens, example) for example in examples]  # ids may repeat
    both = [rival for rivals in asked for rival in rivals]
    if not both:
        return [None] * len(examples)
    found = iter(_log_probabilities(lens, both, run, first_token=True))
    return [(next(found), next(found)) if rivals else None for rivals in asked]


def _log_probabilities(
    lens: MoELens, examples: Sequence[Example], run: Run, *, first_token: bool = False
) -> list[float]:
    return run.decoding.answer_log_probabilities(
        lens, examples, batch_size=run.batch_size, progress=False, with_end=False, first_token=first_token
    )


def _rivals(lens: MoELens, example: Example) -> tuple[Example, ...]:
    """The example with its gold answer, and with what memory says; nothing where their first tokens do not differ."""
    both = tuple(replace(example, answers=(text,)) for text in (example.answers[0], *example.memory[:1]))
    encoded = (encode(one, lens.tokenizer, template=lens.template, with_answer=True) for one in both)
    first = {one.input_ids[one.prompt_length] for one in encoded}
    return both if len(first) == 2 else ()


READERS: dict[str, Callable[[MoELens, Sequence[Example], Run], Sequence[Any]]] = {
    PREDICTION: predictions,
    OPTIONS: option_log_probabilities,
    ANSWER: answer_log_probabilities,
    RIVALS: rival_log_probabilities,
}
"""How each thing that metrics read is got."""
