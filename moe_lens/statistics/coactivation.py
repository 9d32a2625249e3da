"""CoActivation: which experts are selected together."""

import numpy as np
import pandas as pd
from torch import Tensor

from moe_lens.positions import Positions, check_positions
from moe_lens.record import Record
from moe_lens.statistics.base import LayerSums
from moe_lens.statistics.pairs import pairs_table


class CoActivation(LayerSums):
    """How often two experts of a layer are selected by the same token, over all pairs (Muennighoff et al. 2024).

    positions: which tokens count, as in `Record.position_mask`.
    """

    captures = frozenset({"routing"})

    def __init__(self, positions: Positions = "all") -> None:
        check_positions(positions)
        self.positions = positions
        super().__init__({"positions": positions})

    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        mask = record.position_mask(self.positions)
        found = {}
        for layer, routing in record.routing.items():
            selected = routing.selected()[mask.to(routing.indices.device)].double()  # [token, expert]
            found[layer] = {"together": selected.T @ selected}
        return found

    def table(self) -> pd.DataFrame:
        """One row per ordered pair of different experts: layer, expert, other, together, probability.

        together: tokens that selected both, N_ij. probability: of `other` given `expert`, N_ij / N_i; NaN for an expert
        that was never selected. Over the others of an expert the probabilities sum to k - 1.
        """
        parts = []
        for layer, sums in self.layer_sums().items():
            together = sums["together"].numpy()
            alone = together.diagonal()[:, None]
            probability = np.divide(together, alone, out=np.full(together.shape, np.nan), where=alone > 0)
            parts.append(pairs_table(layer, {"together": together.astype(int), "probability": probability}))
        table = pd.concat(parts, ignore_index=True)
        table.attrs = dict(self.settings)
        return table
