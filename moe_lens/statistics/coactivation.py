"""CoActivation: which experts are selected together."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.lens.devices import OnDevices, places_of
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import GroupSums
from moe_lens.statistics.jackknife import GROUPS, Sums, groups_of
from moe_lens.statistics.pairs import pairs_table


class CoActivation(GroupSums):
    """How often two experts of a layer are selected by the same token, over all pairs (Muennighoff et al. 2024).

    positions: which tokens count, as in `Record.position_mask`.
    """

    size = "together"
    bounds: Mapping[str, tuple[float, float]] = {"probability": (0, 1)}

    def __init__(self, positions: Positions = "all") -> None:
        self.positions = positions
        super().__init__(Needs.of({"routing"}, positions), {"positions": positions})

    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        mask = record.position_mask(self.positions)
        groups = groups_of(record.ids)[mask.nonzero()[:, 0]]  # [token]
        by_group = OnDevices(places_of(mask)[groups.argsort()])
        sizes = groups.bincount(minlength=GROUPS).tolist()
        found = {}
        for layer, routing in record.routing.items():
            selected = by_group.of(routing.selected().flatten(0, 1)).double()  # [token, expert]
            together = [part.T @ part for part in selected.split(sizes)]
            found[layer] = {"together": torch.stack(together)}  # [group, expert, expert]
        return found

    def numbers(self, sums: Sums) -> dict[str, np.ndarray]:
        """probability: N_ij / N_i, [expert, other]."""
        together = sums["together"]
        alone = together.diagonal()[:, None]
        out = np.full(together.shape, np.nan)
        np.divide(together, alone, out=out, where=alone > 0)
        return {"probability": out}

    def table(self) -> pd.DataFrame:
        """One row per ordered pair of different experts: layer, expert, other, together, probability, its interval.

        together: tokens that selected both, N_ij. probability: of `other` given `expert`, N_ij / N_i; NaN for an expert
        that was never selected. Over the others of an expert the probabilities sum to k - 1. probability_low and _high:
        its 95 % interval over texts (`with_interval`), NaN where some group of texts holds all that selected `expert`.
        Raises MoELensError if no token counted.
        """
        parts = []
        for layer, found in self.estimates().items():
            together = self.layer_sums()[layer]["together"].numpy().sum(0).astype(int)
            parts.append(pairs_table(layer, {"together": together} | found))
        table = pd.concat(parts, ignore_index=True)
        table.attrs = dict(self.settings)
        return table
