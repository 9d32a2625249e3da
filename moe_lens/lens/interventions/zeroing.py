"""Zero, Renormalize and Scale: the gating weights of chosen experts are changed after the router has decided."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from moe_lens.errors import MoELensError
from moe_lens.lens.interventions.protocol import OnGating
from moe_lens.routing import Routing


@dataclass(frozen=True, eq=False, repr=False)
class Zero(OnGating):
    """Silences experts: gating weight -> 0, nothing else (the paper's masking).

    Equal to a `down_proj` of zeros, bit for bit.
    """

    mode: ClassVar[str] = "zero"

    def edited(self, routing: Routing, hits: Tensor) -> Routing:
        return replace(routing, weights=routing.weights.masked_fill(hits, 0))


@dataclass(frozen=True, eq=False, repr=False)
class Renormalize(OnGating):
    """Silences experts and gives their weight to the token's others, rescaled to the old sum; all 0 where none is left.

    w'_i = w_i [i not in set] * sum_j w_j / sum_{j not in set} w_j
    """

    mode: ClassVar[str] = "renormalize"

    def edited(self, routing: Routing, hits: Tensor) -> Routing:
        rest = routing.weights.masked_fill(hits, 0)
        left = rest.sum(-1, keepdim=True)
        factor = routing.weights.sum(-1, keepdim=True) / left.masked_fill(left == 0, 1)
        return replace(routing, weights=rest * factor)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(OnGating):
    """Multiplies the gating weights of experts by a factor, nothing else: 1 changes nothing, 0 is `Zero`."""

    factor: float
    mode: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise MoELensError(f"a factor of gating weights must be a finite number; got {self.factor}")
        object.__setattr__(self, "factor", float(self.factor))
        super().__post_init__()

    def edited(self, routing: Routing, hits: Tensor) -> Routing:
        scaled = routing.weights * self.factor
        return replace(routing, weights=scaled.where(hits, routing.weights))
