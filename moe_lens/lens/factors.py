"""How an answer's log-probability would change with the gating weights: gradients by factors of them, row by row."""

from dataclasses import dataclass, replace

from torch import Tensor

from moe_lens.lens.interventions import Here, Intervention
from moe_lens.routing import Routing

FACTORS = "factors"
"""What errors call them."""


@dataclass(frozen=True, eq=False, repr=False)
class Factors(Intervention):
    """Gating weights times factors, of each row, layer and expert its own: 1 changes nothing, 0 is `Zero`.

    factors: [batch, layer, expert], layers in the order of `rows_of`, the absolute indices of the MoE layers.
    """

    factors: Tensor
    rows_of: tuple[int, ...]

    def __call__(self, here: Here, routing: Routing) -> Routing:
        own = self.factors[:, self.rows_of.index(here.layer)].to(here.device)  # [batch, expert]
        spread = own[:, None].expand(-1, here.width, -1).gather(-1, routing.indices)
        return replace(routing, weights=routing.weights * spread.to(routing.weights.dtype))
