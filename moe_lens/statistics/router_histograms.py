"""RouterHistograms: how router probabilities are spread over tokens, beside the Dirichlet distribution that fits."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from scipy.special import betainc
from torch import Tensor

from moe_lens.lens.devices import OnDevices
from moe_lens.routing import Routing
from moe_lens.statistics.jackknife import GROUPS, Sums, with_interval
from moe_lens.statistics.token_sums import Tokens, TokenSums

VALUES = ("each", "largest", "entropy")
BINS = 64
EDGES = np.linspace(0, 1, BINS + 1) ** 3
"""Of the histograms' bins, which are finer near 0, where most experts' probabilities are."""


class RouterHistograms(TokenSums):
    """Histograms of the softmax over all experts, and the Dirichlet distribution of the same moments.

    With the mean m and the variance v of each expert's probability over tokens, the fit has alpha_i = s m_i, where the
    concentration s = sum m (1 - m) / sum v - 1, v being m (1 - m) / (s + 1) of a Dirichlet. The larger s, the more
    alike tokens are routed; far below the number of experts, most tokens go to few experts each.

    positions: which tokens count, as in `Record.position_mask`.
    """

    bounds: Mapping[str, tuple[float, float]] = {"concentration": (0, float("inf")), "distance": (0, 1 / 3)}

    def of_layer(self, layer: int, routing: Routing, tokens: Tokens) -> dict[str, Tensor]:
        own = tokens.of(routing.logits).double().softmax(-1)  # [token, expert]
        counted = {"tokens": torch.ones_like(own[:, 0]), "probability": own, "squared": own.square()}
        entropy = torch.special.entr(own).sum(1, keepdim=True) / np.log(routing.n_experts)
        values = (own, own.amax(1, keepdim=True), entropy.clamp(0, 1))
        histograms = {name: _histogram(part, tokens.groups) for name, part in zip(VALUES, values, strict=True)}
        return tokens.summed(counted) | histograms

    def numbers(self, sums: Sums) -> dict[str, np.ndarray]:
        """concentration and distance, of the layer; NaN where all tokens have the same probabilities."""
        alpha, rest = _fitted(sums)
        if not np.isfinite(alpha).all():
            return dict.fromkeys(("concentration", "distance"), np.asarray(np.nan))
        seen = np.cumsum(sums["each"], axis=-1) / sums["tokens"]  # [expert, bin]
        theirs = betainc(alpha[:, None], rest[:, None], EDGES)  # [expert, edge]
        apart = np.pad(seen, ((0, 0), (1, 0))) - theirs
        left, right = apart[:, :-1], apart[:, 1:]
        squared = (left**2 + left * right + right**2) / 3  # the mean over a bin in which it goes straight
        distance = (squared * np.diff(theirs)).sum(-1).mean()
        return {"concentration": np.asarray((alpha + rest)[0]), "distance": np.asarray(distance)}

    def table(self) -> pd.DataFrame:
        """One row per layer: layer, tokens, concentration, distance, both with their interval over texts.

        distance: how far the fit is, the mean over experts of Cramer and von Mises' integral of (F - B)^2 dB, F being
        the distribution of the expert's probability over tokens, read at `EDGES`, and B the fit's (a Beta): 0 where it
        fits, at most 1/3. Raises MoELensError if no token counted.
        """
        return self.layer_table()

    def histograms(self) -> pd.DataFrame:
        """One row per layer, value and bin: layer, value, low, high (of the bin), share, its interval, fitted.

        value: "each", the probabilities of all experts at all tokens, "largest", each token's largest, or "entropy",
        each token's entropy over experts as a share of its highest. share: of them in the bin. fitted: the share that
        the Dirichlet distribution of `table` has there, of "each".
        """
        parts = []
        for layer, tensors in self.layer_sums().items():
            sums = {name: part.numpy() for name, part in tensors.items()}
            alpha, rest = _fitted({name: part.sum(0) for name, part in sums.items()})
            fitted = np.diff(betainc(alpha[:, None], rest[:, None], EDGES)).mean(0)
            for value, (share, low, high) in with_interval(_shares, sums, size="tokens").items():
                columns = {"layer": layer, "value": value, "low": EDGES[:-1], "high": EDGES[1:], "share": share}
                columns |= {"share_low": low.clip(0, 1), "share_high": high.clip(0, 1)}
                parts.append(pd.DataFrame(columns | {"fitted": fitted if value == "each" else np.nan}))
        table = pd.concat(parts, ignore_index=True)
        table.attrs = dict(self.settings)
        return table


def _histogram(values: Tensor, groups: OnDevices) -> Tensor:
    """How many of the values [token, value], in [0, 1], are in each bin, float64 [group, value, bin]."""
    bins = (values.pow(1 / 3) * BINS).long().clamp(max=BINS - 1)
    size = values.shape[1]
    places = (groups.on(values.device)[:, None] * size + torch.arange(size, device=values.device)) * BINS + bins
    counts = torch.zeros(GROUPS * size * BINS, dtype=torch.float64, device=values.device)
    return counts.index_add_(0, places.flatten(), torch.ones_like(values).flatten()).view(GROUPS, size, BINS)


def _fitted(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Of each expert's Beta distribution both parameters, [expert]; NaN where nothing varies over tokens."""
    mean = sums["probability"] / sums["tokens"]
    variance = (sums["squared"] / sums["tokens"] - mean**2).sum()
    if variance <= 1e-15:
        return (np.full(len(mean), np.nan),) * 2
    concentration = max((mean * (1 - mean)).sum() / variance - 1, 1e-9)
    return np.maximum(concentration * mean, 1e-12), np.maximum(concentration * (1 - mean), 1e-12)


def _shares(sums: Sums) -> dict[str, np.ndarray]:
    """By value the share in each bin, [bin]."""
    return {value: sums[value].sum(0) / sums[value].sum() for value in VALUES}
