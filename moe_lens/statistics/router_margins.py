"""RouterMargins: by how much a token's experts are chosen, from the last that is to the first that is not."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.routing import Routing
from moe_lens.statistics.jackknife import Sums
from moe_lens.statistics.token_sums import Tokens, TokenSums

CLOSE = 0.1
"""A margin, in standard deviations of a token's logits, below which its choice is close."""
NUMBERS = ("margin", "margin_sd", "close")


class RouterMargins(TokenSums):
    """How decided a router is: the lowest logit of the experts that a token selects minus the highest of the others.

    It is what a bias on one of them has to reach to change the selection. Below 0 where more than the logits decides,
    such as a selection bias or groups of experts. positions: which tokens count, as in `Record.position_mask`.
    """

    bounds: Mapping[str, tuple[float, float]] = {"close": (0, 1)}

    def of_layer(self, layer: int, routing: Routing, tokens: Tokens) -> dict[str, Tensor]:
        if routing.indices.shape[-1] == routing.n_experts:
            raise MoELensError(f"layer {layer} selects all of its {routing.n_experts} experts, so none is left out")
        logits, indices = (tokens.of(part) for part in (routing.logits, routing.indices))
        logits = logits.double()  # [token, expert]
        last = logits.gather(1, indices).amin(1)
        margin = last - logits.scatter(1, indices, -torch.inf).amax(1)
        spread = logits.std(1, correction=0) if len(logits) else logits.sum(1)  # of no tokens std would warn
        in_sd = margin / spread.clamp(min=1e-12)
        numbers = dict(zip(NUMBERS, (margin, in_sd, in_sd < CLOSE), strict=True))
        return tokens.summed({"tokens": torch.ones_like(margin), **numbers})

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
