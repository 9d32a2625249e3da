"""LogitSpread: how far apart a router's logits are, in which a bias on them can be given."""

import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.routing import Routing
from moe_lens.statistics.jackknife import Sums
from moe_lens.statistics.token_sums import Tokens, TokenSums

SURE = 0.99
"""A probability from which on a token's router counts as saturated."""


class LogitSpread(TokenSums):
    """The standard deviation of a token's router logits around their mean over experts, per layer.

    sd = sqrt(mean over tokens of the variance over experts): a constant per token does not count, as it does not for a
    softmax. `Bias(experts, 2, sd=spread.sd())` adds two of them to the logits of experts.
    positions: which tokens count, as in `Record.position_mask`.
    """

    bounds: Mapping[str, tuple[float, float]] = {"sd": (0, float("inf")), "saturated": (0, 1)}

    def of_layer(self, layer: int, routing: Routing, tokens: Tokens) -> dict[str, Tensor]:
        logits = tokens.of(routing.logits).double()  # [token, expert]
        sure = logits.softmax(-1).amax(-1) > SURE
        variance = (logits - logits.mean(-1, keepdim=True)).square().mean(-1)
        return tokens.summed({"tokens": torch.ones_like(variance), "variance": variance, "sure": sure})

    def numbers(self, sums: Sums) -> dict[str, np.ndarray]:
        """sd and saturated, of the layer."""
        tokens = sums["tokens"]
        return {"sd": np.sqrt(sums["variance"] / tokens), "saturated": np.asarray(sums["sure"] / tokens)}

    def table(self) -> pd.DataFrame:
        """One row per layer: layer, tokens, sd, and saturated, the share of tokens of which one expert has nearly all
        of the softmax over experts, a probability above `SURE`; both with their 95 % interval over texts
        (`with_interval`) in _low and _high.

        Raises MoELensError if no token counted.
        """
        return self.layer_table()

    def sd(self) -> Mapping[int, float]:
        """The standard deviations by layer, as `Bias` takes them.

        Warns of layers whose router is saturated at most tokens, where one more standard deviation changes little.
        Raises MoELensError where logits have no finite spread above 0.
        """
        table = self.table()
        wrong = table.loc[~((table["sd"] > 0) & (table["sd"] < float("inf"))), "layer"].tolist()
        if wrong:
            raise MoELensError(
                f"the logits of layers {wrong} have no finite spread above 0; give biases in logits there"
            )
        saturated = table.loc[table["saturated"] > 0.5, "layer"].tolist()
        if saturated:
            warnings.warn(
                f"at most tokens one expert has a probability above {SURE} in layers {saturated}: a bias of a few "
                "standard deviations changes either nothing or everything there",
                stacklevel=2,
            )
        return dict(zip(table["layer"].tolist(), table["sd"].tolist(), strict=True))
