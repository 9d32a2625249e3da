"""Statistic: what every streaming accumulator over records offers, and the two ways in which they accumulate."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.record import Record


@runtime_checkable
class Statistic(Protocol):
    """Takes records one after another, keeps what is needed of them, and yields a tidy table.

    captures: what a record must hold for it, such as {"routing"}.
    """

    captures: frozenset[str]

    def update(self, record: Record) -> Self:
        """Adds a record's samples and returns the statistic."""

    def merge(self, other: Self) -> Self:
        """Adds the samples that another statistic of the same settings has seen, and returns the first."""

    def table(self) -> pd.DataFrame:
        """The result so far, without changing it."""


class LayerSums(ABC):
    """A statistic that keeps sums of constant size, by layer and name, in float64 on the CPU.

    settings: what two statistics must share to be merged; tables carry it in `attrs`.
    """

    captures: frozenset[str]

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self._sums: dict[int, dict[str, Tensor]] = {}

    @abstractmethod
    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        """What a record adds: per layer and name a tensor whose shape does not depend on the record."""

    def update(self, record: Record) -> Self:
        """Adds a record's samples; MoELensError for a record without what is needed or of other layers."""
        check_captured(record, self.captures)
        with torch.no_grad():
            self._add(self.sums(record))
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
                layer: {name: part.double().cpu().clone() for name, part in own.items()} for layer, own in sums.items()
            }
            return
        mine, its = (_shapes(part) for part in (self._sums, sums))
        if mine != its:
            raise MoELensError(f"expected a record of the same model as those so far, {mine}; got {its}")
        for layer, own in sums.items():
            for name, part in own.items():
                self._sums[layer][name] += part.cpu()


class ExampleRows(ABC):
    """A statistic that keeps a few numbers per example, so that two models can be compared example by example.

    settings: what two statistics must share to be merged; tables carry it in `attrs`.
    key: the columns that a table is sorted by, so that it does not depend on how the examples were batched.
    """

    captures: frozenset[str]
    key: tuple[str, ...]

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self._parts: list[pd.DataFrame] = []

    @abstractmethod
    def rows(self, record: Record) -> pd.DataFrame:
        """What a record adds: rows with the columns of `key` and the values."""

    def update(self, record: Record) -> Self:
        """Adds a record's samples; MoELensError for a record without what is needed."""
        check_captured(record, self.captures)
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


def check_captured(record: Record, captures: frozenset[str]) -> None:
    """MoELensError, naming what is missing, unless the record holds all these captures."""
    held = {
        "routing": record.routing,
        "expert_outputs": record.expert_outputs,
        "residual": record.residual,
        "moe_output": record.moe_output,
        "attention": record.attention_rows,
        "logits": record.logits is not None,
    }
    missing = sorted(name for name in captures if not held[name])
    if missing:
        raise MoELensError(f"the record holds no {', '.join(missing)}; ask for it with capture={tuple(missing)}")


def check_alike(first: LayerSums | ExampleRows, second: LayerSums | ExampleRows) -> None:
    """MoELensError unless both are the same statistic with equal settings."""
    if type(first) is not type(second) or first.settings != second.settings:
        mine, its = (f"{type(part).__name__}({part.settings})" for part in (first, second))
        raise MoELensError(f"only equal statistics of equal settings can be merged; got {mine} and {its}")


def _shapes(sums: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, list[int]]]:
    return {layer: {name: list(part.shape) for name, part in own.items()} for layer, own in sums.items()}
