"""ActivationRates: how often, how strongly and how decidedly tokens take each expert, with intervals over texts."""

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
from moe_lens.statistics.jackknife import Sums, by_group, groups_of


class ActivationRates(GroupSums):
    """The share of tokens that select an expert, N_i / N, over all tokens alike, and the gating weight it then has.

    positions: which tokens count, as in `Record.position_mask`.
    """

    size = "tokens"
    bounds: Mapping[str, tuple[float, float]] = {"rate": (0, 1)}

    def __init__(self, positions: Positions = "all") -> None:
        self.positions = positions
        super().__init__(Needs.of({"routing"}, positions), {"positions": positions})

    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        mask = record.position_mask(self.positions)
        tokens, groups = OnDevices(places_of(mask)), OnDevices(groups_of(record.ids)[mask.nonzero()[:, 0]])
        found = {}
        for layer, routing in record.routing.items():
            indices, weights = (tokens.of(part.flatten(0, 1)) for part in routing.ranked())
            weights = weights.double()
            none = torch.zeros(len(indices), routing.n_experts, dtype=torch.float64, device=weights.device)
            first = none.scatter(1, indices[:, :1], 1.0) if routing.has_weights else none.scatter(1, indices, torch.nan)
            counted = {
                "tokens": none[:, :1] + 1,
                "selected": tokens.of(routing.selected().flatten(0, 1)),
                "weight": none.scatter_add(1, indices, weights),
                "first": first,
            }
            found[layer] = {name: by_group(values, groups) for name, values in counted.items()}  # [group, expert or 1]
        return found

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
