"""Scores that rank experts, by name: the paper's context-dependence ratio and what competes with it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moe_lens import statistics

if TYPE_CHECKING:
    from moe_lens.lens.needs import Statistic


@dataclass(frozen=True, repr=False)
class Score:
    """A number for every expert by which they are ranked; a new one is an entry of SCORES.

    about: what it says. of: the model it is about: the "tuned" one, the "base" one, or "gain", tuned minus base.
    statistic: makes the statistic that measures it. column: of that statistic's table, which has layer and expert.
    sums_to_one: whether it is a share, so that a layer's experts together have 1 (or what weights leave of it).
    """

    name: str
    about: str
    of: Literal["tuned", "base", "gain"]
    statistic: "Callable[[], Statistic]"
    column: str = "score"
    sums_to_one: bool = False

    def __repr__(self) -> str:
        return f"Score({self.name!r}, {self.about!r}, of={self.of!r})"

    @property
    def needs_base(self) -> bool:
        return self.of != "tuned"

    @property
    def needs_tuned(self) -> bool:
        return self.of != "base"


def _usages(prefix: str, of: Literal["tuned", "base", "gain"], what: str) -> list[Score]:
    """The frequency of selection at several positions, and by gating weight."""
    shares = of != "gain"
    kinds: list[tuple[str, str, Callable[[], Statistic]]] = [
        ("", "all tokens", lambda: statistics.ExpertUsage()),
        ("-last", "the answer-predicting position", lambda: statistics.ExpertUsage(positions="last")),
        ("-question", "the question's tokens", lambda: statistics.ExpertUsage(positions="question")),
        ("-mass", "all tokens, by gating weight", lambda: statistics.ExpertUsage(value="gating_weight")),
    ]
    return [
        Score(prefix + end, f"{what}, {where}", of, statistic, sums_to_one=shares) for end, where, statistic in kinds
    ]


SCORES: Mapping[str, Score] = {
    score.name: score
    for score in (
        *_usages("ce", "tuned", "context-dependence ratio, Eq. 8: frequency in the tuned model"),
        *_usages("ce-gain", "gain", "gain of the frequency over the base model"),
        *_usages("oe", "base", "selection frequency in the base model"),
        Score(
            "esft-token",
            "ESFT's token score: all tokens alike, base model",
            "base",
            lambda: statistics.ExpertUsage(reduce="token"),
            sums_to_one=True,
        ),
        Score(
            "esft-gate",
            "ESFT's gate score: softmax probability, base model",
            "base",
            lambda: statistics.ExpertUsage(reduce="token", value="gate"),
            sums_to_one=True,
        ),
        Score(
            "reap",
            "REAP's saliency: mean of gating weight times norm of the output, base model",
            "base",
            lambda: statistics.ExpertSaliency(),
            "reap",
        ),
        Score(
            "ean",
            "EAN's saliency: summed norm of the output, base model",
            "base",
            lambda: statistics.ExpertSaliency(),
            "ean",
        ),
    )
}
"""Every score by its name: `ce` is the paper's context-faithful experts, `oe` its original experts."""
