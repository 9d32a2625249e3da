"""The ways in which statistics accumulate records: sums by layer, also by groups, and a few numbers per example."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.devices import on_cpu
from moe_lens.lens.needs import Needs
from moe_lens.lens.record import Record
from moe_lens.statistics.jackknife import Sums, with_interval


class LayerSums(ABC):
    """A statistic that keeps sums of constant size, by layer and name, in float64 on the CPU.

    needs: what a record must hold. settings: what two statistics must share to be merged; tables carry it in `attrs`.
    """

    def __init__(self, needs: Needs, settings: Mapping[str, Any]) -> None:
        self.needs, self.settings = needs, dict(settings)
        self._sums: dict[int, dict[str, Tensor]] = {}

    @abstractmethod
    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        """What a record adds: per layer and name a tensor whose shape does not depend on the record."""

    def update(self, record: Record) -> Self:
        """Adds a record's samples; MoELensError for a record without what is needed or of other layers."""
        record.expect(self.needs.captures)
        with torch.no_grad():
            sums = self.sums(record)
            parts = iter(on_cpu(part for own in sums.values() for part in own.values()))
            self._add({layer: {name: next(parts) for name in own} for layer, own in sums.items()})
        return self

    def merge(self, other: Self) -> Self:
        """Adds what another statistic of the same settings and model has seen; MoELensError for any other."""
        check_alike(self, other)
        if other._sums:
            self._add(other._sums)
        return self

    def layer_sums(self) -> dict[int, dict[str, Tensor]]:
        """The sums so far, layers in rising order; MoELensError if they are all 0, as where no token counted."""
        if not any(part.any() for own in self._sums.values() for part in own.values()):
            raise MoELensError(f"{type(self).__name__} has seen no token that counts ({self.settings})")
        return {layer: self._sums[layer] for layer in sorted(self._sums)}

    def state(self) -> pd.DataFrame:
        """The sums so far: a row for each layer and name, with the shape and the values, flattened."""
        rows = [
            {"layer": layer, "name": name, "shape": list(part.shape), "values": part.flatten().numpy()}
            for layer, own in self._sums.items()
            for name, part in own.items()
        ]
        return pd.DataFrame(rows, columns=["layer", "name", "shape", "values"])

    def add_state(self, state: pd.DataFrame) -> Self:
        """Adds what `state` of another statistic of the same settings and model gave."""
        sums: dict[int, dict[str, Tensor]] = {}
        for row in state.itertuples():
            values = torch.tensor(np.asarray(row.values), dtype=torch.float64)
            sums.setdefault(int(row.layer), {})[str(row.name)] = values.reshape([int(size) for size in row.shape])
        if sums:
            self._add(sums)
        return self

    def _add(self, sums: Mapping[int, Mapping[str, Tensor]]) -> None:
        if not self._sums:
            self._sums = {
                layer: {name: part.double().clone() for name, part in own.items()} for layer, own in sums.items()
            }
            return
        mine, its = (_shapes(part) for part in (self._sums, sums))
        if mine != its:
            raise MoELensError(f"expected a record of the same model as those so far, {mine}; got {its}")
        for layer, own in sums.items():
            for name, part in own.items():
                self._sums[layer][name] += part


