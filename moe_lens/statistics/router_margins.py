"""RouterMargins: by how much a token's experts are chosen, from the last that is to the first that is not."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices, places_of
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import GroupSums
from moe_lens.statistics.jackknife import Sums, by_group, groups_of

CLOSE = 0.1
"""A margin, in standard deviations of a token's logits, below which its choice is close."""
NUMBERS = ("margin", "margin_sd", "close")


class RouterMargins(GroupSums):
    """How decided a router is: the lowest logit of the experts that a token selects minus the highest of the others.

    It is what a bias on one of them has to reach to change the selection. Below 0 where more than the logits decides,
    such as a selection bias or groups of experts. positions: which tokens count, as in `Record.position_mask`.
    """

    size = "tokens"
    bounds: Mapping[str, tuple[float, float]] = {"close": (0, 1)}

    def __init__(self, positions: Positions = "all") -> None:
        self.positions = positions
        super().__init__(Needs.of({"routing"}, positions), {"positions": positions})

    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        mask, found = record.position_mask(self.positions), {}
        tokens, groups = OnDevices(places_of(mask)), OnDevices(groups_of(record.ids)[mask.nonzero()[:, 0]])
        for layer, routing in record.routing.items():
            if routing.indices.shape[-1] == routing.n_experts:
                raise MoELensError(f"layer {layer} selects all of its {routing.n_experts} experts, so none is left out")
            logits, indices = (tokens.of(part.flatten(0, 1)) for part in (routing.logits, routing.indices))
            logits = logits.double()  # [token, expert]
            last = logits.gather(1, indices).amin(1)
            margin = last - logits.scatter(1, indices, -torch.inf).amax(1)
            spread = logits.std(1, correction=0) if len(logits) else logits.sum(1)  # of no tokens std would warn
            in_sd = margin / spread.clamp(min=1e-12)
            values = torch.stack([torch.ones_like(margin), margin, in_sd, (in_sd < CLOSE).double()], 1)
            found[layer] = dict(zip(("tokens", *NUMBERS), by_group(values, groups).unbind(1), strict=True))
        return found

    def numbers(self, sums: Sums) -> dict[str, np.ndarray]:
        """NUMBERS, each of the layer."""
        return {name: np.asarray(sums[name] / sums["tokens"]) for name in NUMBERS}

    def table(self) -> pd.DataFrame:
        """One row per layer: layer, tokens, margin (mean, in logits), margin_sd (mean, in standard deviations of the
        token's logits over experts), close (share of tokens whose margin is below `CLOSE` of these).

        Each with its 95 % interval over texts (`with_interval`) in _low and _high. Raises MoELensError if no token
        counted, and for a layer that selects all experts.
        """
        return self.layer_table()
