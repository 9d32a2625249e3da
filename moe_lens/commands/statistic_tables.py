"""What the command that measures leaves: of the passes that were kept, a table for each measure and a page of all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import pandas as pd

from moe_lens.commands import console
from moe_lens.commands.statistic_passes import Measuring
from moe_lens.errors import MoELensError
from moe_lens.report.page import build_report
from moe_lens.results import read_table, write_table
from moe_lens.rows_on_disk import growing_table, parts_of
from moe_lens.statistics import add_saved
from moe_lens.statistics.measure_kinds import Measure
from moe_lens.statistics.measures import ROUTING, WEIGHTS
from moe_lens.statistics.saved import Storable


@dataclass(frozen=True)
class Kept:
    """The passes that a `Measuring` kept, by the names of their variants, the first being compared with, and data."""

    measuring: Measuring
    variants: Sequence[str]
    data: Sequence[str]
    n_experts: int

    def leave(self, *, title: str = "What was measured") -> None:
        """Writes a table for each measure and what variants differ by, with report.html, and says what was written."""
        out, written = self.measuring.out, []
        for name, table in self._tables():
            write_table(table, out / f"{name}.parquet", self.measuring.made_by)
            written.append(f"{name}.parquet ({len(table):,} rows)")
        if ROUTING in self.measuring.what:
            written.append(f"{ROUTING}.parquet ({self._leave_routing():,} rows)")
        if not written:
            raise MoELensError("nothing could be measured; see the notes above, or name with --what what you want")
        drawn = [] if written[0].startswith(ROUTING) else [build_report(out, title=title).name]
        console.say(f"written to {out}: {', '.join([*written, *drawn])}")

    def _tables(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """By their names; a measure that refuses its data is left out, with a note, or ends it."""
        for name, measure in self.measuring.statistics.items():
            try:
                yield from self._of(name, measure)
            except MoELensError as error:
                if not self.measuring.lenient:
                    raise MoELensError(f"{name}: {error}") from None
                console.note(f"left out {name}: {error}")
        if WEIGHTS in self.measuring.what:
            parts = [(variant, read_table(self.measuring.part(variant, "", WEIGHTS))) for variant in self.variants]
            yield WEIGHTS, pd.concat([_named(table, variant=variant) for variant, table in parts], ignore_index=True)

    def _of(self, name: str, measure: Measure) -> Iterator[tuple[str, pd.DataFrame]]:
        """What each variant shows, on each data set or all, and what the others differ by from the first."""
        parts = []
        if measure.table is not None:
            parts = [
                _named(self._table(name, measure, *pair), variant=pair[0], data=pair[1])
                for pair in product(self.variants, self.data)
            ]
        if measure.across is not None:
            parts = [_named(measure.across(self._all(name, measure, one)), variant=one) for one in self.variants]
        if parts:
            yield name, pd.concat(parts, ignore_index=True)
        parts = []
        for variant in self.variants[1:] if measure.against or measure.between else ():
            first, second = (self._all(name, measure, own) for own in (self.variants[0], variant))
            if measure.against is not None:
                tables = {data: measure.against(first[data], second[data], self.n_experts) for data in self.data}
                parts += [_named(table, variant=variant, data=data) for data, table in tables.items()]
            if measure.between is not None:
                parts.append(_named(measure.between(first, second, self.n_experts), variant=variant))
        if parts:
            yield name if measure.takes_two else f"difference-{name}", pd.concat(parts, ignore_index=True)

    def _all(self, name: str, measure: Measure, variant: str) -> dict[str, Storable]:
        """What a variant's passes kept, by data set."""
        return {data: self._statistic(name, measure, variant, data) for data in self.data}

    def _table(self, name: str, measure: Measure, variant: str, data: str) -> pd.DataFrame:
        if measure.reads:
            return read_table(self.measuring.part(variant, data, f"{name}-table"))
        assert measure.table is not None, "it has one"
        return measure.table(self._statistic(name, measure, variant, data), None)

    def _statistic(self, name: str, measure: Measure, variant: str, data: str) -> Storable:
        return add_saved(measure.make(None, self.measuring.positions), self.measuring.part(variant, data, name))

    def _leave_routing(self) -> int:
        """Joins the rows of all passes in one file, where they are not, and gives their number."""
        path, rows = self.measuring.out / f"{ROUTING}.parquet", 0
        pairs = {pair: self.measuring.part(*pair, ROUTING) for pair in product(self.variants, self.data)}
        if not path.exists():
            with growing_table(path, self.measuring.made_by) as file:
                for (variant, data), part in pairs.items():
                    for own in parts_of(part):
                        file.add(_named(own, variant=variant, data=data))
        for part in pairs.values():
            part.unlink(missing_ok=True)  # it would take as much room again
        for own in parts_of(path):
            rows += len(own)
        return rows


def _named(table: pd.DataFrame, **columns: str) -> pd.DataFrame:
    """The table with these columns before its own."""
    return pd.concat([pd.DataFrame(columns, index=table.index), table], axis="columns")