class GroupSums(LayerSums):
    """Sums that are kept apart for groups of examples, [group, …], so that what is made of them has an interval.

    size: the name of the sum that tells how much is in a group, of which empty ones do not count.
    bounds: between what each of the numbers lies, where there is such a thing.
    """

    size: str
    bounds: Mapping[str, tuple[float, float]] = {}

    @abstractmethod
    def table(self) -> pd.DataFrame:
        """The result so far, without changing it."""

    @abstractmethod
    def numbers(self, sums: Sums) -> dict[str, np.ndarray]:
        """What the sums over some texts make: of a layer [], of each expert [expert] or pair of them [expert, expert].

        Each number by its column's name.
        """

    def estimates(self) -> dict[int, dict[str, np.ndarray]]:
        """By layer the numbers with the ends of their 95 % intervals over texts (`with_interval`), NAME_low and _high.

        Raises MoELensError if no token counted.
        """
        return {
            layer: {
                f"{name}{end}": part.clip(*self.bounds.get(name, (-np.inf, np.inf)))
                for name, found in with_interval(self.numbers, _arrays(sums), size=self.size).items()
                for end, part in zip(("", "_low", "_high"), found, strict=True)
            }
            for layer, sums in self.layer_sums().items()
        }

    def layer_table(self) -> pd.DataFrame:
        """One row per layer: layer, tokens, and each number, of a layer each, with the ends of its interval.

        Of statistics whose sum `tokens` [group] says how many counted. Raises MoELensError if none did.
        """
        sums = self.layer_sums()
        rows = [
            {"layer": layer, "tokens": int(sums[layer]["tokens"].sum())}
            | {name: float(value) for name, value in found.items()}
            for layer, found in self.estimates().items()
        ]
        table = pd.DataFrame(rows)
        table.attrs = dict(self.settings)
        return table

    def differences(self, other: Self) -> dict[int, dict[str, dict[str, np.ndarray]]]:
        """By layer and number: first (of this one), second (of the other), difference (second - first), its interval.

        Both have seen the same examples, of which each group is left out of both at once: they are paired.
        Raises MoELensError if one of them has seen no token that counts, or for other settings or models.
        """
        check_alike(self, other)
        mine, its = self.layer_sums(), other.layer_sums()
        if _shapes(mine) != _shapes(its):
            raise MoELensError(f"expected two models of one shape; got {_shapes(mine)} and {_shapes(its)}")
        return {layer: self._difference(_arrays(own), _arrays(its[layer])) for layer, own in mine.items()}

    def _difference(self, first: Sums, second: Sums) -> dict[str, dict[str, np.ndarray]]:
        before, after = self.numbers(_total(first)), self.numbers(_total(second))

        def both(sums: Sums) -> dict[str, np.ndarray]:
            parts = [{name: sums[place, name] for name in first} for place in (0, 1)]
            own, its = (self.numbers(part) for part in parts)
            return {name: its[name] - own[name] for name in own}

        joined = {(place, name): part for place, sums in enumerate((first, second)) for name, part in sums.items()}
        found = with_interval(both, joined, size=(0, self.size))
        ends = ("difference", "difference_low", "difference_high")
        return {
            name: {"first": before[name], "second": after[name]} | dict(zip(ends, parts, strict=True))
            for name, parts in found.items()
        }


class ExampleRows(ABC):
    """A statistic that keeps a few numbers per example, so that two models can be compared example by example.

    needs: what a record must hold. settings: what two statistics must share to be merged; tables carry it in `attrs`.
    key: the columns that a table is sorted by, so that it does not depend on how the examples were batched.
    """

    key: tuple[str, ...]

    def __init__(self, needs: Needs, settings: Mapping[str, Any]) -> None:
        self.needs, self.settings = needs, dict(settings)
        self._parts: list[pd.DataFrame] = []

    @abstractmethod
    def rows(self, record: Record) -> pd.DataFrame:
        """What a record adds: rows with the columns of `key` and the values."""

    def update(self, record: Record) -> Self:
        """Adds a record's samples; MoELensError for a record without what is needed."""
        record.expect(self.needs.captures)
        with torch.no_grad():
            self._parts.append(self.rows(record))
        return self

    def merge(self, other: Self) -> Self:
        """Adds what another statistic of the same settings has seen; MoELensError for any other."""
        check_alike(self, other)
        self._parts += other._parts
        return self

    def state(self) -> pd.DataFrame:
        """The rows so far, in the order in which they came."""
        return pd.concat(self._parts, ignore_index=True) if self._parts else pd.DataFrame()

    def add_state(self, state: pd.DataFrame) -> Self:
        """Adds what `state` of another statistic of the same settings gave."""
        self._parts.append(state)
        return self

    def table(self) -> pd.DataFrame:
        """All rows so far, sorted by `key`; MoELensError if there are none."""
        if not any(map(len, self._parts)):
            raise MoELensError(f"{type(self).__name__} has seen no example with what it measures ({self.settings})")
        table = pd.concat([part for part in self._parts if len(part)], ignore_index=True)
        table = table.sort_values(list(self.key), kind="stable", ignore_index=True)
        table.attrs = dict(self.settings)
        return table


class Mergeable(Protocol):
    """What has settings that two of its kind must share to be merged."""

    settings: dict[str, Any]


def check_alike(first: Mergeable, second: Mergeable) -> None:
    """MoELensError unless both are the same statistic with equal settings."""
    if type(first) is not type(second) or first.settings != second.settings:
        mine, its = (f"{type(part).__name__}({part.settings})" for part in (first, second))
        raise MoELensError(f"only equal statistics of equal settings can be merged; got {mine} and {its}")


def _arrays(sums: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: part.numpy() for name, part in sums.items()}


def _total(sums: Sums) -> Sums:
    return {name: part.sum(0) for name, part in sums.items()}


def _shapes(sums: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, list[int]]]:
    return {layer: {name: list(part.shape) for name, part in own.items()} for layer, own in sums.items()}
