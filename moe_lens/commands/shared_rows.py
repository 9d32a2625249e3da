"""Rows that processes write side by side, put into one file in the order of one process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pandas as pd

from moe_lens.lens.parallel import WHOLE, Part, gathered, is_first
from moe_lens.lens.record import Record
from moe_lens.rows_on_disk import growing_table, tables_of
from moe_lens.statistics.accumulators import ExampleRows
from moe_lens.statistics.streamed import Streamed


class PartStreamed(Streamed):
    """The rows of one process's batches; ends: how many examples it had seen after each of its tables."""

    def __init__(self, rows: ExampleRows, write: Callable[[pd.DataFrame], None]) -> None:
        super().__init__(rows, write)
        self.ends: list[int] = []

    def update(self, record: Record) -> Self:
        super().update(record)
        self.ends.append(sum(self.ends[-1:]) + len(record.ids))
        return self

    def state(self) -> tuple[()]:
        """Nothing: its rows lie in a file, and so do the others'."""
        return ()

    def add_state(self, state: tuple[()]) -> Self:
        return self


@contextmanager
def streamed_rows(
    rows: ExampleRows, path: Path, made_by: Mapping[str, Any], part: Part, batch_size: int
) -> Iterator[Streamed]:
    """Gives what `lens.measure` is to update in batches of this size; all rows are in `path` once the block ends.

    part: which batches are this process's. All processes have to see the folder of `path`.
    """
    if part == WHOLE:
        if is_first():
            with growing_table(path, made_by) as file:
                yield Streamed(rows, file.add)
        else:
            yield Streamed(rows, lambda table: None)  # the first one has the same
        return
    number, of = part
    files = [path.with_name(f"{path.name}.{own}-{of}") for own in range(of)]
    with growing_table(files[number], made_by) as file:
        streamed = PartStreamed(rows, file.add)
        yield streamed
        if not streamed.ends:
            file.add(pd.DataFrame())
    ends = gathered([streamed.ends], part)  # by now all files are there
    if is_first():
        with growing_table(path, made_by) as file:
            tables = [tables_of(own) for own in files]
            for process in _in_order(ends, batch_size):
                file.add(next(tables[process]))
        for own in files:
            own.unlink(missing_ok=True)


def _in_order(ends: Sequence[Sequence[int]], batch_size: int) -> list[int]:
    """Whose table is next: processes take turns batch by batch, of which one that was halved is in several tables."""
    batches = [((end - 1) // batch_size, process) for process, own in enumerate(ends) for end in own]
    return [process for _, process in sorted(batches)]
