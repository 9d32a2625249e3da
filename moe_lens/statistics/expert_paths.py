"""ExpertPaths: which experts of the next layer a token goes on to, beside what independent layers would give."""

from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.devices import OnDevices, places_of
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import LayerSums
from moe_lens.statistics.jackknife import GROUPS, Sums, groups_of, with_interval


class ExpertPaths(LayerSums):
    """How often a token that selects expert i of a layer selects expert j of the next MoE layer: P(j | i).

    positions: which tokens count, as in `Record.position_mask`.
    """

    def __init__(self, positions: Positions = "all") -> None:
        self.positions = positions
        super().__init__(Needs.of({"routing"}, positions), {"positions": positions})

    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        mask = record.position_mask(self.positions)
        groups = groups_of(record.ids)[mask.nonzero()[:, 0]]  # [token]
        by_group = OnDevices(places_of(mask)[groups.argsort()])
        sizes = groups.bincount(minlength=GROUPS)
        selected = {
            layer: by_group.of(routing.selected().flatten(0, 1)).double().split(sizes.tolist())
            for layer, routing in record.routing.items()
        }  # [group][token, expert]
        found = {layer: {"tokens": sizes.double()} for layer in selected}
        for layer, after in pairwise(selected):
            both = zip(selected[layer], selected[after], strict=True)
            pairs = [(first, second.to(first.device)) for first, second in both]
            found[layer] |= {
                "together": torch.stack([first.T @ second for first, second in pairs]),  # [group, expert, other]
                "before": torch.stack([first.sum(0) for first, _ in pairs]),  # [group, expert]
                "after": torch.stack([second.sum(0) for _, second in pairs]),
            }
        return found

    def table(self) -> pd.DataFrame:
        """One row per pair of an expert and one of the next MoE layer: layer, expert, next_layer, other, together, …

        together: tokens that selected both, N_ij. probability: P(j | i) = N_ij / N_i, which sums to the next layer's k
        over j. rate: P(j) = N_j / N, which independent layers would give. lift: their ratio, with its 95 % interval
        over texts (`with_interval`) in lift_low and lift_high. NaN where i or j was never selected, and of the interval
        where a group of texts holds all of that. Raises MoELensError if no token counted, and for one MoE layer.
        """
        parts: list[pd.DataFrame] = []
        if len(self._sums) == 1:
            raise MoELensError("a path leads from one MoE layer to the next; this model has one only")
        found = self.layer_sums()
        for layer, after in pairwise(found):
            sums = {name: part.numpy() for name, part in found[layer].items()}
            total = {name: part.sum(0) for name, part in sums.items()}
            value, low, high = with_interval(_lifts, sums, size="tokens")["lift"]
            rate = np.broadcast_to(total["after"] / total["tokens"], value.shape)
            expert, other = np.indices(value.shape)
            columns = {"layer": layer, "expert": expert, "next_layer": after, "other": other}
            columns |= {"together": total["together"].astype(int), "probability": _given(total), "rate": rate}
            columns |= {"lift": value, "lift_low": low.clip(0), "lift_high": high}
            flat = {name: part.ravel() if isinstance(part, np.ndarray) else part for name, part in columns.items()}
            parts.append(pd.DataFrame(flat))
        table = pd.concat(parts, ignore_index=True)
        table.attrs = dict(self.settings)
        return table


def _given(sums: Sums) -> np.ndarray:
    """N_ij / N_i of the sums over some texts, [expert, other]."""
    return _ratio(sums["together"], sums["before"][:, None])


def _lifts(sums: Sums) -> dict[str, np.ndarray]:
    """lift: P(j | i) / P(j) of the sums over some texts, [expert, other]."""
    return {"lift": _ratio(_given(sums), sums["after"] / sums["tokens"])}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The ratio, NaN where what is below is 0."""
    below, out = np.broadcast_to(below, above.shape), np.full(above.shape, np.nan)
    np.divide(above, below, out=out, where=below > 0)
    return out
