"""RoutingVectors: how often each example's tokens activate each expert."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.experts import ExpertSet
from moe_lens.lens.devices import OnDevices, on_cpu
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.routing import Routing
from moe_lens.statistics.accumulators import ExampleRows


class RoutingVectors(ExampleRows):
    """Each example's activation rates, the share of its tokens that select an expert; a vector over layers and experts.

    Over all experts of a layer the rates sum to k; divided by k, their mean over examples is Eq. 8.
    experts: the ones kept, such as the context-faithful experts (Figure 4); by default all.
    positions: which tokens count, as in `Record.position_mask`. An example without any has no rows.
    k: how many experts of each token count, those of the highest gating weights; by default all that are selected.

    >>> [vectors] = lens.measure(examples, RoutingVectors(faithful))
    >>> routing_map(vectors.table().assign(task="squad"), by="task")
    """

    key = ("id", "layer", "expert")

    def __init__(self, experts: ExpertSet | None = None, *, positions: Positions = "all", k: int | None = None) -> None:
        if k is not None and k < 1:
            raise MoELensError(f"k is how many experts of a token count, at least 1; got {k}")
        self.experts, self.positions, self.k = experts, positions, k
        settings = {"experts": None if experts is None else str(experts), "positions": positions, "k": k}
        super().__init__(Needs.of({"routing"}, positions), settings)

    def rows(self, record: Record) -> pd.DataFrame:
        """Columns id, layer, expert, rate, tokens (how many of the example's tokens counted)."""
        mask = record.position_mask(self.positions)
        tokens, there = mask.sum(1), OnDevices(mask[..., None])
        counted = (tokens > 0).nonzero()[:, 0]
        by_layer = [self._selected(routing) & there.on(routing.indices.device) for routing in record.routing.values()]
        parts = []
        for layer, selected in zip(record.routing, on_cpu(own.sum(1) for own in by_layer), strict=True):
            experts = torch.arange(selected.shape[1])  # selected: [batch, expert]
            if self.experts is not None:
                experts = torch.tensor(sorted(self.experts[layer]), dtype=torch.int64)
            rates = (selected[counted] / tokens[counted, None].double())[:, experts]
            columns = {
                "id": np.repeat(np.array(record.ids, dtype=object)[counted.numpy()], len(experts)),
                "layer": layer,
                "expert": np.tile(experts.numpy(), len(counted)),
                "rate": rates.flatten().numpy(),
                "tokens": np.repeat(tokens[counted].numpy(), len(experts)),
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def _selected(self, routing: Routing) -> Tensor:
        """Which experts of each token count, bool [batch, pos, expert]."""
        if self.k is None:
            return routing.selected()
        if self.k > routing.indices.shape[-1]:
            raise MoELensError(f"each token selects {routing.indices.shape[-1]} experts; got k={self.k}")
        best = routing.indices.gather(-1, routing.weights.topk(self.k, dim=-1).indices)
        return torch.zeros_like(routing.selected()).scatter(-1, best, True)
