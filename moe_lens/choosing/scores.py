"""Scores that rank experts, by name: the paper's context-dependence ratio and what competes with it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from moe_lens.data import Example
from moe_lens.lens.lens import MoELens
from moe_lens.statistics import ExpertUsage

Usage = tuple[str, str, str]  # reduce, positions, value: the settings of an ExpertUsage


@dataclass(frozen=True)
class Score:
    """How a score is counted: an `ExpertUsage` of the tuned model, of the base model, or the first minus the second."""

    name: str
    of: Literal["tuned", "base", "gain"]
    positions: str
    value: str
    reduce: str
    about: str

    @property
    def usage(self) -> Usage:
        return self.reduce, self.positions, self.value

    @property
    def needs_base(self) -> bool:
        return self.of != "tuned"

    @property
    def needs_tuned(self) -> bool:
        return self.of != "base"


def _named(prefix: str, of: Literal["tuned", "base", "gain"], what: str) -> list[Score]:
    kinds = (
        ("", "all", "frequency", "all tokens"),
        ("-last", "last", "frequency", "the answer-predicting position"),
        ("-question", "question", "frequency", "the question's tokens"),
        ("-mass", "all", "gating_weight", "all tokens, by gating weight"),
    )
    return [
        Score(prefix + end, of, positions, value, "sample", f"{what}, {where}")
        for end, positions, value, where in kinds
    ]


SCORES: Mapping[str, Score] = {
    score.name: score
    for score in (
        *_named("ce", "tuned", "context-dependence ratio, Eq. 8: frequency in the tuned model"),
        *_named("ce-gain", "gain", "gain of the frequency over the base model"),
        *_named("oe", "base", "selection frequency in the base model"),
        Score(
            "esft-token",
            "base",
            "all",
            "frequency",
            "token",
            "ESFT's token score: all tokens alike, base model",
        ),
        Score("esft-gate", "base", "all", "gate", "token", "ESFT's gate score: softmax probability, base model"),
    )
}
"""Every score by its name: `ce` is the paper's context-faithful experts, `oe` its original experts."""


def measure_usage(
    lens: MoELens,
    examples: Sequence[Example],
    scores: Iterable[Score],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[Usage, pd.DataFrame]:
    """One pass over `examples`: the usage table (layer, expert, score) of every setting that `scores` count with."""
    settings = list(dict.fromkeys(score.usage for score in scores))
    if not settings:
        return {}
    usages = [ExpertUsage(reduce, positions, value=value) for reduce, positions, value in settings]
    measured = lens.measure(examples, *usages, batch_size=batch_size, progress=progress)
    return {setting: usage.table() for setting, usage in zip(settings, measured, strict=True)}


def score_table(
    score: Score, *, base: Mapping[Usage, pd.DataFrame], tuned: Mapping[Usage, pd.DataFrame]
) -> pd.DataFrame:
    """The score of every expert: columns layer, expert, score. `base`, `tuned`: what `measure_usage` gave."""
    if score.of == "base":
        return base[score.usage]
    table = tuned[score.usage]
    if score.of == "gain":
        table = table.assign(score=table["score"] - base[score.usage]["score"])
    return table
