"""Procedures: ways to score experts that take more than one pass of a statistic, each with all of its kind at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pandas as pd

from moe_lens.causal.attributing import Attribution, attribution, attribution_on_parts
from moe_lens.causal.direct import direct_logit_attribution
from moe_lens.causal.sweep import single_expert_effects
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.interventions.digests import digest_of
from moe_lens.lens.lens import MoELens

Examples = Sequence[Example | str]
Load = Callable[[str], Examples]
"""The examples, or bare texts, that a name of data stands for."""


class Procedure(ABC):
    """A way to measure a table of experts on a model; frozen, and told from others by its `settings`.

    beside: columns of the table that are kept beside the score. per_expert: whether it runs the model for every expert.
    """

    beside: ClassVar[tuple[str, ...]] = ()
    per_expert: ClassVar[bool] = False

    @property
    @abstractmethod
    def settings(self) -> dict[str, object]:
        """What it is asked to do, as in `Statistic`."""

    def facts(self, load: Load) -> dict[str, Any]:
        """What tells it from others, with the data that it names itself."""
        return self.settings

    @classmethod
    @abstractmethod
    def tables(
        cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load, batch_size: int | None
    ) -> list[pd.DataFrame]:
        """The table of each, one row per expert: layer, expert and what a score takes; passes are shared."""

    @classmethod
    @abstractmethod
    def passes(cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load) -> float:
        """About how many times `tables` sends the examples' tokens through the model, gradients not counted."""


class Parted(Procedure):
    """One of which what it is on parts of the examples comes from the passes over all of them."""

    @classmethod
    @abstractmethod
    def tables_on_parts(
        cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, parts: int, batch_size: int | None
    ) -> list[list[pd.DataFrame]]:
        """The tables on all examples, and after them on each of the parts `examples[n::parts]`."""


@dataclass(frozen=True)
class Attributed(Parted):
    """Attribution by gradients, as `attribution` makes it."""

    way: Attribution

    @property
    def settings(self) -> dict[str, object]:
        target = self.way.target if isinstance(self.way.target, str) else digest_of(self.way.target)
        own = self.way
        return {"effect": own.effect, "positions": own.positions, "target": target, "steps": own.steps}

    @classmethod
    def tables(
        cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load, batch_size: int | None
    ) -> list[pd.DataFrame]:
        return attribution(lens, examples, *(own.way for own in wanted), batch_size=batch_size)

    @classmethod
    def tables_on_parts(
        cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, parts: int, batch_size: int | None
    ) -> list[list[pd.DataFrame]]:
        return attribution_on_parts(lens, examples, *(own.way for own in wanted), parts=parts, batch_size=batch_size)

    @classmethod
    def passes(cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load) -> float:
        kinds = {(str(own.way.target), own.way.steps): own.way for own in wanted}
        return sum(len(way.passes(lens, examples)) * way.steps for way in kinds.values())


@dataclass(frozen=True)
class SingleEffects(Procedure):
    """What the right answer loses when one expert is masked, or gains when it is forced: exact, a run for each."""

    mode: str = "zero"
    per_expert: ClassVar[bool] = True

    @property
    def settings(self) -> dict[str, object]:
        return {"mode": self.mode}

    @classmethod
    def tables(
        cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load, batch_size: int | None
    ) -> list[pd.DataFrame]:
        asked = expect_answers(examples)
        found = [single_expert_effects(lens, asked, mode=own.mode, batch_size=batch_size) for own in wanted]
        gains = {"gain": "effect", "gain_low": "effect_high", "gain_high": "effect_low"}
        return [table.assign(**{name: -table[of] for name, of in gains.items()}) for table in found]

    @classmethod
    def passes(cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load) -> float:
        """At most: of what an expert does not change nothing is run."""
        return len(wanted) * (1 + len(lens.architecture.moe_layers) * lens.architecture.n_experts)


@dataclass(frozen=True)
class DirectLogits(Procedure):
    """Direct logit attribution, as `direct_logit_attribution` makes it."""

    @property
    def settings(self) -> dict[str, object]:
        return {}

    @classmethod
    def tables(
        cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load, batch_size: int | None
    ) -> list[pd.DataFrame]:
        return [direct_logit_attribution(lens, examples, batch_size=batch_size) for _ in wanted]

    @classmethod
    def passes(cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load) -> float:
        return len(wanted)


def expect_answers(examples: Examples) -> list[Example]:
    """The examples; MoELensError, naming it, for a bare text, which has no answer."""
    for place, example in enumerate(examples):
        if not isinstance(example, Example):
            raise MoELensError(f"text {place} has no answer, which this score is of; give examples with answers")
    return [example for example in examples if isinstance(example, Example)]
