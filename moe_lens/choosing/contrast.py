"""Contrast: how much more often the base model selects an expert on one side than on the other; no labels needed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import pandas as pd

from moe_lens.causal.evaluation import evaluate
from moe_lens.choosing.procedures import Examples, Load, Procedure, expect_answers
from moe_lens.data import Example, load_examples, without_context
from moe_lens.data.files import text_lines
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens
from moe_lens.lens.positions import SPANNED, Positions
from moe_lens.metrics import risk_difference
from moe_lens.results import data_digest
from moe_lens.statistics import RoutingVectors

WITH_CONTEXT = ("context", "no_context")
ANSWERED = ("right", "wrong")
"""Words for sides that are made of the examples themselves."""
Side = str | tuple[Example | str, ...]


@dataclass(frozen=True)
class Contrast(Procedure):
    """The activation rate on the first side minus the second (SteerMoE's risk difference, Fayyaz et al. 2025).

    first, second: "context" and "no_context", the examples and the same without their contexts; "right" and "wrong",
        those that the model answers so (EM); the name of data, `DATA[column=value]` for a part of it; or, in Python,
        examples or bare texts.
    positions: whose tokens count; bare texts have "all" and "last" only.
    """

    first: Side = "context"
    second: Side = "no_context"
    positions: Positions = "question"

    @classmethod
    def of(cls, text: str, positions: Positions) -> "Contrast":
        """As written between brackets, FIRST;SECOND; MoELensError for anything else."""
        sides = [part.strip() for part in text.split(";")]
        if len(sides) != 2 or not all(sides) or sides[0] == sides[1]:
            raise MoELensError(
                f"a contrast is of two different sides, such as contrast(novel;swap), contrast(a.txt;b.txt), "
                f"contrast(DATA[column=value];DATA[column=other]) or contrast(wrong;right); got ({text})"
            )
        return cls(sides[0], sides[1], positions)

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.first, self.second

    @property
    def settings(self) -> dict[str, object]:
        told = [side if isinstance(side, str) else data_digest(side) for side in self.sides]
        return {"first": told[0], "second": told[1], "positions": self.positions}

    def facts(self, load: Load) -> dict[str, Any]:
        named = [side for side in self.sides if isinstance(side, str) and side not in WITH_CONTEXT + ANSWERED]
        return self.settings | {"data": {side: data_digest(load(side)) for side in named}}

    @classmethod
    def tables(
        cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load, batch_size: int | None
    ) -> list[pd.DataFrame]:
        @cache
        def answered() -> list[bool]:
            asked = expect_answers(examples)
            return list(evaluate(lens, asked, metrics=["em"], batch_size=batch_size).answers["em"] == 1)

        def members(side: Side) -> Examples:
            if side in ANSWERED:
                return [own for own, right in zip(examples, answered(), strict=True) if right == (side == "right")]
            if side in WITH_CONTEXT:
                return [with_context(own, place, keep=side == "context") for place, own in enumerate(examples)]
            return load(side) if isinstance(side, str) else side

        @cache
        def vectors(side: Side) -> dict[Positions, pd.DataFrame]:
            where = dict.fromkeys(own.positions for own in wanted if side in own.sides)
            found = _expect(members(side), side, where)
            measured = lens.measure(found, *(RoutingVectors(positions=one) for one in where), batch_size=batch_size)
            return {one: statistic.table() for one, statistic in zip(where, measured, strict=True)}

        found = [_difference(*(vectors(side)[own.positions] for side in own.sides)) for own in wanted]
        for own in wanted:
            first, second = map(members, own.sides)
            if list(first) == list(second):
                told = " and ".join(side if isinstance(side, str) else "what is given" for side in own.sides)
                raise MoELensError(f"a contrast is of two different sides; {told} are the same examples")
        return found

    @classmethod
    def passes(cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load) -> float:
        sides = {side for own in wanted for side in own.sides}
        answered = len(examples) if sides & {*ANSWERED} else 0
        made = [examples if side in ANSWERED + WITH_CONTEXT else load(side) if isinstance(side, str) else side
                for side in sides]  # fmt: skip
        return (answered + sum(map(len, made))) / max(1, len(examples))


def load_prompts(spec: str, *, split: str = "train") -> Examples:
    """Data by its name, as `load_examples`; a .txt file (UTF-8) is one bare text a line, blank lines aside."""
    if not spec.endswith(".txt"):
        return load_examples(spec, split=split)
    lines = (part for line in text_lines(spec) for part in re.split(r"\r\n|\r|\n", line))
    return [line for line in lines if line.strip()]


def with_context(example: Example | str, place: int, *, keep: bool) -> Example:
    """The example, or the same question without its context; MoELensError for one that has none to leave out."""
    bare = without_context(example) if isinstance(example, Example) else None
    if not isinstance(example, Example) or bare is None:
        name = f"example {example.id!r}" if isinstance(example, Example) else f"text {place}"
        raise MoELensError(
            f"{name} has no context to leave out; contrast two data sets or lists of texts instead: "
            "contrast-last(FIRST;SECOND)"
        )
    return example if keep else bare


def _expect(found: Examples, side: Side, where: Sequence[Positions] | dict[Positions, None]) -> Examples:
    """The members of a side; MoELensError for none, or without the span that is counted."""
    called = repr(side) if isinstance(side, str) else "one side"
    if not found:
        raise MoELensError(f"a contrast has examples on both sides; {called} has none")
    spanned = [one for one in where if one in SPANNED]
    bare = next((place for place, own in enumerate(found) if isinstance(own, str)), None)
    if spanned and bare is not None:
        raise MoELensError(
            f"text {bare} of {called} has no {spanned[0]} whose tokens could be counted; take contrast-all or "
            "contrast-last"
        )
    return found


def _difference(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """layer, expert, score, score_low, score_high."""
    table = risk_difference(first, second)
    return table.rename(columns=lambda name: name.replace("risk_difference", "score")).drop(columns=["first", "second"])
