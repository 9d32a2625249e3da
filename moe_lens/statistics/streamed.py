"""Streamed: rows of examples that go to a file as they come, so that none of them are kept."""

from collections.abc import Callable
from typing import Any, Self

import pandas as pd
import torch

from moe_lens.errors import MoELensError
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import ExampleRows


class Streamed:
    """Gives what `rows` makes of each record to `write`, in the order in which batches come.

    >>> with growing_table(Path("routing.parquet"), made_by) as file:
    ...     lens.measure(examples, Streamed(RoutingTokens(), file.add))
    """

    def __init__(self, rows: ExampleRows, write: Callable[[pd.DataFrame], None]) -> None:
        self._rows, self._write = rows, write
        self.needs = rows.needs
        self.settings: dict[str, Any] = rows.settings

    def update(self, record: Record) -> Self:
        """Writes a record's rows; MoELensError for a record without what is needed."""
        record.expect(self.needs.captures)
        with torch.no_grad():
            self._write(self._rows.rows(record))
        return self

    def merge(self, other: Self) -> Self:
        """MoELensError: the rows are in files."""
        raise MoELensError("what is streamed lies in files; read one after the other")

    def table(self) -> pd.DataFrame:
        """MoELensError: the rows are in a file."""
        raise MoELensError("what is streamed lies in a file; read that")
