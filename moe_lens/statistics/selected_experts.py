"""SelectedExperts: the experts of every token, to compare models token by token."""

import numpy as np
import pandas as pd

from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import ExampleRows


class SelectedExperts(ExampleRows):
    """Which experts each token selects, from the highest gating weight to the lowest.

    positions: which tokens count, as in `Record.position_mask`. The table has k rows for each token and layer: measure
    a sample of the examples, not all of them.

    >>> router_saturation(early_table, late_table)
    """

    key = ("id", "layer", "position", "rank")

    def __init__(self, positions: Positions = "all") -> None:
        self.positions = positions
        super().__init__(Needs.of({"routing"}, positions), {"positions": positions})

    def rows(self, record: Record) -> pd.DataFrame:
        """Columns id, layer, position (of the token in its prompt), rank (0 for the highest weight), expert, weight."""
        mask = record.position_mask(self.positions).numpy()
        row, position = mask.nonzero()
        starts = record.starts.numpy()
        ids = np.array(record.ids, dtype=object)[row]
        parts = []
        for layer, routing in record.routing.items():
            weights, order = routing.weights.float().sort(dim=-1, descending=True, stable=True)
            experts = routing.indices.gather(-1, order).cpu().numpy()[row, position]  # [token, k]
            k = experts.shape[1]
            columns = {"id": np.repeat(ids, k), "layer": np.int16(layer)}
            columns |= {"position": np.repeat((position - starts[row]).astype(np.int32), k)}
            columns |= {"rank": np.tile(np.arange(k, dtype=np.int16), len(row))}
            columns |= {"expert": experts.ravel().astype(np.int16)}
            columns |= {"weight": weights.cpu().numpy()[row, position].ravel()}
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)
