"""Scores that rank experts, by name: the paper's context-dependence ratio and what competes with it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from moe_lens import statistics
from moe_lens.errors import MoELensError

if TYPE_CHECKING:
    from moe_lens.choosing.procedures import Procedure
    from moe_lens.lens.gradients import Effect
    from moe_lens.lens.needs import Statistic
    from moe_lens.lens.positions import Positions

IN_SHORT = (
    "ce, oe and ce-gain (each also with -last, -question, -mass after it), esft-token, esft-gate, reap, ean, contrast "
    "(-all, -from_question, -last), attribution, attribution-add and attribution-logit (each also with -integrated, "
    "and then with -question, -from_question, -last), step and step-gain (-question, -last), effect, effect-tuned, "
    "forced, dla; some take something in brackets, such as contrast(novel;swap) and attribution(answer)"
)
"""The names of SCORES for help, whose columns are narrow: long names would be cut."""
STEPS = 4
"""Of integrated gradients."""


@dataclass(frozen=True, repr=False)
class Score:
    """A number for every expert by which they are ranked; a new one is an entry of SCORES.

    about: what it says. of: the model it is about: the "tuned" one, the "base" one, "gain", tuned minus base, or
        "model", the one at hand, tuned or not.
    statistic: makes the statistic, or procedure, that measures it. column: of its table, which has layer and expert.
    sums_to_one: whether it is a share, so that a layer's experts together have 1 (or what weights leave of it).
    takes: what can be given in brackets after its name, empty for nothing; argument: what was, for `statistic`.
    """

    name: str
    about: str
    of: Literal["tuned", "base", "gain", "model"]
    statistic: "Callable[..., Statistic | Procedure]"
    column: str = "score"
    sums_to_one: bool = False
    takes: str = ""
    argument: str | None = None

    def __repr__(self) -> str:
        return f"Score({self.name!r}, {self.about!r}, of={self.of!r})"

    def __reduce__(self) -> "tuple[Callable[[str], Score], tuple[str]]":
        """Its name, by which another process finds it."""
        return score_named, (self.name,)

    @property
    def needs_base(self) -> bool:
        return self.of in ("base", "gain")

    @property
    def needs_tuned(self) -> bool:
        return self.of != "base"

    def measured_by(self) -> "Statistic | Procedure":
        """A new statistic, or the procedure; MoELensError for an argument that it does not take."""
        return self.statistic() if self.argument is None else self.statistic(self.argument)

    def given(self, argument: str) -> "Score":
        """The score NAME(argument); MoELensError where it takes no such one."""
        if not self.takes:
            raise MoELensError(f"{self.name} takes nothing in brackets; got ({argument})")
        found = replace(self, name=f"{self.name}({argument})", about=f"{self.about}: {argument}", argument=argument)
        found.measured_by()
        return found


def score_named(text: str) -> Score:
    """The score of a name, or of NAME(ARGUMENT); MoELensError for any other."""
    whole = re.fullmatch(r"([\w-]+)\((.*)\)", text)
    name = whole[1] if whole else text
    if name not in SCORES:
        raise MoELensError(f"scores are {', '.join(SCORES)}; got {text!r}")
    return SCORES[name].given(whole[2]) if whole else SCORES[name]


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


SPANS: "tuple[tuple[str, Positions, str], ...]" = (
    ("", "all", "all tokens"),
    ("-question", "question", "the question's tokens"),
    ("-from_question", "from_question", "from the question on"),
    ("-last", "last", "the answer-predicting position"),
)
"""How names end, and the positions that they mean."""


def _contrasts() -> list[Score]:
    """Where no labels are needed; the question's tokens are those that count if nothing else is said."""

    def contrast(positions: "Positions", sides: str = "context;no_context") -> "Procedure":
        from moe_lens.choosing.contrast import Contrast

        return Contrast.of(sides, positions)

    ends = [("-all" if not end else "" if end == "-question" else end, where, told) for end, where, told in SPANS]
    about = "activation rate with minus without the context, or of two sides, base model, "
    return [
        Score(f"contrast{end}", about + told, "base", partial(contrast, where), takes="FIRST;SECOND")
        for end, where, told in sorted(ends)
    ]


def _attributions() -> list[Score]:
    """By gradients of a target, in the base model."""

    def attributed(effect: "Effect", positions: "Positions", steps: int, target: str = "difference") -> "Procedure":
        from moe_lens.causal.attributing import Attribution
        from moe_lens.choosing.procedures import Attributed

        return Attributed(Attribution(effect, positions, target, steps))

    target = "log p(context answer) - log p(memory answer), or of another target"
    kinds: list[tuple[str, Effect, int, str]] = [
        ("attribution", "gate", 1, f"gating weight times gradient of {target}"),
        ("attribution-integrated", "gate", STEPS, f"integrated gradients over gating weights of {target}"),
        ("attribution-add", "output", 1, f"output of any expert times gradient of {target}"),
        ("attribution-add-integrated", "output", STEPS, f"output times gradient over gating weights of {target}"),
        ("attribution-logit", "logit", 1, f"gradient with respect to router logits of {target}"),
        ("attribution-logit-integrated", "logit", STEPS, f"integrated gradients of router logits of {target}"),
    ]
    return [
        Score(name + end, f"{about}, {told}", "base", partial(attributed, effect, where, steps), takes="TARGET")
        for name, effect, steps, about in kinds
        for end, where, told in SPANS
    ]


def _steps() -> list[Score]:
    """What a first step of router tuning would bring."""

    def step(positions: "Positions") -> "Procedure":
        from moe_lens.choosing.router_step import RouterStep

        return RouterStep(positions)

    about = "one gradient step of the base model's routers on log p(answer)"
    kinds = (("step", f"frequency after {about}", "score"), ("step-gain", f"gain of the frequency by {about}", "gain"))
    return [
        Score(name + end, f"{what}, {told}", "base", partial(step, where), column)
        for name, what, column in kinds
        for end, where, told in SPANS
        if where != "from_question"
    ]


def _effects() -> list[Score]:
    """What masking one expert costs, in both models, what forcing one gains, and what one writes to the logits."""

    def single(mode: str = "zero") -> "Procedure":
        from moe_lens.choosing.procedures import SingleEffects

        return SingleEffects(mode)

    def direct() -> "Procedure":
        from moe_lens.choosing.procedures import DirectLogits

        return DirectLogits()

    about = "exact effect on log p(answer) of zeroing one expert"
    return [
        Score("effect", f"{about}, base model", "base", single, "effect"),
        Score("effect-tuned", f"{about}, tuned model", "tuned", single, "effect"),
        Score(
            "forced",
            "exact gain of log p(answer) where one expert is forced, base model",
            "base",
            partial(single, "force"),
            "gain",
        ),
        Score("dla", "direct logit attribution: context's minus memory's first token, base model", "base", direct),
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
        *_contrasts(),
        *_attributions(),
        *_steps(),
        *_effects(),
    )
}
"""Every score by its name: `ce` is the paper's context-faithful experts, `oe` its original experts."""
