"""RouterLoad: how sure a router is of its choice, and how evenly it spreads tokens over experts."""

import numpy as np
import pandas as pd
import torch
from scipy.special import entr
from torch import Tensor

from moe_lens.routing import Routing
from moe_lens.statistics.jackknife import Sums
from moe_lens.statistics.token_sums import Tokens, TokenSums

NUMBERS = ("entropy", "load_entropy", "max_load", "balance_loss")


class RouterLoad(TokenSums):
    """Router entropy and load per layer, over all tokens alike.

    positions: which tokens count, as in `Record.position_mask`.
    """

    def of_layer(self, layer: int, routing: Routing, tokens: Tokens) -> dict[str, Tensor]:
        selected = tokens.of(routing.selected())  # [token, expert]
        if routing.has_logits:
            probabilities = tokens.of(routing.probabilities()).double()
        else:
            probabilities = torch.full_like(selected, torch.nan, dtype=torch.float64)
        entropy = torch.special.entr(probabilities).sum(-1) / np.log(2)
        counted = {
            "tokens": torch.ones_like(entropy),
            "entropy": entropy,
            "entropy_squared": entropy.square(),
            "selected": selected,
            "probability": probabilities,
        }
        return tokens.summed(counted)

    def numbers(self, sums: Sums) -> dict[str, np.ndarray]:
        """NUMBERS, each of the layer."""
        tokens, n_experts = sums["tokens"], len(sums["selected"])
        shares = sums["selected"] / sums["selected"].sum()
        found = (
            sums["entropy"] / tokens,
            entr(shares).sum() / np.log(2),
            shares.max() * n_experts,
            n_experts * (sums["selected"] * sums["probability"]).sum() / tokens**2,
        )
        return dict(zip(NUMBERS, map(np.asarray, found), strict=True))

    def table(self) -> pd.DataFrame:
        """One row per layer, entropies in bits:

        tokens: how many counted. entropy: the mean entropy of the router's softmax over all experts, with its standard
        deviation over tokens, entropy_sd; at most log2 of n_experts. load_entropy: of the experts' shares of all
        selections; at most the same. max_load: the largest share times n_experts, 1 where the load is even.
        unused: experts that were never selected. balance_loss: n_experts times the sum over experts of (selections per
        token) times (mean probability), as in the load-balancing loss (Fedus et al. 2022) for k selections; k where
        the load is even. Where logits are not known, entropy and balance_loss are NaN. Each of NUMBERS has its 95 %
        interval over texts (`with_interval`) in _low and _high. Raises MoELensError if no token counted.
        """
        rows = []
        for layer, found in self.estimates().items():
            sums = {name: part.numpy() for name, part in self.layer_sums()[layer].items()}
            row = {"layer": layer, "tokens": int(sums["tokens"].sum()), "n_experts": sums["selected"].shape[1]}
            row |= {name: float(value) for name, value in found.items()}
            variance = sums["entropy_squared"].sum() / row["tokens"] - row["entropy"] ** 2
            row["entropy_sd"] = float(np.sqrt(np.maximum(0.0, variance)))
            row["unused"] = int((sums["selected"].sum(0) == 0).sum())
            rows.append(row)
        table = pd.DataFrame(rows)
        table.attrs = dict(self.settings)
        return table
