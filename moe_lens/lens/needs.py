"""What a statistic needs of a pass over examples, declared by it, so that one pass can serve several."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.lens.positions import Positions, check_positions, in_the_answer
from moe_lens.lens.record import Record, check_capture


@dataclass(frozen=True)
class Needs:
    """What records must hold for a statistic.

    captures: names of `CAPTURES`. positions: those at which the captures that are not kept everywhere are read.
    with_answer: whether each example's first gold answer has to be appended, so that its steps are there.
    """

    captures: frozenset[str]
    positions: frozenset[Positions] = frozenset()
    with_answer: bool = False

    @classmethod
    def of(cls, captures: Iterable[str], *positions: Positions) -> "Needs":
        """These captures at these positions; with the answer where a position lies in it.

        Routing is recorded everywhere: for it alone no positions have to be kept.
        """
        check_capture(captures := frozenset(captures))
        for one in positions:
            check_positions(one)
        kept = positions if captures - {"routing"} else ()
        return cls(captures, frozenset(kept), any(map(in_the_answer, positions)))

    def __or__(self, other: "Needs") -> "Needs":
        """What both need together."""
        return Needs(
            self.captures | other.captures,
            self.positions | other.positions,
            self.with_answer or other.with_answer,
        )


@runtime_checkable
class Statistic(Protocol):
    """Takes records one after another, keeps what is needed of them, and yields a tidy table.

    needs: what a record must hold for it. settings: what two of its kind must share to be merged.
    """

    needs: Needs
    settings: dict[str, object]

    def update(self, record: Record) -> Self:
        """Adds a record's samples, all or none of them where it raises, and returns the statistic."""

    def merge(self, other: Self) -> Self:
        """Adds the samples that another statistic of the same settings has seen, and returns the first."""

    def table(self) -> pd.DataFrame:
        """The result so far, without changing it."""


def expect_statistics(statistics: Iterable[object]) -> None:
    """MoELensError unless all are statistics to fill."""
    for statistic in statistics:
        if isinstance(statistic, type):
            raise MoELensError(f"give a statistic to fill, {statistic.__name__}(…), not its class")
        if not isinstance(statistic, Statistic):
            raise MoELensError(f"expected a statistic such as ExpertUsage(); got {statistic!r:.80}")
