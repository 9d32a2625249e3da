"""What the command that measures is asked for: which measures, where, and of which variants of the model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moe_lens.choosing.measuring import Models
from moe_lens.commands import console
from moe_lens.commands.options import Opening, place_named
from moe_lens.commands.saved_interventions import Saved, read_saved
from moe_lens.data import Example
from moe_lens.errors import MoELensError, NotFiniteError
from moe_lens.lens.delta import FACTS_FILE
from moe_lens.lens.lens import MoELens
from moe_lens.lens.loading import expect_model
from moe_lens.lens.positions import Positions, check_positions
from moe_lens.results import data_digest, portable
from moe_lens.statistics.measures import MEASURES, ROUTING, WEIGHTS
from moe_lens.storage import digest_of, is_there

EVERYTHING = "all"
AS_IS = "as it is"
"""The variant of the model without anything else."""


@dataclass(frozen=True)
class Variant:
    """A model, or one under an intervention, by the name that tables have for it; opened: a block that gives it."""

    name: str
    opened: Callable[[], AbstractContextManager[MoELens]]


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; what: "all", or names with commas. saved: interventions by name."""

    what: tuple[str, ...]
    positions: Positions
    against: str | None
    saved: Mapping[str, Saved]

    @classmethod
    def parse(cls, what: str, positions: str, against: str | None, saved: Sequence[str]) -> "Asked":
        """The options; MoELensError for what is no measure or place, for what lacks a second model, for equal names."""
        names, several = tuple(dict.fromkeys(name.strip() for name in what.split(","))), read_saved(saved)
        place = place_named(positions)
        check_positions(place)
        if unknown := [name for name in names if name not in (*MEASURES, ROUTING, WEIGHTS, EVERYTHING)]:
            known = ", ".join((*MEASURES, WEIGHTS, ROUTING, EVERYTHING))
            raise MoELensError(f"--what names, with commas, {known}; got {', '.join(unknown)}")
        alone = against is None and not several
        if alone and (two := [name for name in names if name in MEASURES and MEASURES[name].takes_two]):
            raise MoELensError(f"{', '.join(two)} compares two models; give --against or --intervention")
        asked = cls(names, place, against, several)
        if len(set(asked.variants)) < len(asked.variants):
            raise MoELensError(f"variants are told by their names, which repeat: {', '.join(asked.variants)}")
        return asked

    def expect_several(self, data: Sequence[str]) -> None:
        """MoELensError where a measure is of how data sets differ, and there is one; before anything is measured."""
        across = [name for name in self.what if name in MEASURES and MEASURES[name].across is not None]
        if len(data) < 2 and across:
            raise MoELensError(f"{', '.join(across)} tells data sets apart; give --data two or more, with commas")

    @property
    def variants(self) -> list[str]:
        """The names of what is measured, the model as it is first."""
        return [AS_IS, *self.saved, *([] if self.against is None else [portable(self.against)])]

    @property
    def lenient(self) -> bool:
        """Whether what cannot be measured is left out."""
        return EVERYTHING in self.what

    def names(self) -> list[str]:
        """The measures, in their order."""
        known = [*MEASURES, WEIGHTS] if self.lenient else []
        alone = len(self.variants) == 1
        known = [name for name in known if not (alone and name in MEASURES and MEASURES[name].takes_two)]
        return list(dict.fromkeys([*known, *(name for name in self.what if name != EVERYTHING)]))

    def opened(self, opening: Opening, lens: MoELens) -> list[Variant]:
        """The variants; a delta is put on the open model, another model is opened when it is its turn."""
        found = [Variant(AS_IS, lambda: nullcontext(lens))]
        found += [Variant(name, partial(lens.intervene, one.intervention)) for name, one in self.saved.items()]
        if self.against is not None:
            found.append(Variant(self.variants[-1], self._other(opening, lens)))
        return found

    def _other(self, opening: Opening, lens: MoELens) -> Callable[[], AbstractContextManager[MoELens]]:
        assert self.against is not None, "there is one"
        folder = Path(self.against)
        if not is_there(folder / FACTS_FILE):
            return lambda: nullcontext(replace(opening, model=str(self.against), delta=None).load())
        if opening.delta is not None:
            return lambda: nullcontext(replace(opening, delta=folder).load())
        return Models.with_delta(lens, folder).tuned

    def facts(self, lens: MoELens, data: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
        """For the provenance; MoELensError where there is nothing to compare with, before anything is measured."""
        delta = None if self.against is None else Path(self.against) / FACTS_FILE
        if self.against is not None and not is_there(Path(self.against) / FACTS_FILE):
            expect_model(self.against)
        return {
            "variants": self.variants,
            "positions": self.positions,
            "saved": {name: one.intervention.digest for name, one in self.saved.items()},
            "against": digest_of(delta) if delta is not None and is_there(delta) else None,
            "sets": {name: data_digest(examples) for name, examples in data.items()},
            "n_experts": lens.architecture.n_experts,
            "lenient": self.lenient,
        }

    def possible(self, names: Sequence[str], lens: MoELens, example: Example) -> list[str]:
        """Those of the names that can be measured on such an example; the others are left out, with a note."""
        found = []
        for name in names:
            try:
                if name in MEASURES:
                    lens.measure([example], MEASURES[name].make(lens, self.positions), progress=False)
            except NotFiniteError:
                raise
            except MoELensError as error:
                console.note(f"left out {name}: {error}")
            else:
                found.append(name)
        return found
