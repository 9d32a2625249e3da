"""How sure a streamed number is: examples fall into groups, and leaving out each in turn shows how much it moves."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from torch import Tensor

from moe_lens.lens.devices import OnDevices, on_cpu

GROUPS = 10
"""Into which examples fall by a hash of their id: memory stays constant, and neither order nor batches matter."""

Sums = Mapping[Any, np.ndarray]
"""By name, sums over examples."""


def groups_of(ids: Sequence[str]) -> Tensor:
    """The group of each example, int64 [batch]."""
    return torch.tensor([crc32(str(name).encode()) % GROUPS for name in ids])


def by_group(values: Tensor, groups: OnDevices) -> Tensor:
    """Values of tokens [token, …] summed within each group, float64 [group, …]; groups: int64 [token]."""
    sums = torch.zeros(GROUPS, *values.shape[1:], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, groups.on(values.device), values.double())


def with_interval(
    estimates: Callable[[Sums], Mapping[str, np.ndarray]], sums: Sums, *, size: Any
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What `estimates` makes of the sums over all groups, by name, and the low and high ends of its 95 % interval.

    The interval is a delete-a-group jackknife's with Student's t (Kott 2001): texts are drawn, not tokens, so that
    tokens of one text may depend on each other. NaN with less than two groups.

    sums: name -> [group, …]. size: the name of the sum that tells how much is in a group; empty ones do not count.
    """
    total = {name: part.sum(0) for name, part in sums.items()}
    found = {name: np.asarray(value, dtype=np.float64) for name, value in estimates(total).items()}
    seen = np.flatnonzero(sums[size].reshape(GROUPS, -1).sum(1) > 0)
    count = len(seen)
    if count < 2:
        return {name: (value, *np.full((2, *value.shape), np.nan)) for name, value in found.items()}
    left = [estimates({name: total[name] - part[group] for name, part in sums.items()}) for group in seen]
    factor, intervals = student.ppf(0.975, count - 1) * np.sqrt((count - 1) / count), {}
    for name, value in found.items():
        without = np.stack([one[name] for one in left])
        reach = factor * np.sqrt(np.square(without - without.mean(0)).sum(0))
        intervals[name] = value, value - reach, value + reach
    return intervals


class GroupedSums:
    """Sums over examples of a value of every expert, by layer and group: memory does not grow with their number.

    parts: how many parts the examples are in, of which `part` then has the sums of each alone.
    """

    def __init__(self, parts: int = 1) -> None:
        self._parts = parts
        self._sums: dict[int, Tensor] = {}  # [part and group, expert]

    def add(
        self,
        ids: Sequence[str],
        values: Mapping[int, Tensor],
        *,
        weight: float = 1.0,
        parts: Sequence[int] | None = None,
    ) -> None:
        """Adds `weight` times the values [example, expert] of these examples, by layer. parts: the part of each."""
        groups = groups_of(ids) + GROUPS * torch.tensor(parts or [0] * len(ids))
        for layer, own in zip(values, on_cpu(values.values()), strict=True):
            empty = torch.zeros(self._parts * GROUPS, own.shape[1], dtype=torch.float64)
            self._sums.setdefault(layer, empty).index_add_(0, groups, weight * own.double())

    def state(self) -> dict[int, Tensor]:
        """The sums so far."""
        return self._sums

    def add_state(self, state: Mapping[int, Tensor]) -> None:
        """Adds what `state` of another gave."""
        for layer, own in state.items():
            self._sums[layer] = self._sums[layer] + own if layer in self._sums else own

    def part(self, number: int) -> "GroupedSums":
        """The sums of one part."""
        found = GroupedSums()
        found._sums = {layer: own.unflatten(0, (-1, GROUPS))[number] for layer, own in self._sums.items()}
        return found

    def means(self, ids: Iterable[str]) -> pd.DataFrame:
        """Per expert the sum over the number of all examples: layer, expert, score, score_low, score_high."""
        counts = np.bincount(groups_of(list(ids)), minlength=GROUPS).astype(np.float64)[:, None]
        parts = []
        for layer, own in sorted(self._sums.items()):
            sums = own.unflatten(0, (-1, GROUPS)).sum(0).numpy()
            found = with_interval(_mean, {"sum": sums, "examples": counts}, size="examples")
            value, low, high = found["mean"]
            columns = {"layer": layer, "expert": np.arange(len(value)), "score": value}
            parts.append(pd.DataFrame(columns | {"score_low": low, "score_high": high}))
        return pd.concat(parts, ignore_index=True)


def _mean(sums: Sums) -> dict[str, np.ndarray]:
    return {"mean": sums["sum"] / sums["examples"]}
