"""Learned sets as a procedure: what a command names `set:4;spare=closed_book` is found once for a model, and kept."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import pandas as pd

from moe_lens.choosing.procedures import Examples, Load, Procedure
from moe_lens.choosing.scores import Score
from moe_lens.choosing.search import SEEDS, FoundSet, Recipe, Wanted, find_set
from moe_lens.choosing.smallest import Sufficing, find_smallest
from moe_lens.errors import MoELensError
from moe_lens.lens.lens import MoELens
from moe_lens.results import data_digest

ABOUT = "how strongly an expert is drawn into a set that is learned as a whole, model at hand"
FORM = (
    "set:N or set:budget=N, with ;spare=TASK,TASK or ;keep, or set:keep=SHARE, and ;seed=N, such as "
    "set:4;spare=closed_book or set:keep=0.9"
)


@dataclass(frozen=True)
class LearnedSet(Procedure):
    """A set that `find_set` finds, or `find_smallest`. spare: names of the data that it is to spare.

    Its table's score is the logit learned, `returned` the share of the searches that found the expert, `chosen` whether
    it is in the set.
    """

    wanted: Wanted | Sufficing
    spare: tuple[str, ...] = ()
    seed: int = 0
    beside: ClassVar[tuple[str, ...]] = ("returned", "chosen")

    def __post_init__(self) -> None:
        if self.wanted.keep and self.spare:
            raise MoELensError(f"{self.name!r}: a set that is to suffice for one task spares no others; leave one out")

    @property
    def name(self) -> str:
        """As it is written."""
        if isinstance(self.wanted, Sufficing):
            return f"set:keep={self.wanted.share:.15g}{self.aim.removeprefix(';keep')}"
        return f"set:{self.wanted.size or f'budget={self.wanted.budget}'}{self.aim}"

    @property
    def aim(self) -> str:
        """What of its name says more than how many."""
        keep, seed = ";keep" * self.wanted.keep, f";seed={self.seed}" if self.seed else ""
        return f"{keep}{';spare=' + ','.join(self.spare) if self.spare else ''}{seed}"

    @classmethod
    def parse(cls, rest: str, text: str) -> "list[LearnedSet]":
        """Those that the `rest` of a text after `set:` names, one for each size; MoELensError for anything else."""
        many, *options = rest.split(";")
        sizes = re.fullmatch(r"(budget=)?(\d{1,6}(?:,\d{1,6})*)", many)
        share = re.fullmatch(r"keep=(\d?\.?\d{1,9})", many) if "keep" not in options else None
        given = dict(option.partition("=")[::2] for option in options)
        spare = tuple(filter(None, given.get("spare", "").split(",")))
        seed, wrong = given.get("seed", "0"), bool(set(given) - {"spare", "keep", "seed"})
        twice = len(given) < len(options) or len(set(spare)) < len(spare)
        empty = ("spare" in given and not spare) or bool(given.get("keep"))
        wrong = wrong or twice or empty or not re.fullmatch(r"[0-9]{1,18}", seed)
        if share and not wrong:
            return [cls(Sufficing(float(share[1])), spare, int(seed))]
        if sizes is None or wrong:
            raise MoELensError(f"expected {FORM}; got {text!r}")
        kind, keep = "budget" if sizes[1] else "size", "keep" in given
        return [cls(Wanted(**{kind: int(number)}, keep=keep), spare, int(seed)) for number in sizes[2].split(",")]

    @property
    def score(self) -> Score:
        """What it ranks experts by, where a score is asked for."""
        return Score(self.name, f"{ABOUT}{self.aim}", "model", lambda: self)

    @property
    def settings(self) -> dict[str, object]:
        return asdict(self) | {"recipe": asdict(Recipe())}

    def facts(self, load: Load) -> dict[str, Any]:
        return self.settings | {"spared": {name: data_digest(load(name)) for name in self.spare}}

    @classmethod
    def tables(
        cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load, batch_size: int | None
    ) -> list[pd.DataFrame]:
        return [own._found(lens, examples, load).table for own in wanted]

    @classmethod
    def passes(cls, wanted: Sequence[Self], lens: MoELens, examples: Examples, *, load: Load) -> float:
        recipe, n_experts = Recipe(), len(lens.architecture.moe_layers) * lens.architecture.n_experts
        rows = SEEDS * (recipe.passes * recipe.rows + (1 + recipe.exchanges) * recipe.held)
        searches = [math.log2(n_experts) if isinstance(own.wanted, Sufficing) else 1 + len(own.spare) for own in wanted]
        return sum(searches) * rows / max(1, len(examples))

    def _found(self, lens: MoELens, examples: Examples, load: Load) -> FoundSet:
        if isinstance(self.wanted, Sufficing):
            return find_smallest(lens, examples, self.wanted.share, seed=self.seed)
        spare = {name: load(name) for name in self.spare}
        return find_set(lens, examples, self.wanted, spare=spare, seed=self.seed)
