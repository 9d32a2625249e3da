"""What the command that measures does: one pass of each variant over each data set, kept, and tables made of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lens.commands import console
from moe_lens.data import Example
from moe_lens.errors import MoELensError
from moe_lens.lens.delta import weights_digest
from moe_lens.lens.lens import MoELens
from moe_lens.lens.positions import Positions
from moe_lens.report.page import build_report
from moe_lens.results import data_digest, read_if_made_by, write_table
from moe_lens.rows_on_disk import growing_table, parts_of
from moe_lens.statistics import RoutingTokens, add_saved, save_statistic, weight_similarity
from moe_lens.statistics.measures import MEASURES, ROUTING, WEIGHTS, Measure
from moe_lens.statistics.saved import Storable
from moe_lens.statistics.streamed import Streamed
from moe_lens.storage import is_there

AS_IS = "as it is"
"""The variant of the model without anything else."""
TWO = "--against or --intervention"


@dataclass(frozen=True)
class Variant:
    """A model, or a model under an intervention, by the name that tables have for it.

    opened: a block that gives its lens. facts: what tells it from others of that name.
    """

    name: str
    opened: Callable[[], AbstractContextManager[MoELens]]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """What is measured where, and the folder that keeps it.

    what: names of MEASURES, ROUTING or WEIGHTS. made_by: the provenance of all of it.
    """

    what: Sequence[str]
    positions: Positions
    out: Path
    made_by: dict[str, Any]

    @property
    def statistics(self) -> dict[str, Measure]:
        """Those that have a statistic."""
        return {name: MEASURES[name] for name in self.what if name in MEASURES}

    def part(self, variant: str, data: str, name: str) -> Path:
        """The file that keeps what a pass gave."""
        return self.out / "parts" / f"{_plain(variant)}-{_plain(data)}-{name}.parquet"

    def over(self, variant: Variant, data: Mapping[str, Sequence[Example]]) -> None:
        """One pass over each data set, unless it is there already; and what the model's weights alone tell."""
        with variant.opened() as lens:
            facts = {**variant.facts, "weights": weights_digest(lens.module)}
            for name, examples in data.items():
                made_by = self.made_by | {"variant": [variant.name, facts], "pass": [name, data_digest(examples)]}
                self._pass(lens, variant.name, name, examples, made_by)
            if WEIGHTS in self.what:
                table = weight_similarity(lens)
                write_table(table, self.part(variant.name, "", WEIGHTS), self.made_by | {"variant": facts})

    def _pass(
        self, lens: MoELens, variant: str, data: str, examples: Sequence[Example], made_by: dict[str, Any]
    ) -> None:
        files = {name: self.part(variant, data, name) for name in self.what if name != WEIGHTS}
        made = {name: made_by | {"statistic": _facts(name, self.positions)} for name in files}
        if not files or all(_is_there(path, made[name]) for name, path in files.items()):
            return
        console.say(f"{variant}, {data}: {len(examples)} examples")
        statistics: dict[str, Any] = {
            name: one.make(lens, self.positions) for name, one in self.statistics.items()
        }
        with ExitStack() as open_files:
            if ROUTING in files:
                rows = open_files.enter_context(growing_table(files[ROUTING], made_by))
                statistics[ROUTING] = Streamed(RoutingTokens(self.positions), rows.add)
            lens.measure(examples, *statistics.values())
        for name in self.statistics:
            save_statistic(statistics[name], files[name], made_by)
