"""CoActivation: which experts are selected together."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.lens.devices import OnDevices, places_of
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import LayerSums
from moe_lens.statistics.jackknife import GROUPS, Sums, groups_of, with_interval
from moe_lens.statistics.pairs import pairs_table


class CoActivation(LayerSums):
    """How often two experts of a layer are selected by the same token, over all pairs (Muennighoff et al. 2024).

    positions: which tokens count, as in `Record.position_mask`.
    """

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

    def table(self) -> pd.DataFrame:
        """One row per ordered pair of different experts: layer, expert, other, together, probability, its interval.

        together: tokens that selected both, N_ij. probability: of `other` given `expert`, N_ij / N_i; NaN for an expert
        that was never selected. Over the others of an expert the probabilities sum to k - 1. probability_low and _high:
        its 95 % interval over texts (`with_interval`), NaN where some group of texts holds all that selected `expert`.
        Raises MoELensError if no token counted.
        """
        parts = []
        for layer, sums in self.layer_sums().items():
            together = sums["together"].numpy()
            value, low, high = with_interval(_probability, {"together": together}, size="together")
            ends = {"probability_low": low.clip(0, 1), "probability_high": high.clip(0, 1)}
            columns = {"together": together.sum(0).astype(int), "probability": value} | ends
            parts.append(pairs_table(layer, columns))
        table = pd.concat(parts, ignore_index=True)
        table.attrs = dict(self.settings)
        return table


def _probability(sums: Sums) -> np.ndarray:
    """N_ij / N_i of the sums over some texts, [expert, other]."""
    together = sums["together"]
    alone = together.diagonal()[:, None]
    out = np.full(together.shape, np.nan)
    np.divide(together, alone, out=out, where=alone > 0)
    return out
