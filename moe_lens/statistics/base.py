"""Statistic: what every streaming accumulator over records offers."""

from typing import Protocol, Self, runtime_checkable

import pandas as pd

from moe_lens.record import Record


@runtime_checkable
class Statistic(Protocol):
    """Takes records one after another, keeps sums of constant size, and yields a tidy table.

    captures: what a record must hold for it, such as {"routing"}.
    """

    captures: frozenset[str]

    def update(self, record: Record) -> Self:
        """Adds a record's samples and returns the statistic."""

    def merge(self, other: Self) -> Self:
        """Adds the samples that another statistic of the same settings has seen, and returns the first."""

    def table(self) -> pd.DataFrame:
        """The result so far, without changing it."""
