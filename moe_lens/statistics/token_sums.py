"""Sums over the routing of the tokens that count, in the groups of their examples: what is told of routers."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lens.lens.devices import OnDevices, places_of
from moe_lens.lens.needs import Needs
from moe_lens.lens.positions import Positions
from moe_lens.lens.record import Record
from moe_lens.routing import Routing
from moe_lens.statistics.accumulators import GroupSums
from moe_lens.statistics.jackknife import by_group, groups_of


@dataclass(frozen=True)
class Tokens:
    """The tokens of a record that count, and of each the group of its example, int64 [token]."""

    places: OnDevices
    groups: OnDevices

    def of(self, part: Tensor) -> Tensor:
        """A part of a routing, [batch, pos, …], at these tokens, [token, …]."""
        return self.places.of(part.flatten(0, 1))

    def summed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of tokens, [token, …], summed within each group, float64 [group, …]; those of [token] all at once."""
        flat = [name for name, part in values.items() if part.ndim == 1]
        found = {name: by_group(part, self.groups) for name, part in values.items() if len(flat) < 2 or part.ndim > 1}
        if len(found) < len(values):
            together = by_group(torch.stack([values[name].double() for name in flat], 1), self.groups)
            found |= dict(zip(flat, together.unbind(1), strict=True))
        return found


class TokenSums(GroupSums):
    """What is summed over the tokens of each group of examples.

    positions: which tokens count, as in `Record.position_mask`.
    """

    size = "tokens"

    def __init__(self, positions: Positions = "all") -> None:
        self.positions = positions
        super().__init__(Needs.of({"routing"}, positions), {"positions": positions})

    def sums(self, record: Record) -> dict[int, dict[str, Tensor]]:
        mask = record.position_mask(self.positions)
        tokens = Tokens(OnDevices(places_of(mask)), OnDevices(groups_of(record.ids)[mask.nonzero()[:, 0]]))
        return {layer: self.of_layer(layer, routing, tokens) for layer, routing in record.routing.items()}

    @abstractmethod
    def of_layer(self, layer: int, routing: Routing, tokens: Tokens) -> dict[str, Tensor]:
        """What the tokens of a layer add, by name [group, …]; "tokens" is how many they are."""
