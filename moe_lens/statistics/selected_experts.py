"""SelectedExperts: the experts of every token, to compare models token by token."""

import numpy as np
import pandas as pd

from moe_lens.lens.devices import OnDevices, on_cpu, places_of
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import ExampleRows


class SelectedExperts(ExampleRows):
    """Which experts each token selects, from the highest gating weight to the lowest.

    positions: which tokens count, as in `Record.position_mask`. Where weights are not known they are NaN, and ranks in
    the order in which experts are told. The table has k rows for each token and layer: measure
    a sample of the examples, not all of them.

    >>> router_saturation(early_table, late_table)
    """

    key = ("id", "layer", "position", "rank")

    def __init__(self, positions: Positions = "all") -> None:
        self.positions = positions
        super().__init__(Needs.of({"routing"}, positions), {"positions": positions})

    def rows(self, record: Record) -> pd.DataFrame:
        """Columns id, layer, position (of the token in its prompt), rank (0 for the highest weight), expert, weight."""
        mask = record.position_mask(self.positions)
        row, position = mask.numpy().nonzero()
        starts, tokens = record.starts.numpy(), OnDevices(places_of(mask))
        ids = np.array(record.ids, dtype=object)[row]
        found = []
        for routing in record.routing.values():
            found += [tokens.of(part.flatten(0, 1)) for part in routing.ranked()]  # [token, k] each
        parts, sorted_by_weight = [], iter(on_cpu(found))
        for layer in record.routing:
            experts, weights = next(sorted_by_weight), next(sorted_by_weight)
            k = experts.shape[1]
            columns = {"id": np.repeat(ids, k), "layer": np.int16(layer)}
            columns |= {"position": np.repeat((position - starts[row]).astype(np.int32), k)}
            columns |= {"rank": np.tile(np.arange(k, dtype=np.int16), len(row))}
            columns |= {
                "expert": experts.flatten().numpy().astype(np.int16),
                "weight": weights.float().flatten().numpy(),
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)
