"""Demonstrations for prompts, as one word of a command names them: `counterfactual:16:swap`."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from itertools import islice

from moe_lens.data.counterparts import memory_said
from moe_lens.data.example import Example
from moe_lens.data.ingest import load_examples
from moe_lens.errors import MoELensError


def original(example: Example) -> Example | None:
    """The example with what memory says, as its context says then too; as it is where it contradicts no memory."""
    if not example.memory:
        return example
    said = memory_said(example)
    return said and replace(said, answers=example.memory[:1], original_answer=None, original_aliases=(), options=())


def counterfactual(example: Example) -> Example | None:
    """The example, if its context contradicts memory."""
    return example if example.memory else None


KINDS: Mapping[str, Callable[[Example], Example | None]] = {"original": original, "counterfactual": counterfactual}
"""What is made of an example to show it, by name; None for one that makes none."""


def demonstrations_of(kind: str, count: int, examples: Iterable[Example]) -> tuple[Example, ...]:
    """The first so many of the examples that make demonstrations of this kind; MoELensError where there are fewer."""
    made = (one for example in examples if (one := KINDS[kind](example)) is not None)
    found = tuple(islice(made, count))
    if len(found) < count:
        raise MoELensError(
            f"only {len(found)} of the examples make {kind} demonstrations, which need an original_answer"
            f"{' in the context' if kind == 'original' else ''}; ask for fewer than {count}, or of other data"
        )
    return found


@cache
def demonstrations_named(text: str) -> tuple[Example, ...]:
    """Those that KIND:COUNT:DATA names, of the training examples of DATA; MoELensError for anything else."""
    kind, _, rest = text.partition(":")
    count, _, data = rest.partition(":")
    if kind not in KINDS or not re.fullmatch(r"\d{1,9}", count) or not int(count) or not data.strip():
        raise MoELensError(
            f"demonstrations are {' or '.join(KINDS)}, how many and of which data, such as counterfactual:16:swap; got "
            f"{text!r}"
        )
    return demonstrations_of(kind, int(count), load_examples(data, split="train"))
