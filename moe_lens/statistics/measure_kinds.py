"""Measure: something that can be measured of a model on data, and the ways in which measures are alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
import pandas as pd

from moe_lens.lens.lens import MoELens
from moe_lens.lens.positions import Positions
from moe_lens.metrics import example_means, paired_difference
from moe_lens.metrics.bounds import Bounds
from moe_lens.statistics.accumulators import GroupSums
from moe_lens.statistics.pairs import pairs_table
from moe_lens.statistics.saved import Storable
from moe_lens.statistics.vectors import RoutingVectors


@dataclass(frozen=True)
class Measure:
    """Something that can be measured of a model on data.

    about: what it is, in some words. make: the statistic at the positions; the lens is None where a saved one is read
        again.
    table: what one model shows on one data set, given the lens too; None for what takes more than that.
    across: what one model shows on all data sets together, given by their names.
    between: what two models differ by on all data sets together, as `against`.
    against: what two models differ by on the same examples, given n_experts too, a difference being second minus
        first; None where no interval of it is known.
    reads: what of the model the table needs again: its "tokens", which all variants of a run share, or its "weights".
    """

    about: str
    make: Callable[[MoELens | None, Positions], Storable]
    table: Callable[[Storable, MoELens | None], pd.DataFrame] | None
    against: Callable[[Storable, Storable, int], pd.DataFrame] | None = None
    reads: Literal["", "tokens", "weights"] = ""
    across: Callable[[Mapping[str, Storable]], pd.DataFrame] | None = None
    between: Callable[[Mapping[str, Storable], Mapping[str, Storable], int], pd.DataFrame] | None = None

    @property
    def takes_two(self) -> bool:
        """Whether it is of two models only."""
        return self.table is None and self.across is None


def _differences(first: Storable, second: Storable, n_experts: int) -> pd.DataFrame:
    """One row per number and layer, expert or pair: number, layer, …, first, second, difference, its ends."""
    assert isinstance(first, GroupSums), "what grouped makes"
    assert isinstance(second, GroupSums), "what grouped makes"
    parts = [
        _rows(layer, values).assign(number=number)
        for layer, numbers in first.differences(second).items()
        for number, values in numbers.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    return table[["number", *(name for name in table if name != "number")]]


def _rows(layer: int, values: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Numbers of a layer [], its experts [expert] or pairs of them [expert, expert] as rows."""
    axes = next(iter(values.values())).ndim
    if axes == 2:
        return pairs_table(layer, dict(values))
    experts = {"expert": np.arange(len(next(iter(values.values()))))} if axes else {}
    return pd.DataFrame({"layer": layer, **experts, **values}, index=None if axes else [0])


def own(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    """The statistic's own table."""
    return statistic.table()


def _estimates(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
    assert isinstance(statistic, GroupSums), "what grouped makes"
    return pd.concat([_rows(layer, found) for layer, found in statistic.estimates().items()], ignore_index=True)


def grouped(about: str, make: Callable[[Positions], GroupSums], estimates: bool = False) -> Measure:
    """A measure whose sums are kept by groups of examples; estimates: whether its own table lacks the intervals."""
    table = _estimates if estimates else own
    return Measure(about, lambda lens, positions: make(positions), table, _differences)


def by_example(
    about: str,
    make: Callable[[MoELens | None, Positions], Storable],
    *,
    values: Mapping[str, Bounds],
    by: tuple[str, ...],
) -> Measure:
    """A measure that has numbers of every example, each with its bounds, in groups of these columns."""

    def means(statistic: Storable, lens: MoELens | None) -> pd.DataFrame:
        table = statistic.table()
        parts = [example_means(table, value=value, by=by, bounds=bounds) for value, bounds in values.items()]
        return reduce(lambda one, other: one.merge(other, on=[*by, "n"]), parts)

    def differences(first: Storable, second: Storable, n_experts: int) -> pd.DataFrame:
        before, after = first.table(), second.table()
        parts = [
            paired_difference(before, after, value=value, by=by, bounds=bounds).assign(number=value)
            for value, bounds in values.items()
        ]
        return pd.concat(parts, ignore_index=True)

    return Measure(about, make, means, differences)


def of_domains(about: str, metric: Callable[[pd.DataFrame], pd.DataFrame]) -> Measure:
    """A measure of all data sets together, each being a domain."""

    def across(statistics: Mapping[str, Storable]) -> pd.DataFrame:
        return metric(pd.concat([one.table().assign(domain=name) for name, one in statistics.items()]))

    return Measure(about, lambda lens, at: RoutingVectors(positions=at), None, across=across)
