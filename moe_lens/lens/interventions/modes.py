"""Modes: what is done to chosen experts, how strongly and where, as one word of a command says it: `bias:1,2,5`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.interventions.place import Steps, check_place
from moe_lens.lens.interventions.protocol import Intervention, OnExperts
from moe_lens.lens.interventions.rerouting import Bias, Force, Reroute, TopK
from moe_lens.lens.interventions.zeroing import Renormalize, Scale, Zero
from moe_lens.lens.positions import Positions

PLAIN: dict[str, Callable[..., OnExperts]] = {kind.mode: kind for kind in (Zero, Renormalize, Reroute, Force)}
"""The modes that experts are under or not, by name."""
DOSED: dict[str, tuple[Callable[..., Intervention], str, str]] = {
    "bias": (Bias, "added to the router logits of the experts", "bias:1,2,5"),
    "scale": (Scale, "a factor of the experts' gating weights", "scale:0,0.5,2"),
    "topk": (TopK, "experts that every token gets", "topk:1,2,4"),
}
"""Those with a strength, by name: what they are, what the strength is, and how several are written."""


@dataclass(frozen=True)
class Mode:
    """What a run does to each of its sets of experts.

    name: of `PLAIN` or `DOSED`. doses: the strengths, one intervention each; (None,) where there is none.
    layers: where `topk` acts, which is on no experts in particular; None for all.
    positions, steps: where and when, as in `Here.mask`.
    Raises MoELensError for what makes no sense.
    """

    name: str
    doses: tuple[float | None, ...] = (None,)
    layers: tuple[int, ...] | None = None
    positions: Positions = "all"
    steps: Steps = "all"

    def __post_init__(self) -> None:
        check_place(self.positions, self.steps)
        if self.name not in PLAIN and self.name not in DOSED:
            dosed = [example for _, _, example in DOSED.values()]
            raise MoELensError(
                f"the mode of masking must be one of {', '.join(PLAIN)}, or with strengths, such as "
                f"{', '.join(dosed)}; got {self.name!r}"
            )
        if self.name in DOSED and (not self.doses or not all(map(self._is_dose, self.doses))):
            _, meaning, example = DOSED[self.name]
            numbers = "whole numbers from 1" if self.name == "topk" else "finite numbers"
            raise MoELensError(
                f"{self.name} needs strengths, different {numbers}, each {meaning}; write {example}; "
                f"got {', '.join(map(str, self.doses))}"
            )
        if len(set(self.doses)) < len(self.doses):
            raise MoELensError(f"each strength is run once; got {self.name}:{','.join(map(str, self.doses))}")

    @property
    def is_dosed(self) -> bool:
        """Whether it has strengths."""
        return self.name in DOSED

    @property
    def needs_experts(self) -> bool:
        """Whether it is on a set of experts."""
        return self.name != "topk"

    def neutral(self, top_k: int) -> float:
        """The strength at which nothing changes; top_k: the model's own."""
        return {"bias": 0.0, "scale": 1.0, "topk": float(top_k)}[self.name]

    def on(self, experts: ExpertSet, dose: float | None) -> Intervention:
        """The intervention on a set of experts at one of the doses."""
        place: dict[str, Any] = {"positions": self.positions, "steps": self.steps}
        if dose is None:
            return PLAIN[self.name](experts, **place)
        if self.name == "topk":
            return TopK(int(dose), layers=self.layers, **place)
        return DOSED[self.name][0](experts, dose, **place)

    def label(self, name: str, dose: float | None) -> str:
        """What tables call the set `name` at one of the doses."""
        return name if dose is None else f"{name}@{self.name}={dose:.15g}"

    def facts(self) -> dict[str, Any]:
        """For the provenance: what is done, how strongly and where; of the usual place nothing."""
        place = {"positions": self.positions, "steps": self.steps}
        return {"mode": str(self)} | {key: value for key, value in place.items() if value != "all"}

    def __str__(self) -> str:
        return f"{self.name}:{','.join(f'{dose:.15g}' for dose in self.doses)}" if self.is_dosed else self.name

    def _is_dose(self, dose: float | None) -> bool:
        if dose is None or not math.isfinite(dose):
            return False
        return self.name != "topk" or (dose >= 1 and dose == int(dose))


def parse_mode(
    text: str | Mode,
    *,
    layers: tuple[int, ...] | None = None,
    positions: Positions = "all",
    steps: Steps = "all",
) -> Mode:
    """The mode that a text names, such as zero, force or bias:1,2,5; MoELensError for anything else."""
    if isinstance(text, Mode):
        return text
    name, colon, strengths = text.strip().partition(":")
    if name in PLAIN and colon:
        raise MoELensError(f"{name} has no strengths; write {name} alone; got {text!r}")
    if name not in DOSED:
        return Mode(name, layers=layers, positions=positions, steps=steps)
    try:
        doses = tuple(float(part) for part in strengths.split(","))
    except ValueError:
        _, meaning, example = DOSED[name]
        raise MoELensError(
            f"{name} needs strengths, each {meaning}, with commas: write {example}; got {text!r:.80}"
        ) from None
    return Mode(name, doses, layers=layers, positions=positions, steps=steps)
