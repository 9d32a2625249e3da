"""The two ways in which statistics accumulate records: sums by layer, and a few numbers per example."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, Self

import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.devices import on_cpu
from moe_lens.lens.needs import Needs
from moe_lens.lens.record import Record


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


def _shapes(sums: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, list[int]]]:
    return {layer: {name: list(part.shape) for name, part in own.items()} for layer, own in sums.items()}
