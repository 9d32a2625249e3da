"""Zero and Renormalize: the gating weights of chosen experts become 0, and the others are rescaled or not."""

from dataclasses import dataclass, replace
from typing import ClassVar

from moe_lens.lens.interventions.protocol import OnExperts
from moe_lens.routing import Routing


@dataclass(frozen=True, eq=False, repr=False)
class Zero(OnExperts):
    """Silences experts: gating weight -> 0, nothing else (the paper's masking).

    Equal to a `down_proj` of zeros, bit for bit.
    """

    mode: ClassVar[str] = "zero"

    def __call__(self, layer: int, routing: Routing) -> Routing:
        return replace(routing, weights=routing.weights.masked_fill(self.hits(layer, routing), 0))


@dataclass(frozen=True, eq=False, repr=False)
class Renormalize(OnExperts):
    """Silences experts and gives their weight to the token's others, rescaled to the old sum; all 0 where none is left.

    w'_i = w_i [i not in set] * sum_j w_j / sum_{j not in set} w_j
    """

    mode: ClassVar[str] = "renormalize"

    def __call__(self, layer: int, routing: Routing) -> Routing:
        rest = routing.weights.masked_fill(self.hits(layer, routing), 0)
        left = rest.sum(-1, keepdim=True)
        factor = routing.weights.sum(-1, keepdim=True) / left.masked_fill(left == 0, 1)
        return replace(routing, weights=rest * factor)
