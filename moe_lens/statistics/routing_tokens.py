"""RoutingTokens: what the routers decided about every token, row by row, for tables that are written as they come."""

import numpy as np
import pandas as pd
import torch

from moe_lens.lens.devices import OnDevices, on_cpu, places_of
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.statistics.accumulators import ExampleRows

COLUMNS = ("expert", "weight", "logit", "probability", "margin")


class RoutingTokens(ExampleRows):
    """The selected experts of every token with their gating weights, router logits and probabilities.

    positions: which tokens count, as in `Record.position_mask`. There are k rows for each token and layer: of more than
    a sample of examples let `Streamed` write them.
    """

    key = ("id", "layer", "position", "rank")

    def __init__(self, positions: Positions = "all") -> None:
        self.positions = positions
        super().__init__(Needs.of({"routing"}, positions), {"positions": positions})

    def rows(self, record: Record) -> pd.DataFrame:
        """Columns id, position (of the token in its prompt), token_id, layer, rank (0 for the highest gating weight),
        expert, weight (as the experts got it), logit (before any softmax), probability (softmax over all experts), and
        margin (the token's lowest logit of a selected expert minus the highest of another; below 0 where a bias of the
        selection decided).
        """
        mask = record.position_mask(self.positions)
        row, place = mask.numpy().nonzero()
        tokens, found = OnDevices(places_of(mask)), []
        for routing in record.routing.values():
            parts = (routing.weights, routing.indices, routing.logits, routing.probabilities())
            weights, indices, logits, probabilities = (tokens.of(part.flatten(0, 1)) for part in parts)
            weights, order = weights.float().sort(dim=-1, descending=True, stable=True)
            experts = indices.gather(-1, order)
            chosen = logits.float().gather(-1, experts)
            others = logits.float().scatter(-1, experts, -torch.inf).amax(-1, keepdim=True)
            margin = (chosen.amin(-1, keepdim=True) - others).expand(chosen.shape)
            found += [experts, weights, chosen, probabilities.gather(-1, experts), margin]
        tables, values = [], iter(on_cpu(found))
        for layer in record.routing:
            own = {name: next(values) for name in COLUMNS}  # [token, k] each
            k = own["expert"].shape[1]
            columns = {"id": np.repeat(np.array(record.ids, dtype=object)[row], k)}
            columns |= {"position": np.repeat((place - record.starts.numpy()[row]).astype(np.int32), k)}
            columns |= {"token_id": np.repeat(record.token_ids[mask].numpy().astype(np.int32), k)}
            columns |= {
                "layer": np.full(len(row) * k, layer, np.int16),
                "rank": np.tile(np.arange(k, dtype=np.int16), len(row)),
            }
            columns |= {name: part.flatten().numpy() for name, part in own.items()}
            tables.append(pd.DataFrame(columns).astype({"expert": np.int16, "id": str}))
        return pd.concat(tables, ignore_index=True)
