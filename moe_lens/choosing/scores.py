"""Scores that rank experts, by name: the paper's context-dependence ratio and what competes with it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moe_lens import statistics

if TYPE_CHECKING:
    from moe_lens.lens.needs import Statistic


@dataclass(frozen=True)
class Score:
    """A number for every expert by which they are ranked; a new one is an entry of SCORES.

    about: what it says. of: the model it is about: the "tuned" one, the "base" one, or "gain", tuned minus base.
    statistic: makes the statistic that measures it. column: of that statistic's table, which has layer and expert.
    """

    name: str
    about: str
    of: Literal["tuned", "base", "gain"]
    statistic: "Callable[[], Statistic]"
    column: str = "score"

    @property
    def needs_base(self) -> bool:
        return self.of != "tuned"

    @property
    def needs_tuned(self) -> bool:
        return self.of != "base"


def _usages(prefix: str, of: Literal["tuned", "base", "gain"], what: str) -> list[Score]:
    """The frequency of selection at several positions, and by gating weight."""
    return [
        Score(prefix, f"{what}, all tokens", of, lambda: statistics.ExpertUsage()),
        Score(
            f"{prefix}-last",
            f"{what}, the answer-predicting position",
            of,
            lambda: statistics.ExpertUsage(positions="last"),
        ),
        Score(
            f"{prefix}-question",
            f"{what}, the question's tokens",
            of,
            lambda: statistics.ExpertUsage(positions="question"),
        ),
        Score(
            f"{prefix}-mass",
            f"{what}, all tokens, by gating weight",
            of,
            lambda: statistics.ExpertUsage(value="gating_weight"),
        ),
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
        ),
        Score(
            "esft-gate",
            "ESFT's gate score: softmax probability, base model",
            "base",
            lambda: statistics.ExpertUsage(reduce="token", value="gate"),
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
