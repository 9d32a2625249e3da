"""Random sets of experts that are about as much used as given ones."""

from collections.abc import Collection, Sequence, Set
from itertools import combinations, islice
from math import comb

import numpy as np
import pandas as pd

from moe_lens.experts import ExpertSet

Ids = tuple[int, ...]
ALL = 5_000
"""So many sets of a layer's experts are all compared."""
STARTS = 100
"""How many random starts there are for each set that is wanted, at most."""


def usage_by_layer(table: pd.DataFrame) -> dict[int, np.ndarray]:
    """The usage [expert] of each layer of a table with the columns layer, expert and score."""
    ordered = table.sort_values(["layer", "expert"])
    return {int(str(layer)): rows["score"].to_numpy(float) for layer, rows in ordered.groupby("layer")}


def share_of(experts: ExpertSet, table: pd.DataFrame) -> float:
    """The share of all selections in the layers of a set that are of its experts."""
    by_layer = usage_by_layer(table)
    return float(np.mean([by_layer[layer][list(ids)].sum() for layer, ids in experts.members]))


def near_sets(usage: np.ndarray, like: Collection[int], count: int, *, seed: int | Sequence[int]) -> list[Ids]:
    """Up to `count` different sets of as many experts of a layer as `like` has, with about the same sum of usage.

    usage: [expert]. Of up to `ALL` sets the nearest. Where there are more, from a random set on the exchange of a
    member for another expert that brings the sum nearest to that of `like` is made, until none brings it nearer; what
    was found before is passed over for the next best. `like` itself is among them only where there is no other.
    """
    own, size, rng = tuple(sorted(like)), len(like), np.random.default_rng(seed)
    if size == len(usage):
        return [own]
    if comb(len(usage), size) <= ALL:
        every = rng.permutation([one for one in combinations(range(len(usage)), size) if one != own])
        gaps = np.abs(usage[every].sum(-1) - usage[list(own)].sum()).round(12)
        return [tuple(every[place].tolist()) for place in np.argsort(gaps, kind="stable")[:count]]
    found: dict[Ids, None] = {own: None}
    for _ in range(STARTS * count):
        if len(found) > count:
            break
        start = tuple(sorted(rng.choice(len(usage), size, replace=False).tolist()))
        end = _nearest(usage, usage[list(own)].sum(), start, found.keys())
        found |= {} if end is None else {end: None}
    return list(islice(found, 1, None))


def _nearest(usage: np.ndarray, target: float, start: Ids, taken: Set[Ids]) -> Ids | None:
    """The set at the end of the exchanges from `start`, or the best one beside it that is not taken."""
    members = start
    while True:
        others = np.setdiff1d(np.arange(len(usage)), members)
        gap = usage[list(members)].sum() - target
        gaps = np.abs(gap - usage[list(members), None] + usage[others])  # [member, other], after their exchange
        order = np.argsort(gaps, axis=None, kind="stable")
        near = (_exchanged(members, others, int(place)) for place in order)
        if gaps.flat[order[0]] >= abs(gap) - 1e-12:
            return next((one for one in (members, *near) if one not in taken), None)
        members = next(near)


def _exchanged(members: Ids, others: np.ndarray, place: int) -> Ids:
    """The members with one of them exchanged, by the place of the pair in [member, other]."""
    out, into = divmod(place, len(others))
    return tuple(sorted((*members[:out], *members[out + 1 :], int(others[into]))))
