"""RouterLoad: how sure a router is of its choice, and how evenly it spreads tokens over experts."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.positions import Positions, check_positions
from moe_lens.record import Record
from moe_lens.statistics.base import LayerSums


class RouterLoad(LayerSums):
    """Router entropy and load per layer, over all tokens alike.

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
            here = mask.to(routing.indices.device)
            probabilities = routing.probabilities()[here].double()  # [token, expert]
            entropy = torch.special.entr(probabilities).sum(-1) / np.log(2)
            selected = routing.selected()[here].double()
            found[layer] = {
                "tokens": here.sum(),
                "entropy": entropy.sum(),
                "entropy_squared": entropy.square().sum(),
                "selected": selected.sum(0),
                "probability": probabilities.sum(0),
            }
        return found

    def table(self) -> pd.DataFrame:
        """One row per layer, entropies in bits:

        tokens: how many counted. entropy: the mean entropy of the router's softmax over all experts, with its standard
        deviation over tokens, entropy_sd; at most log2 of n_experts. load_entropy: of the experts' shares of all
        selections; at most the same. max_load: the largest share times n_experts, 1 where the load is even.
        unused: experts that were never selected. balance_loss: n_experts times the sum over experts of (selections per
        token) times (mean probability), as in the load-balancing loss (Fedus et al. 2022) for k selections; k where
        the load is even.
        """
        rows = []
        for layer, sums in self.layer_sums().items():
            tokens = float(sums["tokens"])
            entropy = float(sums["entropy"]) / tokens
            shares = sums["selected"] / sums["selected"].sum()
            even = len(shares)
            rows.append({
                "layer": layer,
                "tokens": int(tokens),
                "n_experts": even,
                "entropy": entropy,
                "entropy_sd": float(np.sqrt(max(0.0, float(sums["entropy_squared"]) / tokens - entropy**2))),
                "load_entropy": float(torch.special.entr(shares).sum() / np.log(2)),
                "max_load": float(shares.max() * even),
                "unused": int((shares == 0).sum()),
                "balance_loss": float(even * (sums["selected"] * sums["probability"]).sum() / tokens**2),
            })
        table = pd.DataFrame(rows)
        table.attrs = dict(self.settings)
        return table
