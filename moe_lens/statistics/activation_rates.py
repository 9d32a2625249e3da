"""ActivationRates: how often, how strongly and how decidedly tokens take each expert, with intervals over texts."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.routing import Routing
from moe_lens.statistics.jackknife import Sums
from moe_lens.statistics.token_sums import Tokens, TokenSums


class ActivationRates(TokenSums):
    """The share of tokens that select an expert, N_i / N, over all tokens alike, and the gating weight it then has.

    positions: which tokens count, as in `Record.position_mask`.
    """

    bounds: Mapping[str, tuple[float, float]] = {"rate": (0, 1)}

    def of_layer(self, layer: int, routing: Routing, tokens: Tokens) -> dict[str, Tensor]:
        indices, weights = (tokens.of(part) for part in routing.ranked())
        weights = weights.double()
        none = torch.zeros(len(indices), routing.n_experts, dtype=torch.float64, device=weights.device)
        first = none.scatter(1, indices[:, :1], 1.0) if routing.has_weights else none.scatter(1, indices, torch.nan)
        counted = {
            "tokens": none[:, :1] + 1,
            "selected": tokens.of(routing.selected()),
            "weight": none.scatter_add(1, indices, weights),
            "first": first,
        }
        return tokens.summed(counted)  # [group, expert or 1]

    def numbers(self, sums: Sums) -> dict[str, np.ndarray]:
        """rate, [expert]."""
        return {"rate": sums["selected"] / sums["tokens"]}

    def table(self) -> pd.DataFrame:
        """One row per expert: layer, expert, tokens (that count), selected (of them), rate, weight, first.

        rate: selected / tokens; over a layer's experts it sums to k. rate_low and rate_high: its 95 % interval over
        texts (`with_interval`). weight: the mean gating weight over the tokens that selected it, first: of these tokens
        the share in which no other expert has more; both NaN for an expert that was never selected, and where weights
        are not known.
        Raises MoELensError if no token counted.
        """
        parts, estimates = [], self.estimates()
        for layer, sums in self.layer_sums().items():
            total = {name: part.sum(0).numpy() for name, part in sums.items()}
            columns = {"layer": layer, "expert": np.arange(len(total["selected"])), "tokens": int(total["tokens"][0])}
            columns |= {"selected": total["selected"].astype(int)} | estimates[layer]
            for name in ("weight", "first"):
                none = np.full(len(total["selected"]), np.nan)
                columns[name] = np.divide(total[name], total["selected"], out=none, where=total["selected"] > 0)
            parts.append(pd.DataFrame(columns))
        table = pd.concat(parts, ignore_index=True)
        table.attrs = dict(self.settings)
        return table
